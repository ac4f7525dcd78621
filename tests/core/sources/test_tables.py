"""Tables as sources: long and one row per series, sorted and not, and what is refused in them."""

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core.data import DataError, DatasetConfig, StoredDataset, build_dataset
from roma_core.sources import tables
from roma_core.sources.base import source_config
from tests.core.sources.hand_made_tables import COLUMNS, SHORT, as_lists, long_table, opened


@pytest.mark.parametrize("name", ["stars.parquet", "stars.csv"])
def test_a_long_table_is_read_as_it_stands(tmp_path, name):
    source = opened(tmp_path, long_table(), name)

    first, second = source.read()

    assert (first.id, first.label, first.group) == ("a", "nova", "f-a")
    assert first.positions.tolist() == [[0, 0], [1, 1]] and first.positions.dtype == np.float64
    assert first.values.tolist() == [[0, 0.5], [0.25, 0.5]] and first.values.dtype == np.float32
    assert (second.id, len(second.values)) == ("b", 3)
    assert source.classes == ("dwarf", "nova")
    assert [(a.name, a.unit) for a in source.axes] == [("t", "d"), ("band", "index of g, r")]
    assert source.is_sorted and source.__length_hint__() == 2
    assert list(source.files) == [name]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=40), at_once=st.integers(1, 9)
)
@pytest.mark.parametrize("as_numbers", [False, True])
def test_any_order_of_rows_gives_the_same_series(tmp_path_factory, rows, at_once, as_numbers):
    folder = tmp_path_factory.mktemp("rows")
    ids = [ord(r) for r in rows] if as_numbers else rows
    table = long_table(rows).set_column(0, "star", pa.array(ids))

    source = opened(folder, table)
    found = as_lists(source)
    start = min(at_once, len(found))
    assert [(s.id, s.positions[:, 0].tolist()) for s in source.read_from(start)] == [
        (name, [p[0] for p in positions]) for name, *_, positions, _ in found[start:]
    ]
    del source

    places = {r: [k for k, other in enumerate(rows) if other == r] for r in dict.fromkeys(rows)}
    assert [name for name, *_ in found] == [
        str(ord(r)) if as_numbers else r for r in places
    ]  # in the order of first appearance
    for (*_, positions, values), rows_of in zip(found, places.values(), strict=True):
        assert [p[0] for p in positions] == rows_of
        assert [v[0] for v in values] == [k / 4 for k in rows_of]
    assert not list((folder / "cache").glob("roma-sort-*"))


def test_several_files_are_one_table_and_an_object_may_go_on_in_the_next(tmp_path):
    pq.write_table(long_table(("a", "b")), tmp_path / "1.parquet")
    pq.write_table(long_table(("b", "c")), tmp_path / "2.parquet")
    values = {"kind": "table", "files": [str(tmp_path / "*.parquet")], "columns": COLUMNS}

    source = source_config(values).open(tmp_path)

    assert source.is_sorted
    assert [(s.id, len(s.values)) for s in source.read()] == [("a", 1), ("b", 2), ("c", 1)]


def test_facts_may_stand_in_a_table_of_objects(tmp_path):
    (tmp_path / "objects.csv").write_text("name,kind,field\n b,dwarf,f2\na , nova,f1\n")
    objects = {"file": tmp_path / "objects.csv", "object": "name"}

    source = opened(tmp_path, long_table(), objects=objects)

    assert [(s.id, s.label, s.group) for s in source.read()] == [
        ("a", "nova", "f1"),
        ("b", "dwarf", "f2"),
    ]
    (tmp_path / "objects.csv").write_text("name,kind,field\na,nova,f1\n")
    with pytest.raises(DataError, match="object 'b' has observations but no row"):
        list(opened(tmp_path, long_table(), objects=objects).read())
    (tmp_path / "objects.csv").write_text("name,kind,field\na,nova,f1\na,dwarf,f1\n")
    with pytest.raises(DataError, match="the object 'a' has two rows"):
        opened(tmp_path, long_table(), objects=objects)


