"""Small tables of stars that tests write and open."""

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from roma_core.sources.base import source_config

COLUMNS = {
    "object": "star",
    "axes": [{"column": "t", "unit": "d"}, {"column": "band", "categories": ["g", "r"]}],
    "channels": [{"column": "flux", "unit": "mJy"}, {"column": "err", "unit": "mJy"}],
    "metadata": {"label": "kind", "group": "field"},
}

SHORT = {"object": "id", "axes": [{"column": "t"}], "channels": [{"column": "v"}]}


def long_table(ids=("a", "a", "b", "b", "b"), **changes):
    n = len(ids)
    columns = {
        "star": list(ids),
        "t": [float(k) for k in range(n)],
        "band": ["gr"[k % 2] for k in range(n)],
        "flux": [k / 4 for k in range(n)],
        "err": [0.5] * n,
        "kind": ["nova" if name == "a" else "dwarf" for name in ids],
        "field": [f"f-{name}" for name in ids],
        "ignored": [None] * n,
    }
    return pa.table({**columns, **changes})


def opened(folder, table, name="stars.parquet", columns=COLUMNS, **options):
    path = folder / name
    pq.write_table(table, path) if name.endswith("parquet") else csv.write_csv(table, path)
    values = {"kind": "table", "files": [str(path)], "columns": columns, **options}
    return source_config(values).open(folder / "cache")


def as_lists(source):
    return [
        (s.id, s.label, s.group, s.positions.tolist(), s.values.tolist()) for s in source.read()
    ]
