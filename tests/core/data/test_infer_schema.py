"""What somebody's files are taken for, and what is refused with words that help."""

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from roma_core.data.infer_schema import Roles, guess_source
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
    guess = guess_source([long_table], Roles())

    columns = guess.source["columns"]
    assert guess.source["kind"] == "table"
    assert columns["object"] == "star_id"
    assert columns["axes"] == [{"column": "mjd"}, {"column": "band", "categories": ["g", "r"]}]
    assert columns["channels"] == [{"column": "flux"}, {"column": "flux_err"}]
    assert columns["facts"] == {"label": "class"}
    source = source_config(guess.source).open(tmp_path)
    assert source.classes == ("a", "b")
    assert sum(len(series.values) for series in source.read()) == len(ROWS)


def test_columns_that_are_named_win(long_table):
    roles = Roles(channels=("flux",), axes=("band",), label="band")

    guess = guess_source([long_table], roles)

    assert guess.source["columns"]["channels"] == [{"column": "flux"}]
    assert guess.source["columns"]["facts"] == {"label": "band"}
    assert any("not used: flux_err, class" in line for line in guess.said)


def test_facts_may_stand_in_a_second_table(tmp_path):
    table, objects = tmp_path / "rows.parquet", tmp_path / "objects.csv"
    pq.write_table(pa.table({"id": [1, 1, 2], "t": [0.0, 1.0, 0.0], "v": [1.0, 2.0, 3.0]}), table)
    objects.write_text("id,label\n1,a\n2,b\n")

    guess = guess_source([table], Roles(), objects)

    assert guess.source["objects"] == {"file": str(objects), "object": "id"}
    assert source_config(guess.source).open(tmp_path).classes == ("a", "b")


def test_lists_are_a_row_per_series(tmp_path):
    path = tmp_path / "rows.parquet"
    lists = {"time": [[0.0, 1.0], [0.0]], "flux": [[1.0, 2.0], [3.0]]}
    pq.write_table(pa.table({"id": ["a", "b"], **lists, "label": ["x", "y"]}), path)

    guess = guess_source([path], Roles())

    assert guess.source["kind"] == "parquet"
    assert guess.source["axes"] == [{"column": "time"}]
    assert guess.source["channels"] == [{"column": "flux"}]


def test_a_pair_of_ts_files_keeps_its_split_and_half_a_pair_loses_it(tmp_path):
    train, test = tmp_path / "W_TRAIN.ts", tmp_path / "W_TEST.ts"
    for path in (train, test):
        path.write_text("@classLabel true a b\n@data\n1,2:a\n3,4:b\n")

    both = guess_source([test, train], Roles()).source["files"]
    half = guess_source([train], Roles()).source["files"]

    assert [file["split"] for file in both] == ["train", "test"]
    assert "split" not in half[0]


def test_arrays_and_pictures(tmp_path):
    arrays, pictures = tmp_path / "a.npz", tmp_path / "pictures"
    np.savez(arrays, values=np.zeros((4, 5, 2)), positions=np.arange(5.0), labels=[0, 1, 0, 1])
    for name in "xy":
        (pictures / name).mkdir(parents=True)
        Image.fromarray(np.zeros((28, 28), np.uint8)).save(pictures / name / "0.png")

    guess = guess_source([arrays], Roles())
    assert len(guess.source["channels"]) == 2
    assert len(guess.source["axes"]) == 1
    guess = guess_source([pictures], Roles())
    assert (guess.source["patch"], guess.source["colours"]) == (2, "grey")


@pytest.mark.parametrize(
    ("name", "content", "roles", "told"),
    [
        ("a.csv", "id;time;v\n1;2;3\n", Roles(), "divide its columns by something else"),
        ("a.csv", "thing,time,v\n1,2,3\n", Roles(), "--object COLUMN"),
        ("a.csv", "id,when,v\n1,2,3\n", Roles(), "--time COLUMN"),
        ("a.csv", "id,time\n1,2\n", Roles(), "--channel COLUMN"),
        ("a.csv", "id,time,v\n1,2,3\n", Roles(label="klass"), "there is no such column"),
        ("a.csv", "id,time,v\n1,2,3\n", Roles(channels=("w",)), "no column 'w'"),
        ("a.dat", "1 2 3\n", Roles(), "cannot tell what a.dat"),
    ],
)
def test_what_cannot_be_guessed_is_asked_for(tmp_path, name, content, roles, told):
    path = tmp_path / name
    path.write_text(content)

    with pytest.raises(DataError, match=told):
        guess_source([path], roles)


def test_free_text_is_no_position(tmp_path):
    path = tmp_path / "a.csv"
    rows = "".join(f"{k % 3},{k},note {k},1.5\n" for k in range(200))
    path.write_text("id,time,note,v\n" + rows)

    with pytest.raises(DataError, match="more than 64 words"):
        guess_source([path], Roles())
