"""Texts, whole numbers and shapes of NumPy arrays as HDF5 and other libraries leave them."""

import numpy as np
import pytest

from tests.cases.commands import build, error_of, new_experiment

WORDS = np.array(["walk", "run"])[np.arange(40) % 2]
CHANNELS = [{"name": name, "unit": "g"} for name in "xyz"]


def config_of(folder, values=(40, 25, 3), **arrays):
    values = np.random.default_rng(0).normal(size=values).astype("f4")
    np.savez(folder / "a.npz", values=values, **{"positions": np.arange(25.0), **arrays})
    axes = [{"name": "time", "unit": "s"}]
    source = {"kind": "npz", "file": str(folder / "a.npz"), "axes": axes, "channels": CHANNELS}
    return {"name": "x", "source": source}


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (WORDS, ("run", "walk")),
        (WORDS.astype("S4"), ("run", "walk")),
        (np.char.add(WORDS, " ").astype("S6"), ("run", "walk")),
        (np.char.add(" ", WORDS), ("run", "walk")),
        (np.array(["größe".encode("latin-1"), b"run"])[np.arange(40) % 2], ("größe", "run")),
        (np.array(["größe".encode(), b"run"])[np.arange(40) % 2], ("größe", "run")),
        (np.arange(40) % 2, ("0", "1")),
        ((np.arange(40) % 2).astype(float), ("0", "1")),
        ((np.arange(40) % 2).astype("f4") + 0.5, ("0.5", "1.5")),
        (np.arange(40) % 11, tuple(str(k) for k in range(11))),
        (np.arange(40) % 2 == 0, ("False", "True")),
    ],
)
def test_labels_of_any_type_are_words(tmp_path, labels, classes):
    dataset = build(tmp_path, config_of(tmp_path, labels=labels))

    assert dataset.schema.classes == classes
    inferred, _ = new_experiment(tmp_path / "a.npz")
    assert build(tmp_path, inferred | {"name": "y"}).schema.classes == classes


def test_ids_groups_and_splits_of_bytes(tmp_path):
    ids = np.array([f"p{i}" for i in range(40)]).astype("S3")
    splits = np.array([b"train", b"TEST ", b"val"])[np.arange(40) % 3]
    groups = (np.arange(40) // 2).astype(float)

    config = config_of(tmp_path, ids=ids, splits=splits, groups=groups)
    dataset = build(tmp_path, config | {"validation_fraction": 0})

    assert dataset.ids == [f"p{i}" for i in range(40)]
    assert dataset.groups == [str(i // 2) for i in range(40)]
    assert dataset.splits.tolist() == [[0, 2, 1][i % 3] for i in range(40)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"values": (40, 3, 25)},
            "values (40, 3, 25) look like (series, channels, observations), expected (series, "
            "observations, channels); transpose them",
        ),
        (
            {"labels": np.where(np.arange(40) == 7, np.nan, 1.0)},
            "series '7' has nothing in column 'labels'",
        ),
        ({"labels": WORDS.astype(object)}, "text as fixed-width strings, not as objects"),
        ({"ids": np.full(40, 2.0**60)}, "ids hold whole numbers as float64, which is exact up to"),
        (
            {"positions": np.arange(25).astype("m8[s]")},
            "a.npz holds timedelta64[s] where numbers are needed",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, arrays, message):
    assert message in error_of(tmp_path, config_of(tmp_path, **arrays))
