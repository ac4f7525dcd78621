"""Ids that are whole numbers in one file and text, floating point or bytes in the next."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cases.commands import build, error_of

COLUMNS = {
    "object": "object_id",
    "axes": [{"column": "mjd", "unit": "d"}],
    "channels": [{"column": "flux", "unit": "mJy"}],
    "metadata": {"label": "label"},
}


def night(path, ids, start, kind):
    """Five observations of every id, which is stored as the kind says."""
    ids = np.repeat(ids, 5)
    table = pa.table(
        {
            "object_id": ids,
            "mjd": start + np.tile(np.arange(5.0), len(ids) // 5),
            "flux": np.random.default_rng(0).normal(size=len(ids)),
            "label": np.where(ids % 2, "odd", "even"),
        }
    )
    if kind.startswith("csv"):
        frame = table.to_pandas()
        frame.astype({"object_id": float if kind == "csv of floats" else int}).to_csv(path)
        return
    words = [f" {i} " if kind == "padded" else str(i) for i in ids]
    column = {
        "string": pa.array(words),
        "padded": pa.array(words),
        "binary": pa.array([word.encode() for word in words]),
        "dictionary": pa.array(words).dictionary_encode(),
        "decimal": table["object_id"].cast(pa.decimal128(20, 0)),
        "text of floats": pa.array([f"{i}.0" for i in ids]),
    }.get(kind)
    column = table["object_id"].cast(kind) if column is None else column
    pq.write_table(table.set_column(0, "object_id", column), path)


@pytest.mark.parametrize(
    "kind",
    [
        *["int32", "uint64", "float", "double", "string", "large_string", "padded", "binary"],
        *["dictionary", "decimal", "text of floats", "csv", "csv of floats"],
    ],
)
def test_the_text_of_the_id_decides(tmp_path, kind):
    ending = "csv" if kind.startswith("csv") else "parquet"
    night(tmp_path / "a.parquet", np.arange(20), 0.0, "int64")
    night(tmp_path / f"b.{ending}", np.arange(10, 30), 100.0, kind)
    files = [str(tmp_path / "a.parquet"), str(tmp_path / f"b.{ending}")]
    source = {"kind": "table", "files": files, "columns": COLUMNS}

    dataset = build(tmp_path, {"name": "x", "source": source})

    assert dataset.ids == [str(i) for i in range(30)]
    assert dataset.lengths.tolist() == [5] * 10 + [10] * 10 + [5] * 10


@pytest.mark.parametrize("kind", ["int32", "double", "string", "csv of floats"])
def test_the_table_of_objects_may_have_another_type_too(tmp_path, kind):
    ending = "csv" if kind.startswith("csv") else "parquet"
    night(tmp_path / "rows.parquet", np.arange(20), 0.0, "int64")
    night(tmp_path / f"objects.{ending}", np.arange(20), 0.0, kind)
    if ending == "csv":
        frame = pd.read_csv(tmp_path / "objects.csv").iloc[::5]
        frame.to_csv(tmp_path / "objects.csv", index=False)
    else:
        table = pq.read_table(tmp_path / "objects.parquet")
        pq.write_table(table.take(list(range(0, 100, 5))), tmp_path / "objects.parquet")
    source = {"kind": "table", "files": [str(tmp_path / "rows.parquet")], "columns": COLUMNS}
    source["objects"] = {"file": str(tmp_path / f"objects.{ending}"), "object": "object_id"}

    dataset = build(tmp_path, {"name": "x", "source": source})

    assert [dataset.schema.classes[k] for k in dataset.labels] == ["even", "odd"] * 10


def test_labels_of_floats_are_whole_numbers(tmp_path):
    lines = "".join(f"{i},{k},1.{k},{i % 2}.0\n" for i in range(20) for k in range(5))
    (tmp_path / "a.csv").write_text("object_id,mjd,flux,label\n" + lines)
    source = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": COLUMNS}

    assert build(tmp_path, {"name": "x", "source": source}).schema.classes == ("0", "1")


@pytest.mark.parametrize(
    ("file", "ids", "message"),
    [
        (
            "a.parquet",
            [2.0**60, 2.0**60 + 256],  # neighbours in float64, and so other ids in between
            "column 'object_id' holds whole numbers as DOUBLE, which is exact up to 9,007,199,2",
        ),
        (
            "a.csv",
            ["1.23457E+17", "1.23458E+17"],
            "its id has lost digits, and others may have the same; write ids as text",
        ),
    ],
)
def test_ids_that_lost_their_last_digits_are_refused(tmp_path, file, ids, message):
    frame = pd.DataFrame({"object_id": ids, "mjd": 1.0, "flux": 2.0, "label": "a"})
    if file == "a.csv":
        frame.to_csv(tmp_path / file)
    else:
        frame.to_parquet(tmp_path / file)
    source = {"kind": "table", "files": [str(tmp_path / file)], "columns": COLUMNS}

    assert message in error_of(tmp_path, {"name": "x", "source": source})
