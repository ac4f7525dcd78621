from dataclasses import replace

import numpy as np
import pytest

from roma_core.evaluation.predictions import PredictionTable, RegressionTable, missing_fractions
from tests.core.evaluation.tables import TARGETS, TIME, regression_table


def table(**changes):
    content = {
        "ids": ["a", "b", "c"],
        "classes": ("x", "y"),
        "labels": np.array([0, 1, 1]),
        "probabilities": np.array([[0.9, 0.1], [0.25, 0.75], [0.5, 0.5]]),
        "lengths": np.array([3, 7, 1]),
        "lineage": {"dataset_digest": "d1"},
    }
    return PredictionTable(**{**content, **changes})


def test_a_saved_table_loads_equal(tmp_path):
    table().save(tmp_path / "predictions.parquet")

    loaded = PredictionTable.load(tmp_path / "predictions.parquet")

    assert (loaded.ids, loaded.classes) == (["a", "b", "c"], ("x", "y"))
    assert loaded.lineage == {"dataset_digest": "d1"}
    for name in ("labels", "probabilities", "lengths"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(table(), name), strict=True)


def test_a_tie_goes_to_the_first_class():
    assert table().predicted.tolist() == [0, 1, 0]
    assert table().correct.tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ["a", "b", "b"]}, r"ids must be distinct.*\['b'\]"),
        ({"classes": ("x", "x")}, "classes must be distinct"),
        ({"classes": ("x", "y", "z")}, r"probabilities: expected float64 of shape \(3, 3\)"),
        ({"labels": np.array([0, 1, 2])}, "labels: expected 0 to 1.*first is of series 'c': 2"),
        ({"labels": np.array([0.0, 1, 1])}, "labels: expected int64.*got float64"),
        ({"lengths": np.array([1, 0, 1])}, "lengths: expected at least 1.*series 'b': 0"),
        ({"probabilities": np.full((3, 2), np.nan)}, "finite numbers.*3 of 3 rows"),
        ({"probabilities": np.full((3, 2), 0.6)}, "sum to 1 within"),
        ({"probabilities": np.array([[1.5, -0.5]] * 3)}, r"numbers in \[0, 1\]"),
        ({"ids": []}, "at least 1 series"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "predictions.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        PredictionTable.load(path)

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(
        ValueError, match="no table of predictions with classes, of schema_version 1"
    ):
        PredictionTable.load(path)


def test_a_table_that_does_not_fit_together_is_refused_by_what_is_wrong():
    with pytest.raises(ValueError, match=r"positions: expected float64 of shape \(3, 1\)"):
        RegressionTable(
            ids=["a"], series=np.zeros(3, np.int64), axes=TIME, positions=np.zeros((2, 1)),
            channels=TARGETS, true=np.zeros((3, 2)), predicted=np.zeros((3, 2)),
            scale=np.ones(2), lengths=np.array([3]),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"first is of series 's1': \[nan"):
        regression_table([[0, 0], [0, 0], [np.nan, 0]], [2, 1])


@pytest.mark.parametrize("of_series", [False, True])
def test_a_table_of_targets_is_read_back(tmp_path, of_series):
    table = regression_table(np.eye(3, 2), [2, 1], std=np.ones((3, 2)))
    if of_series:
        fields = {"axes": (), "positions": None, "lengths": np.array([4, 5, 6])}
        table = replace(table, **fields, ids=["a", "b", "c"], series=np.arange(3))
    table.save(tmp_path / "table.parquet")

    found = RegressionTable.load(tmp_path / "table.parquet")

    assert table.differs_from(found) is None and found.channels == table.channels
    for name in ("lengths", "scale", "predicted", "std", "positions"):
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))
    other = replace(found, true=found.true + np.array([[1], [0], [0]]))
    assert table.differs_from(other) == "1 rows have other true targets in either table"


def test_missing_observations_are_a_share_of_what_the_usual_pace_would_give():
    class Rows:
        dataset = None
        indices = (0, 1, 2)

        def raw(self, i):
            whole = np.arange(10.0)
            times = (whole, whole[[0, 1, 2, 3, 4, 9]], whole[:1])[i]
            return times[:, None], None

    rows = Rows()
    rows.dataset = rows
    assert missing_fractions(rows).tolist() == pytest.approx([0.0, 0.4, 0.0])
