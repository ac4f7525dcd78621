"""Reading ``.ts`` files."""

import hashlib

import numpy as np
import pytest

from roma_core.data import DataError
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
        (
            HEADER.replace("@classLabel true a b", "@targetLabel true") + "1:2:a\n",
            "'a' is not a num",
        ),
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


def test_the_last_number_is_the_target_of_a_regression_file(tmp_path):
    text = HEADER.replace("@classLabel true a b", "@targetLabel true") + "1,2:3,4:0.5\n7:8:?\n"
    source = ts_source(tmp_path, text, target={"name": "load", "unit": "kW"})

    first, second = source.read()

    assert (source.classes, source.target_level, len(source.channels)) == ((), "series", 2)
    assert (source.targets[0].name, first.label, first.targets.tolist()) == ("load", None, [0.5])
    assert np.isnan(second.targets) and second.values.tolist() == [[7, 8]]


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
