"""Row numbers of a table, which give the class away where the rows are sorted by it."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cases.commands import build, new_experiment

IDS = np.repeat(np.arange(60), 10)
TABLE = pd.DataFrame(
    {
        "object_id": IDS,
        "time": np.tile(np.arange(10.0), 60),
        "flux": np.random.default_rng(0).normal(10, 1, 600).round(3),
        "label": np.where(IDS < 30, "a", "b"),
    }
)


def with_index(path, name):
    """The table with its row numbers in one more column, as pandas, or a person, would name it."""
    if path.suffix == ".csv":
        TABLE.to_csv(path, index_label=name)
    elif name is None:
        TABLE.rename_axis("", axis=0).to_parquet(path)
    else:
        pq.write_table(pa.Table.from_pandas(TABLE.assign(**{name: TABLE.index})), path)
    return path


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("index.csv", None),
        ("index.csv", "Unnamed: 0"),
        ("index.parquet", "__index_level_0__"),
        ("index.csv", "index"),
        ("index.parquet", "row"),
    ],
)
def test_a_row_number_is_left_out_and_said(tmp_path, file, name):
    dataset, output = new_experiment(with_index(tmp_path / file, name))

    channels = [column["column"] for column in dataset["source"]["columns"]["channels"]]
    assert channels == ["flux"]
    assert f"not used: row numbers in '{name or ''}'" in output
    dataset["name"] = "case"
    assert [c.name for c in build(tmp_path, dataset).schema.channels] == ["flux"]


def test_row_numbers_from_one_are_found_too_and_other_whole_numbers_kept(tmp_path):
    numbered = TABLE.assign(number=np.arange(1, 601), count=np.arange(600) // 2)
    numbered.to_csv(tmp_path / "table.csv", index=False)

    dataset, output = new_experiment(tmp_path / "table.csv")

    channels = [column["column"] for column in dataset["source"]["columns"]["channels"]]
    assert channels == ["flux", "count"] and "row numbers in 'number'" in output


def test_a_column_that_is_named_is_used(tmp_path):
    path = with_index(tmp_path / "index.csv", "index")

    dataset, _ = new_experiment(path, "--channel", "index", "--channel", "flux")

    channels = [column["column"] for column in dataset["source"]["columns"]["channels"]]
    assert channels == ["index", "flux"]


@pytest.mark.parametrize("file", ["a.csv", "a.parquet"])
def test_an_index_of_dates_without_a_name_is_the_time(tmp_path, file):
    hours = pd.date_range("2024-03-31", periods=600, freq="h")
    frame = TABLE.drop(columns="time").set_index(hours)
    frame.to_csv(tmp_path / file) if file == "a.csv" else frame.to_parquet(tmp_path / file)

    dataset, _ = new_experiment(tmp_path / file)

    stored = build(tmp_path, dataset | {"name": "case"})
    assert [(axis.name, axis.unit) for axis in stored.schema.axes] == [("time", "s")]
    assert [c.name for c in stored.schema.channels] == ["flux"]
    assert np.diff(stored.raw(0)[0][:, 0]).tolist() == [3600.0] * 9


@pytest.mark.parametrize("file", ["a.csv", "a.parquet"])
def test_a_column_of_nothing_is_left_out_and_said(tmp_path, file):
    late = np.where(np.arange(12_000) < 11_000, np.nan, 1.5)
    frame = pd.concat([TABLE] * 20, ignore_index=True).assign(empty=np.nan, late=late)
    frame["object_id"] += 60 * (np.arange(12_000) // 600)
    if file == "a.csv":
        frame.to_csv(tmp_path / file, index=False)
    else:
        frame.to_parquet(tmp_path / file)

    dataset, output = new_experiment(tmp_path / file)

    channels = [column["column"] for column in dataset["source"]["columns"]["channels"]]
    assert channels == ["flux", "late"] and "not used: nothing in 'empty'" in output
