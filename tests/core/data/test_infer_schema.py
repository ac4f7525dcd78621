"""The source settings inferred from files, and the errors where none can be."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from roma_core.data.infer_schema import ColumnRoles, infer_source
from roma_core.schema import DataError
from roma_core.sources.base import source_config

COLUMNS = ["star_id", "mjd", "band", "flux", "flux_err", "class"]
ROWS = [(f"s{k % 6}", 59000.5 + k, "gr"[k % 2], 0.5 * k, 0.1, "ab"[k % 6 % 2]) for k in range(24)]


@pytest.fixture(params=["long.csv", "long.parquet"])
def long_table(request, tmp_path):
    path = tmp_path / request.param
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *ROWS])
    else:
        columns = zip(*ROWS, strict=True)
        pq.write_table(pa.table(dict(zip(COLUMNS, map(list, columns), strict=True))), path)
    return path


def test_a_long_table_is_understood_and_can_be_opened(long_table, tmp_path):
    inferred = infer_source([long_table], ColumnRoles())

    columns = inferred.config["columns"]
    assert inferred.config["kind"] == "table"
    assert columns["object"] == "star_id"
    assert columns["axes"] == [{"column": "mjd"}, {"column": "band", "categories": ["g", "r"]}]
    assert columns["channels"] == [{"column": "flux"}, {"column": "flux_err"}]
    assert columns["metadata"] == {"label": "class"}
    source = source_config(inferred.config).open(tmp_path)
    assert source.classes == ("a", "b")
    assert sum(len(series.values) for series in source.read()) == len(ROWS)


def test_columns_that_are_named_win(long_table):
    roles = ColumnRoles(channels=("flux",), axes=("band",), label="band")

    inferred = infer_source([long_table], roles)

    assert inferred.config["columns"]["channels"] == [{"column": "flux"}]
    assert inferred.config["columns"]["metadata"] == {"label": "band"}
    assert "not used: flux_err" in inferred.notes
    assert (
        "class never changes within an object, and may give the label away" in inferred.warnings[0]
    )


def test_facts_may_stand_in_a_second_table(tmp_path):
    table, objects = tmp_path / "rows.parquet", tmp_path / "objects.csv"
    pq.write_table(pa.table({"id": [1, 1, 2], "t": [0.0, 1.0, 0.0], "v": [1.0, 2.0, 3.0]}), table)
    objects.write_text("id,label\n1,a\n2,b\n")

    inferred = infer_source([table], ColumnRoles(), objects)

    assert inferred.config["objects"] == {"file": str(objects), "object": "id"}
    assert source_config(inferred.config).open(tmp_path).classes == ("a", "b")


def test_lists_are_a_row_per_series(tmp_path):
    path = tmp_path / "rows.parquet"
    lists = {"time": [[0.0, 1.0], [0.0]], "flux": [[1.0, 2.0], [3.0]]}
    pq.write_table(pa.table({"id": ["a", "b"], **lists, "label": ["x", "y"]}), path)

    inferred = infer_source([path], ColumnRoles())

    assert inferred.config["kind"] == "parquet"
    assert inferred.config["axes"] == [{"column": "time"}]
    assert inferred.config["channels"] == [{"column": "flux"}]


def test_a_pair_of_ts_files_keeps_its_split_and_half_a_pair_loses_it(tmp_path):
    train, test = tmp_path / "W_TRAIN.ts", tmp_path / "W_TEST.ts"
    for path in (train, test):
        path.write_text("@classLabel true a b\n@data\n1,2:a\n3,4:b\n")

    both = infer_source([test, train], ColumnRoles()).config["files"]
    half = infer_source([train], ColumnRoles()).config["files"]

    assert [file["split"] for file in both] == ["train", "test"]
    assert "split" not in half[0]


def test_arrays_and_pictures(tmp_path):
    arrays, pictures = tmp_path / "a.npz", tmp_path / "pictures"
    np.savez(arrays, values=np.zeros((4, 5, 2)), positions=np.arange(5.0), labels=[0, 1, 0, 1])
    for name in "xy":
        (pictures / name).mkdir(parents=True)
        Image.fromarray(np.zeros((28, 28), np.uint8)).save(pictures / name / "0.png")

    inferred = infer_source([arrays], ColumnRoles())
    assert len(inferred.config["channels"]) == 2
    assert len(inferred.config["axes"]) == 1
    inferred = infer_source([pictures], ColumnRoles())
    assert (inferred.config["patch"], inferred.config["colours"]) == (2, "grey")
    for path, roles in ((arrays, {"group": "g"}), (pictures, {"label": "x"})):
        with pytest.raises(
            DataError, match=f"{path.name} has no columns, so leave out the options"
        ):
            infer_source([path], ColumnRoles(**roles))


@pytest.mark.parametrize(
    ("name", "content", "roles", "message"),
    [
        ("a.csv", "id:time:v\n1:2:3\n", ColumnRoles(), "its only column is 'id:time:v'; expected"),
        ("a.csv", "thing,time,v\n1,2,3\n", ColumnRoles(), "--object COLUMN"),
        ("a.csv", "id,when,v\n1,2,3\n", ColumnRoles(), "--time COLUMN"),
        ("a.csv", "id,time\n1,2\n", ColumnRoles(), "--channel COLUMN"),
        ("a.csv", "id,time,v\n1,2,3\n", ColumnRoles(label="klass"), "there is no such column"),
        ("a.csv", "id,time,v\n1,2,3\n", ColumnRoles(channels=("w",)), "no column 'w'"),
        ("a.dat", "1 2 3\n", ColumnRoles(), "the kind of a.dat is not known"),
    ],
)
def test_an_unknown_column_or_kind_raises(tmp_path, name, content, roles, message):
    path = tmp_path / name
    path.write_text(content)

    with pytest.raises(DataError, match=message):
        infer_source([path], roles)


def test_free_text_is_left_out_unless_it_is_named(tmp_path):
    path = tmp_path / "a.csv"
    rows = "".join(f"{k % 3},{k},note {k},{k % 7}.5\n" for k in range(200))
    path.write_text("id,time,note,v\n" + rows)

    inferred = infer_source([path], ColumnRoles())

    assert inferred.config["columns"]["axes"] == [{"column": "time"}]
    assert "note holds 65 different words or more, too many" in inferred.warnings[0]
    with pytest.raises(DataError, match="more than 64 words"):
        infer_source([path], ColumnRoles(axes=("note",)))


@pytest.mark.parametrize(
    ("text", "axis", "channels"),
    [
        (",id,time,v\n0,a,1,2\n1,a,2,3\n", "time", ["v"]),  # as pandas writes an index
        ("id;time;v\na;1;2,5\nb;2;3\n", "time", ["v"]),
        ("# pipeline 3\nid, timestamp, v, ok\na, 2024-03-31T00:30:00Z, 2, x\n", "timestamp", ["v"]),
        ("id\ttime\tv\na\t1\t?\na\t2\t3\n", "time", ["v"]),
    ],
)
def test_csv_dialects(tmp_path, text, axis, channels):
    (tmp_path / "a.csv").write_text(text)

    inferred = infer_source([tmp_path / "a.csv"], ColumnRoles())

    columns = inferred.config["columns"]
    assert columns["object"] == "id" and columns["axes"][0] == {"column": axis}
    assert [channel["column"] for channel in columns["channels"]] == channels
    assert list(source_config(inferred.config).open(tmp_path).read())
    assert (text[0] == ",") == ("not used: row numbers in ''" in inferred.notes)


def test_the_index_of_pandas_in_parquet_is_left_out(tmp_path):
    columns = {"id": [1, 2], "time": [0.0, 1.0], "v": [1.0, 2.0], "__index_level_0__": [0, 1]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    inferred = infer_source([tmp_path / "a.parquet"], ColumnRoles())

    assert inferred.config["columns"]["channels"] == [{"column": "v"}]
    assert "not used: row numbers in '__index_level_0__'" in inferred.notes
