"""Images as people store them: modes, depths, transparency, hidden files, folders of splits."""

import warnings

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from roma_core.cli import main
from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.data.infer_schema import ColumnRoles, infer_source
from roma_core.sources.base import source_config


def read(folder, **options):
    values = {"kind": "image_folder", "folder": folder, "patch": 4, "colours": "grey", **options}
    return list(source_config(values).open(folder).read())


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)


def test_grey_levels_of_16_bits_tell_the_classes_apart(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(20):
        for name, level in (("dark", 2_000), ("light", 40_000)):
            pixels = rng.integers(0, 256, (8, 8)).astype(np.uint16)
            pixels[2:6, 2:6] = level
            save(tmp_path / "in" / name / f"{k}.png", pixels)

    inferred = infer_source([tmp_path / "in"], ColumnRoles())
    config = DatasetConfig(name="png16", source=inferred.config)
    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))

    assert inferred.config["colours"] == "grey"
    largest = {"dark": set(), "light": set()}
    for i, label in enumerate(dataset.labels):
        largest[dataset.schema.classes[label]].add(dataset.raw(i)[1].max())
    assert largest == {"dark": {2_000}, "light": {40_000}}


GREY = np.full((4, 4), 100, np.uint8)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("bits.png", Image.fromarray(GREY > 0), 255),
        ("l.png", Image.fromarray(GREY), 100),
        ("i.tif", Image.fromarray(np.full((4, 4), 70_000, np.int32)), 70_000),
        ("i16.tif", Image.fromarray(np.full((4, 4), 40_000, np.uint16)), 40_000),
        ("f.tif", Image.fromarray(np.full((4, 4), 0.25, np.float32)), 0.25),
        ("palette.gif", Image.fromarray(GREY).convert("P"), 100),
        ("cmyk.jpg", Image.fromarray(GREY).convert("CMYK"), 100),
        (
            "la.png",
            Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(GREY * 0 + 255)]),
            100,
        ),
    ],
)
def test_every_mode_keeps_its_levels(tmp_path, name, image, expected):
    save(tmp_path / "a" / name, image)

    (series,) = read(tmp_path)

    np.testing.assert_allclose(series.values, expected, atol=1 if "cmyk" in name else 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_picture_in_its_transparency_alone_is_seen_and_reported(tmp_path, mode):
    alpha = np.zeros((4, 4), np.uint8)
    alpha[:2] = 255
    image = Image.merge("RGBA", [*[Image.fromarray(GREY * 0)] * 3, Image.fromarray(alpha)])
    if mode == "P":
        image = Image.fromarray((alpha > 0).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 0
        save(tmp_path / "a/1.png", image)
    else:
        save(tmp_path / "a/1.png", image.convert(mode))

    with pytest.warns(UserWarning, match="1 images of .* have transparent pixels, .* over white"):
        (series,) = read(tmp_path)

    assert series.values.reshape(4, 4)[:, 0].tolist() == [0, 0, 255, 255]


def test_a_photograph_is_turned_upright(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a/1.png", exif=exif)

    (series,) = read(tmp_path)

    assert series.values.reshape(4, 4).tolist() == np.rot90(pixels, -1).tolist()


def test_two_depths_in_one_folder_are_refused(tmp_path):
    save(tmp_path / "a/1.png", GREY)
    save(tmp_path / "b/1.png", np.full((4, 4), 40_000, np.uint16))

    with pytest.raises(DataError, match=r"b/1\.png has grey levels of more than 8 bits, others"):
        read(tmp_path)


def test_several_frames_are_reported(tmp_path):
    (tmp_path / "a").mkdir()
    frames = [Image.fromarray(GREY), Image.fromarray(GREY // 2)]
    frames[0].save(tmp_path / "a/1.tif", save_all=True, append_images=frames[1:])

    with pytest.warns(UserWarning, match="1 images of .* have several frames"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.png").write_bytes(content)

    with pytest.raises(DataError, match=r"a/1\.png cannot be read as an image"):
        read(tmp_path)


def test_hidden_files_are_left_out_and_colour_is_found_in_any_file(tmp_path):
    save(tmp_path / "a/1.png", GREY)
    save(tmp_path / "b/2.png", np.full((4, 4, 3), [255, 0, 0], np.uint8))
    for name in ("._1.png", ".cache/1.png", "a/._1.png", "__MACOSX/a/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not a picture")

    inferred = infer_source([tmp_path], ColumnRoles())

    assert inferred.config["colours"] == "rgb"
    source = source_config(inferred.config).open(tmp_path)
    assert source.classes == ("a", "b") and [s.id for s in source.read()] == ["a/1.png", "b/2.png"]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "test"), {"train": "train", "test": "test"}),
        (("Training", "Testing"), {"Training": "train", "Testing": "test"}),
        (("train", "val"), {"train": "train", "val": "test"}),
        (
            ("train", "valid", "test"),
            {"train": "train", "valid": "validation", "test": "test"},
        ),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, folders, splits):
    for k, folder in enumerate(folders):
        for label in "ab":
            for n in range(10):
                pixels = np.random.default_rng([k, n, ord(label)]).integers(0, 256, (4, 4))
                save(tmp_path / "in" / folder / label / f"{n}.png", pixels.astype(np.uint8))
    (tmp_path / "in/.DS_Store").touch()

    inferred = infer_source([tmp_path / "in"], ColumnRoles())
    source = source_config(inferred.config).open(tmp_path)

    assert source.classes == ("a", "b")
    assert {s.id.split("/")[0]: s.recorded_split for s in source.read()} == splits
    assert f"published splits {', '.join(sorted(folders))}" in inferred.notes[0]
    config = DatasetConfig(name="x", source=inferred.config, validation_fraction=0)
    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))
    counts = {name: n.n_series for name, n in dataset.manifest.counts.items()}
    assert counts == {
        name: 20 * list(splits.values()).count(name) for name in ("train", "validation", "test")
    }
    kept = "recorded validation stays validation"
    assert (kept in dataset.manifest.split_rule) == ("validation" in splits.values())


def test_new_experiment_takes_the_published_splits(tmp_path):
    rng = np.random.default_rng(0)
    for folder, n in (("train", 12), ("validation", 5), ("test", 6)):
        for label in "ab":
            for k in range(n):
                pixels = rng.integers(0, 256, (16, 16)).astype(np.uint8)
                save(tmp_path / "in" / folder / label / f"{k}.png", pixels)
    from roma_pipelines.cli import main as pipeline

    command = ["new-experiment", "pictures", "--source", str(tmp_path / "in"), "--print"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(pipeline, command)

    assert result.exit_code == 0, result.output
    assert "published split: 24 train, 10 validation, 12 test" in result.output
    assert "validation_fraction: 0.0" in result.output


def test_build_prints_what_was_drawn_over_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    for k in range(8):
        save(tmp_path / "in/a" / f"{k}.png", image)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"name: x\nsource: {{ kind: image_folder, folder: {tmp_path / 'in'}, patch: 4 }}\n"
    )

    result = CliRunner().invoke(main, ["data", "build", str(config), "--out", str(tmp_path)])

    assert result.exit_code == 0, result.output
    assert "warning: 8 images of" in result.output
