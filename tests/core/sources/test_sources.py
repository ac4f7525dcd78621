"""Reading ``.ts`` files, and files out of a package, with the real package client and no network."""

import hashlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from roma_core.schema import DataError
from roma_core.sources import packaged as package_file
from roma_core.sources.base import source_config

HEADER = """\
# a comment
@problemName Small
@timeStamps false
@univariate false
@dimensions 2
@equalLength false
@classLabel true a b
@data
"""
TRAIN = HEADER + "1,2,3:4,5,6:a\n\n0.5,-1e-1:0,7:b\n"
TEST = HEADER + "9:8:b\n"


def ts_source(folder, text=TRAIN, **format):
    (folder / "small.ts").write_text(text)
    files = [{"path": folder / "small.ts", "split": "train"}]
    return source_config({"kind": "ts", "files": files, "format": format}).open(folder)


def test_a_ts_file_is_read_as_it_stands(tmp_path):
    source = ts_source(tmp_path, axis="frame", axis_unit="s")

    first, second = source.read()

    assert (first.id, first.label, first.recorded_split) == ("train-0001", "a", "train")
    np.testing.assert_array_equal(first.values, [[1, 4], [2, 5], [3, 6]])
    np.testing.assert_array_equal(first.positions, [[0], [1], [2]])
    assert (first.values.dtype, first.positions.dtype) == (np.float32, np.float64)
    assert (second.id, second.label, second.values.shape) == ("train-0002", "b", (2, 2))
    assert source.classes == ("a", "b")
    assert [channel.name for channel in source.channels] == ["c01", "c02"]
    assert (source.axes[0].name, source.axes[0].unit) == ("frame", "s")
    assert source.files == {"small.ts": hashlib.sha256(TRAIN.encode()).hexdigest()}


def test_a_file_without_dimensions_or_labels_is_read_too(tmp_path):
    text = "@classLabel false\n@equalLength true\n@seriesLength 2\n@data\n1,2\n3,4\n"

    source = ts_source(tmp_path, text)

    assert [series.values.tolist() for series in source.read()] == [[[1], [2]], [[3], [4]]]
    assert source.classes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "1,2:3,x:a\n", "line 9: 'x' is not a number"),
        (HEADER + "1,2:3:a\n", r"line 9: channels differ in length: \[1, 2\]"),
        (HEADER + "1:2:a\n1:a\n", "line 10: expected 2 channels, got 1"),
        (HEADER + "1:2:c\n", "line 9: class 'c' is not in the header's"),
        (HEADER + "1:2:\n", "line 9: class '' is not"),
        (HEADER, "has no series after @data"),
        (HEADER.replace("@data\n", ""), "has no @data line"),
        (HEADER.replace("@dimensions 2", "1,2,3"), "line 5: expected an @ line"),
        (HEADER.replace("@dimensions 2", "@dimensions two") + "1:2:a\n", "@dimensions must be one"),
        (HEADER.replace("@timeStamps false", "@timeStamps true"), "has time stamps"),
        (HEADER.replace("@classLabel true a b", "@targetLabel true"), "has regression targets"),
        (HEADER.replace("@classLabel true a b", "@classLabel true"), "must list every class once"),
        (
            HEADER.replace("@equalLength false", "@equalLength true\n@seriesLength 3") + "1:2:a\n",
            "line 10: 1 numbers a channel, the header says 3",
        ),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        list(ts_source(tmp_path, text).read())


def test_a_question_mark_is_a_missing_number(tmp_path):
    (series,) = ts_source(tmp_path, HEADER + "1,2:3, ? :a\n").read()

    np.testing.assert_array_equal(series.values, [[1, 3], [2, np.nan]])


def test_names_must_fit_the_channels(tmp_path):
    with pytest.raises(DataError, match="has 2 channels, the configuration names 1"):
        ts_source(tmp_path, channels=["only"])


def test_a_missing_file_is_named(tmp_path):
    config = source_config({"kind": "ts", "files": [{"path": tmp_path / "no.ts"}]})

    with pytest.raises(DataError, match=r"there is no file .*no\.ts"):
        config.open(tmp_path)


def test_files_must_agree_in_classes(tmp_path):
    (tmp_path / "a.ts").write_text(TRAIN)
    (tmp_path / "b.ts").write_text(TEST.replace("true a b", "true b c"))
    files = [{"path": tmp_path / name} for name in ("a.ts", "b.ts")]

    with pytest.raises(DataError, match="files of one data set must agree"):
        source_config({"kind": "ts", "files": files}).open(tmp_path)


def test_an_unknown_kind_names_the_closest():
    with pytest.raises(ValueError, match="the closest is 'package_file'"):
        source_config({"kind": "package_fiel"})


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
    monkeypatch.setattr(package_file.subprocess, "run", None)  # the cache is enough
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
        patch.setattr(package_file, "write_bytes", interrupted)
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


def test_reading_and_building_need_no_torch():
    code = (
        "import sys, roma_core.data.build, roma_core.data.quality, roma_core.data.profile, "
        "roma_core.cli.data; sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
