"""NumPy files: padded and flat arrays, and what is refused in them."""

import numpy as np
import pytest

from roma_core.data import DataError
from roma_core.sources.base import source_config

TIME = {"axes": [{"name": "t", "unit": "s"}], "channels": [{"name": "x", "unit": "V"}]}


def npz(folder, **arrays):
    np.savez(folder / "some.npz", **arrays)
    return source_config({"kind": "npz", "file": folder / "some.npz", **TIME}).open(folder)


def test_padded_and_flat_arrays_give_the_same_series(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    padded = npz(
        tmp_path, values=values, positions=np.arange(3), lengths=[3, 2], labels=np.array([10, 9])
    )
    assert padded.classes == ("9", "10") and padded.__length_hint__() == 2
    one = list(padded.read())
    flat = npz(tmp_path, values=[0, 1, 2, 3, 4], positions=[0, 1, 2, 0, 1], offsets=[0, 3, 5])
    two = list(flat.read())

    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.values, b.values) and np.array_equal(a.positions, b.positions)
    assert [s.label for s in one] == ["10", "9"] and [s.id for s in one] == ["0", "1"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"values": [[1.0]]}, r"has no array 'positions'; it has \['values'\]"),
        ({"values": [["a"]], "positions": [0]}, "holds <U1 where numbers are needed"),
        ({"values": [[1.0]], "positions": [0], "ids": ["a", "b"]}, "2 ids of 1 series"),
        (
            {"values": np.array([{}], dtype=object), "positions": [0]},
            "cannot be read: .*allow_pickle",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        list(npz(tmp_path, **arrays).read())


FLAT = {"values": np.zeros(5), "positions": np.arange(5)}
ROWS = {"values": np.zeros((2, 4)), "positions": np.arange(4)}


@pytest.mark.parametrize(
    "arrays, message",
    [
        (FLAT | {"offsets": [0, 2, 4]}, "from 0 to 4 for 5 values"),
        (FLAT | {"offsets": [0, 3, 2, 5]}, "must rise"),
        (FLAT | {"offsets": np.array([0, 3, 2, 5], dtype=np.uint64)}, "must rise"),
        (FLAT | {"offsets": [0, 2, 5], "lengths": [-1, 99]}, "offsets and lengths"),
        (ROWS | {"ids": "a"}, "ids must be one row"),
        (ROWS | {"labels": 3}, "labels must be one row"),
        (FLAT | {"offsets": [0.5, 5]}, "whole numbers, got float64"),
        (FLAT | {"offsets": [0, 5], "positions": np.arange(4)}, "5 values and 4 positions"),
        (ROWS | {"lengths": [4, -1]}, "from -1 to 4"),
        (ROWS | {"lengths": [4, 99]}, "from 0 to the 4 observations"),
        (ROWS | {"positions": np.zeros((2, 3))}, "as many series and observations"),
        ({"values": np.float64(1), "positions": np.arange(4)}, "single numbers"),
    ],
)
def test_arrays_that_are_not_cut_into_series_are_refused_before_any_is_read(
    tmp_path, arrays, message
):
    with pytest.raises(DataError, match=message):
        npz(tmp_path, **arrays)


def test_texts_of_bytes_and_whole_numbers(tmp_path):
    arrays = {"values": np.zeros((2, 3)), "positions": np.arange(3)}
    source = npz(
        tmp_path, **arrays, labels=np.array([b"walk", b"run"]), ids=np.array([b"p0", b"p1"])
    )
    assert source.classes == ("run", "walk") and [s.id for s in source.read()] == ["p0", "p1"]
    assert npz(tmp_path, **arrays, labels=[1.0, 0.0]).classes == ("0", "1")


def test_channels_first_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.zeros((4, 2, 25)), positions=np.arange(25))
    channels = [{"name": name, "unit": "1"} for name in "xy"]
    config = {"kind": "npz", "file": tmp_path / "a.npz", **TIME, "channels": channels}

    with pytest.raises(DataError, match=r"look like .series, channels, observations.*transpose"):
        source_config(config).open(tmp_path)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "some.npz").write_bytes(b"PK but no more")

    with pytest.raises(DataError, match="cannot be read"):
        source_config({"kind": "npz", "file": tmp_path / "some.npz", **TIME}).open(tmp_path)
