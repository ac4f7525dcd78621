"""CSV and Parquet files: dialects, dates, and errors that name file, column and row."""

import gzip
import os
import time

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from roma_core.data import DataError
from roma_core.sources.base import source_config
from tests.core.sources.hand_made_tables import COLUMNS, SHORT, as_lists, long_table, opened


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo"])
@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2024-03-31T00:30:00Z", 1711845000),
        ("2024-03-31T00:30:00.25+02:00", 1711837800.25),
        ("2024-03-31 00:30:00", 1711845000),
        ("2024-03-31", 1711843200),
    ],
)
def test_dates_in_csv_are_read_as_in_parquet_wherever_the_computer_stands(
    tmp_path, monkeypatch, zone, text, seconds
):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    (tmp_path / "a.csv").write_text(f"star,t,v\nx,{text},1\n")
    columns = {"object": "star", "axes": [{"column": "t"}], "channels": [{"column": "v"}]}
    values = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": columns}

    (series,) = source_config(values).open(tmp_path).read()

    assert series.positions.tolist() == [[seconds]]
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("id;t;v\na;1;2,5\nb;2;-3,25e2\n", [2.5, -325]),
        ("id\tt\tv\na\t1\t2.5\nb\t2\t3\n", [2.5, 3]),
        ("\ufeff# made by hand\n\nid|t|v\n\na|1|2.5\n\nb|2|3\n", [2.5, 3]),
        ('"id", t, v\n"a, 1", 1, 2.5\nb, 2, "3"\n', [2.5, 3]),
        ("id,t,v\r\na,1,?\r\nNA,2,3", [np.nan, 3]),
    ],
)
def test_the_dialects_of_csv_that_are_read(tmp_path, text, values):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8", newline="")
    config = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": SHORT}

    found = list(source_config(config).open(tmp_path).read())

    np.testing.assert_equal([s.values.item() for s in found], values)
    assert [s.positions.item() for s in found] == [1, 2]
    assert [s.id for s in found] in (["a", "b"], ["a, 1", "b"], ["a", "NA"])


def test_names_that_differ_in_case_alone_and_paths_with_brackets(tmp_path):
    table = pa.table({"id": ["a"], "T": [5.0], "t": [1.0], "V": [7.0], "v": [2.0]})
    for name in ("a[1].parquet", "b[1].csv"):
        pq.write_table(table, tmp_path / name) if "parquet" in name else csv.write_csv(
            table, tmp_path / name
        )
        config = {"kind": "table", "files": [str(tmp_path / name.replace("[", "[[]"))]}

        (series,) = source_config(config | {"columns": SHORT}).open(tmp_path).read()

        assert (series.positions.item(), series.values.item()) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"flux": ["1", "x", "2", "3", "4"]},
            "'flux' holds text .first '[1-4x]'., expected numbers",
        ),
        (
            {"band": list("grxgr")},
            r"stars\.parquet: column 'band' holds 'x', which is not among its",
        ),
        (
            {"band": ["g", None, "g", "r", "r"]},
            "column 'band' holds nothing, which is not among its",
        ),
        (
            {"star": ["a", None, "b", "b", "b"]},
            r"stars\.parquet: column 'star' has an empty id, at first in row 2 of the data",
        ),
        ({"kind": ["nova", "dwarf"] * 2 + ["nova"]}, "'a' has 'dwarf' and 'nova' in column 'kind'"),
        ({"kind": [None] * 5}, "object 'a' has nothing in column 'kind'"),
        ({"flux": [[1.0]] * 5}, "'flux' holds list"),
    ],
)
def test_what_a_column_should_not_hold_is_shown(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        list(opened(tmp_path, long_table(**changes)).read())


def test_a_csv_file_with_a_word_among_numbers_is_refused(tmp_path):
    path = tmp_path / "stars.csv"
    csv.write_csv(long_table(), path)
    path.write_text(path.read_text().replace("0.25", "low"))
    values = {"kind": "table", "files": [str(path)], "columns": COLUMNS}

    with pytest.raises(
        DataError, match=r"stars\.csv: column 'flux' holds 'low' in row 2, expected numbers"
    ):
        list(source_config(values).open(tmp_path).read())


@pytest.mark.parametrize("name", ["stars.parquet", "stars.csv"])
def test_a_missing_column_names_those_there_are(tmp_path, name):
    with pytest.raises(DataError, match=r"has no column 'star'; it has \['object', 't'"):
        opened(tmp_path, long_table().rename_columns({"star": "object"}), name)


def test_a_truncated_parquet_file_is_refused(tmp_path):
    opened(tmp_path, long_table())
    path = tmp_path / "stars.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    values = {"kind": "table", "files": [str(path)], "columns": COLUMNS}

    with pytest.raises(DataError, match=r"stars\.parquet cannot be read"):
        source_config(values).open(tmp_path)


def test_a_compressed_csv_file_is_read(tmp_path):
    csv.write_csv(long_table(), tmp_path / "stars.csv")
    (tmp_path / "stars.csv.gz").write_bytes(gzip.compress((tmp_path / "stars.csv").read_bytes()))
    values = {"kind": "table", "files": [str(tmp_path / "stars.csv.gz")], "columns": COLUMNS}

    assert len(list(source_config(values).open(tmp_path).read())) == 2


def test_no_file_and_another_ending_are_refused(tmp_path):
    values = {"kind": "table", "files": [str(tmp_path / "*.parquet")], "columns": COLUMNS}
    with pytest.raises(DataError, match="there is no file"):
        source_config(values).open(tmp_path)
    (tmp_path / "a.xls").touch()
    with pytest.raises(DataError, match=r"expected a \.parquet or \.csv file"):
        source_config({**values, "files": [str(tmp_path / "a.xls")]}).open(tmp_path)


def test_an_error_far_into_a_file_names_it(tmp_path):
    n = 300_000
    columns = {"id": np.arange(n) // 9, "t": np.arange(float(n)), "v": np.arange(float(n))}
    band = np.full(n, "g")
    band[-1] = "z"
    pq.write_table(pa.table({**columns, "band": band}), tmp_path / "a.parquet")
    axes = [{"column": "t"}, {"column": "band", "categories": ["g"]}]
    config = {
        "kind": "table",
        "files": [str(tmp_path / "a.parquet")],
        "columns": {**SHORT, "axes": axes},
    }

    with pytest.raises(DataError, match=r"^\S*a\.parquet: column 'band' holds 'z', .*append"):
        list(source_config(config).open(tmp_path).read())
    path = tmp_path / "a.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 3 + 5000] = os.urandom(5000)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(source_config(config).open(tmp_path).read())


def test_a_doubled_column_is_refused_and_endings_may_be_upper_case(tmp_path):
    assert as_lists(opened(tmp_path, long_table(), "STARS.CSV"))
    path = tmp_path / "STARS.CSV"
    path.write_text(path.read_text().replace("ignored", "flux", 1))
    values = {"kind": "table", "files": [str(path)], "columns": COLUMNS}
    with pytest.raises(DataError, match="more than one column 'flux'"):
        as_lists(source_config(values).open(tmp_path / "cache"))