@pytest.mark.parametrize(("unit", "gap"), [(None, 86400), ("s", 86400), ("h", 24), ("d", 1)])
def test_dates_are_converted_to_the_unit_of_the_axis(tmp_path, unit, gap):
    days = pa.array(np.array(["2026-01-01", "2026-01-02"], dtype="datetime64[s]"))
    table = long_table(("a", "a")).set_column(1, "t", days)
    axis = {"column": "t"} | ({} if unit is None else {"unit": unit})

    source = opened(tmp_path, table, columns={**COLUMNS, "axes": [axis]})

    (series,) = source.read()
    assert np.diff(series.positions[:, 0]).tolist() == [gap]
    assert source.axes[0].unit == (unit or "s")
    with pytest.raises(
        DataError, match=r"'t' holds dates, which cannot be given in 'year'; .* s, "
    ):
        opened(tmp_path, table, columns={**COLUMNS, "axes": [{"column": "t", "unit": "year"}]})


def read_short(folder, **files):
    for name, ids in files.items():
        table = pa.table(
            {"id": ids, "t": [float(k) for k in range(len(ids))], "v": [1.0] * len(ids)}
        )
        if name.startswith("csv"):
            csv.write_csv(table, folder / f"{name}.csv")
        else:
            pq.write_table(table, folder / f"{name}.parquet")
    paths = sorted(p for p in folder.iterdir() if p.is_file())
    values = {"kind": "table", "files": [str(p) for p in paths], "columns": SHORT}
    return [(s.id, len(s.values)) for s in source_config(values).open(folder / "cache").read()]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (pa.array([2**53 + 1, 2**53, 2**63 - 1], pa.int64()), [2**53 + 1, 2**53, 2**63 - 1]),
        (pa.array([-(2**63), -1, 0], pa.int64()), [-(2**63), -1, 0]),
        (pa.array([2**64 - 1, 2**63, 2**64 - 2], pa.uint64()), [2**64 - 1, 2**63, 2**64 - 2]),
        (pa.array([" a ", "0615", "1e3"]), ["a", "0615", "1e3"]),
        (pa.array(["x", "y", "x2"]).dictionary_encode(), ["x", "y", "x2"]),
        (pa.array([615.0, 1e6, 0.5]), ["615", "1000000", "0.5"]),
    ],
)
def test_ids_come_through_exactly(tmp_path, ids, expected):
    assert read_short(tmp_path, a=ids) == [(str(name), 1) for name in expected]


@pytest.mark.parametrize(
    "second",
    [
        pa.array(["10", "11"]),
        pa.array([10.0, 11.0]),
        pa.array([10, 11], pa.uint64()),
        pa.array([10, 11], pa.int32()),
    ],
)
def test_an_id_is_the_same_object_whatever_its_type_in_another_file(tmp_path, second):
    found = read_short(tmp_path, a=pa.array([9, 10], pa.int64()), b=second)

    assert found == [("9", 1), ("10", 2), ("11", 1)]


def test_ids_of_csv_and_parquet_are_those_of_one_table(tmp_path):
    assert read_short(tmp_path, a=[9, 10], csv_b=[10, 9]) == [("9", 2), ("10", 2)]


@pytest.mark.parametrize("limit_mb", [40, None])  # None: begins with 16, and takes more
def test_rows_in_any_order_that_do_not_fit_in_memory_are_sorted_on_disk(
    tmp_path, monkeypatch, limit_mb
):
    monkeypatch.setattr(tables, "_MEMORY_MB", 16)
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.repeat(np.arange(3000), 400))
    row = np.arange(len(ids), dtype=float)
    table = pa.table({"id": ids, "t": row, "v": row.astype(np.float32)})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path)
    config = {"kind": "table", "files": [str(path)], "columns": SHORT, "memory_limit_mb": limit_mb}

    source = source_config(config).open(tmp_path / "cache")
    series = source.read()
    first = next(series)

    assert list((tmp_path / "cache").glob("roma-sort-*")), "nothing was written to disk"
    found = {first.id: first.positions[:, 0], **{s.id: s.positions[:, 0] for s in series}}
    assert list(found) == list(dict.fromkeys(map(str, ids.tolist())))
    for k in (0, 1, 1500, 2999):
        assert np.array_equal(found[str(k)], np.flatnonzero(ids == k))
    del source, series
    assert not list((tmp_path / "cache").glob("roma-sort-*"))


