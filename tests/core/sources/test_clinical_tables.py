"""Tables with gaps, sentinels, a column of quantities, and covariates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.data.layout import pivot

WIDE = pd.DataFrame(
    {
        "patient": ["a", "a", "a", "b", "b", "c"],
        "hours": [0.0, 1.0, 2.5, 0.0, 3.0, 1.0],
        "hr": [70.0, np.nan, 75.0, 80.0, -9999.0, 66.0],
        "lab": [np.nan, 4.5, np.nan, -9999.0, 5.5, np.nan],
        "age": [61.0, 61.0, 61.0, np.nan, 44.0, np.nan],
        "sex": ["f", "f", None, "m", "m", None],
        "label": [1, 1, 1, 0, 0, 1],
        "split": ["train"] * 5 + ["test"],
    }
)
LONG = WIDE.melt(["patient", "hours", "age", "sex", "label", "split"], ["hr", "lab"]).dropna(
    subset="value"
)
COVARIATES = [{"column": "age", "unit": "y"}, {"column": "sex", "categories": ["f", "m"]}]


def built(folder, table, columns, *, kind="parquet", layout="joint", **source):
    path = folder / f"table.{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path) if kind == "parquet" else table.to_csv(path, index=False)
    shared = {"object": "patient", "axes": [{"column": "hours", "unit": "h"}]}
    shared["metadata"] = {"label": "label", "split": "split"}
    config = DatasetConfig(
        name="clinic",
        source={
            "kind": "table",
            "files": [path],
            "columns": shared | columns,
            "missing_values": [-9999],
            **source,
        },
        validation_fraction=0,
        layout=layout,
    )
    return StoredDataset(build_dataset(config, folder, folder, progress=False))


CHANNELS = [{"column": "hr", "unit": "1/min"}, {"column": "lab"}]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_a_wide_and_a_long_table_are_one_data_set(tmp_path, kind, layout):
    wide = built(
        tmp_path / "wide",
        WIDE,
        {"channels": CHANNELS, "covariates": COVARIATES},
        kind=kind,
        layout=layout,
    )
    quantity = {"column": "variable", "value": "value"}
    long = built(
        tmp_path / "long",
        LONG,
        {"channels": CHANNELS, "covariates": COVARIATES, "quantity": quantity},
        kind=kind,
        layout=layout,
    )
    for dataset in (wide, long):
        assert dataset.schema.layout == layout
        assert [c.name for c in dataset.schema.channels] == ["hr", "lab"]
        order = [dataset.ids.index(name) for name in "abc"]
        np.testing.assert_array_equal(
            dataset.covariates[order], np.float32([[61, 0], [44, 1], [np.nan, np.nan]])
        )
        at, values = dataset.joint(dataset.ids.index("a"))
        assert at[:, 0].tolist() == [0.0, 1.0, 2.5]
        np.testing.assert_array_equal(values, [[70, np.nan], [np.nan, 4.5], [75, np.nan]])
        _, values = dataset.joint(dataset.ids.index("b"))
        np.testing.assert_array_equal(values, [[80, np.nan], [np.nan, 5.5]])
        if layout == "per_channel":
            at, values = dataset.raw(dataset.ids.index("a"))
            assert len(values) == 3
            assert pivot(at, values, 2)[1].shape == (3, 2)
    assert wide.schema == long.schema


def test_covariates_may_stand_in_a_table_of_objects(tmp_path):
    tmp_path.joinpath("objects.csv").write_text(
        'patient;label;split;age;sex\na;1;train;"61,5";f\nb;0;train;NA;m\nc;1;test;;?\n'
    )
    dataset = built(
        tmp_path,
        WIDE[["patient", "hours", "hr", "lab"]],
        {"channels": CHANNELS, "covariates": COVARIATES},
        objects={"file": tmp_path / "objects.csv", "object": "patient"},
    )
    np.testing.assert_array_equal(
        dataset.covariates, np.float32([[61.5, 0], [np.nan, 1], [np.nan, np.nan]])
    )


def test_a_covariate_may_be_true_or_false(tmp_path):
    smokes = {"a": True, "b": None, "c": False}
    table = WIDE.assign(smokes=WIDE.patient.map(smokes).astype("boolean"))
    columns = {"channels": CHANNELS, "covariates": [{"column": "smokes"}]}
    np.testing.assert_array_equal(
        built(tmp_path, table, columns).covariates[:, 0], np.float32([1, np.nan, 0])
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"age": [61, 62, 61, 44, 44, 50]}, "object 'a' has '61' and '62' in column 'age'"),
        (
            {"sex": ["f", "f", "f", "x", "x", "m"]},
            "object 'b' has 'x' in the column 'sex', expected",
        ),
        ({"age": ["old"] * 6}, "object 'a' has 'old' in the column 'age', expected a number"),
    ],
)
def test_a_covariate_that_is_none_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        built(tmp_path, WIDE.assign(**changes), {"channels": CHANNELS, "covariates": COVARIATES})


def test_a_quantity_that_is_no_channel_is_named(tmp_path):
    quantity = {"column": "variable", "value": "value"}
    with pytest.raises(DataError, match="'lab', which is not among its channels"):
        built(tmp_path, LONG, {"channels": CHANNELS[:1], "quantity": quantity})


def test_words_that_stand_for_a_missing_value_are_read_so(tmp_path):
    table = WIDE.assign(hr=["70", "bad", "75", "80", "?", "66"])
    dataset = built(
        tmp_path, table, {"channels": CHANNELS}, kind="csv", missing_values=[-9999, "bad"]
    )
    assert np.isnan(dataset.joint(0)[1][1, 0])


def test_a_word_of_an_axis_may_be_unknown(tmp_path):
    table = WIDE.assign(ward=["x", "y", "x", "x", "z", "y"])
    axes = [
        {"column": "hours", "unit": "h"},
        {"column": "ward", "categories": ["x", "y"], "unknown": True},
    ]
    dataset = built(tmp_path, table, {"channels": CHANNELS, "axes": axes})
    assert [axis.n_embedded for axis in dataset.schema.axes] == [0, 3]
    assert dataset.raw(dataset.ids.index("b"))[0][:, 1].tolist() == [0, 2]
    axes[1]["unknown"] = False
    with pytest.raises(DataError, match="'z', which is not among its categories"):
        built(tmp_path / "refused", table, {"channels": CHANNELS, "axes": axes})