@pytest.mark.parametrize(("threads", "of_job"), [(1, ""), (3, 1), (1, 3)])
def test_files_follow_each_other_in_order_with_any_number_of_threads(
    tmp_path, monkeypatch, threads, of_job
):
    monkeypatch.setenv("OMP_NUM_THREADS", str(of_job))
    expected, row = {}, 0
    for k in range(3):
        ids = np.repeat(np.arange(k * 200, (k + 1) * 200 + 1), 300)
        t = np.arange(row, row + len(ids), dtype=float)
        row += len(ids)
        pq.write_table(pa.table({"id": ids, "t": t, "v": t}), tmp_path / f"{k}.parquet")
        for name in np.unique(ids):
            expected.setdefault(str(name), []).extend(t[ids == name].tolist())
    config = {"kind": "table", "files": [str(tmp_path / "*.parquet")], "columns": SHORT}

    source = source_config(config | {"threads": threads}).open(tmp_path)

    assert source.is_sorted
    assert source._query("SELECT current_setting('threads')") == [(max(threads, int(of_job or 1)),)]
    assert {s.id: s.positions[:, 0].tolist() for s in source.read()} == expected
    rest = {s.id: s.positions[:, 0].tolist() for s in source.read_from(150)}
    assert rest == dict([*expected.items()][150:])


def set_of(folder, source, **options):
    config = DatasetConfig.model_validate({"name": "stars", "source": source, **options})
    return StoredDataset(build_dataset(config, folder / "sets", folder / "cache", progress=False))


@pytest.mark.filterwarnings("ignore:no series of the classes", "ignore:channel")
def test_an_exported_set_comes_back_bit_by_bit(tmp_path):
    ids = [f"étoile-{k // 9}" for k in range(270)]
    pq.write_table(long_table(ids), tmp_path / "stars.parquet")
    source = {"kind": "table", "files": [str(tmp_path / "stars.parquet")], "columns": COLUMNS}
    first = set_of(tmp_path, source)

    n = first.to_parquet(tmp_path / "out.parquet")

    back = {
        "kind": "parquet",
        "files": [str(tmp_path / "out.parquet")],
        "axes": COLUMNS["axes"],
        "channels": [{"column": "flux"}, {"column": "err"}],
        "metadata": {"label": "label", "group": "group"},
    }
    second = set_of(tmp_path, back)
    assert n == len(first) == 30
    rest = [s.id for s in source_config(back).open(tmp_path).read_from(28)]
    assert rest == second.ids[28:]
    assert second.ids == first.ids and second.groups == first.groups
    for name in ("values.npy", "positions.npy", "offsets.npy", "labels.npy", "splits.npy"):
        assert second.manifest.files[name] == first.manifest.files[name]
    assert first.to_parquet(tmp_path / "test.parquet", "test") == len(first.split("test"))
    assert {p.name for p in tmp_path.glob("*.parquet")} == {
        "stars.parquet",
        "out.parquet",
        "test.parquet",
    }


def row_table(**changes):
    columns = {"id": ["a", "b"], "t": [[0.0, 1.5], [3.0]], "flux": [[1.0, 2.0], [None]]}
    return pa.table({**columns, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t": [[0.0], [1.0]]}, "series 'a' has 1 numbers in 't' and 2 in 'flux'"),
        ({"t": [0.0, 1.0]}, "column 't' holds DOUBLE, expected a list .* kind 'table'"),
        ({"flux": [["x", "y"], ["z"]]}, "column 'flux' holds text"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, changes, message):
    pq.write_table(row_table(**changes), tmp_path / "rows.parquet")
    config = {"kind": "parquet", "files": [str(tmp_path / "rows.parquet")]}
    config |= {"axes": [{"column": "t"}], "channels": [{"column": "flux"}]}

    with pytest.raises(DataError, match=message):
        list(source_config(config).open(tmp_path).read())


def test_an_empty_cell_in_a_list_is_not_a_number(tmp_path):
    pq.write_table(row_table(t=[[0, 2], [3]]), tmp_path / "rows.parquet")
    config = {"kind": "parquet", "files": [str(tmp_path / "rows.parquet")]}
    config |= {"axes": [{"column": "t"}], "channels": [{"column": "flux"}]}

    first, second = source_config(config).open(tmp_path).read()

    assert first.positions.dtype == np.float64 and first.positions[:, 0].tolist() == [0, 2]
    assert np.isnan(second.values).all()
    with pytest.raises(DataError, match=r"series 'b' of rows.parquet has no observations"):
        set_of(tmp_path, config)


@pytest.mark.parametrize("name", ["stars.parquet", "stars.csv"])
def test_a_row_without_the_name_of_an_object_is_refused(tmp_path, name):
    with pytest.raises(DataError, match="needs one"):
        opened(tmp_path, long_table(ids=("a", "a", "", "b", "b")), name)
