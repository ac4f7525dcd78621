"""A stored data set as one Parquet file: a row per series, a list column per axis and channel.

The numbers are those delivered, not normalised. ``sources/parquet.py`` reads the file back. The
fields of targets have the metadata ``role: target``, so that who scores the file leaves them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.schema import SPLITS, Split
from roma_core.data.store import StoredDataset
from roma_core.schema import Channel, DataError, PositionAxis

if TYPE_CHECKING:
    import pyarrow as pa

TARGET_ROLE = {b"role": b"target"}
"""Metadata of the Parquet field of a target."""

_AT_ONCE = 1 << 18  # observations in a row group, unless one series has more


def export_parquet(dataset: StoredDataset, target: Path, split: Split | None = None) -> int:
    """Write a data set, or one split of it; appears under its name when it is whole.

    Columns: ``id``, ``split``, ``label`` and ``group`` where there are any, then the axes (lists of
    double), the channels and the targets (lists of float).

    Returns:
        The number of series written.

    Raises:
        DataError: an axis, channel or target has the name of another column.
    """
    import pyarrow.parquet as pq

    schema = _schema(dataset)
    aside = target.with_name(f".{target.name}.part")
    n = 0
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for rows in _groups(dataset, split):
                writer.write_table(_table(dataset, rows, schema))
                n += len(rows)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return n


def _groups(dataset: StoredDataset, split: Split | None) -> Iterator[np.ndarray[Any, Any]]:
    """Consecutive rows of the split, cut so that each part has about as many observations."""
    chosen = np.arange(len(dataset)) if split is None else dataset.split(split).indices
    parts = np.cumsum(dataset.lengths[chosen]) // _AT_ONCE
    yield from np.split(chosen, np.flatnonzero(np.diff(parts)) + 1) if len(chosen) else []


def _schema(dataset: StoredDataset) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field("id", pa.string()), pa.field("split", pa.string())]
    fields += [pa.field("label", pa.string())] if dataset.labels is not None else []
    fields += [pa.field("group", pa.string())] if dataset.groups is not None else []
    schema = dataset.schema
    fields += [_list_field(axis.name, pa.float64(), axis.unit) for axis in schema.axes]
    fields += [_list_field(c.name, pa.float32(), c.unit) for c in schema.channels]
    fields += [_list_field(t.name, pa.float32(), t.unit, TARGET_ROLE) for t in schema.targets]
    names = [field.name for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"two columns would be called {twice[0]!r}; rename the channel, axis or target"
        )
    return pa.schema(fields)


def _list_field(
    name: str, kind: pa.DataType, unit: str, role: Mapping[bytes, bytes] | None = None
) -> pa.Field:
    import pyarrow as pa

    return pa.field(name, pa.list_(kind), metadata={b"unit": unit.encode(), **(role or {})})


def _table(dataset: StoredDataset, rows: np.ndarray[Any, Any], schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    raw = [dataset.raw(int(i)) for i in rows]
    targets = [found for i in rows if (found := dataset.targets(int(i))) is not None]
    offsets = np.concatenate([[0], np.cumsum(dataset.lengths[rows])]).astype(np.int32)
    columns: dict[str, Any] = {
        "id": [dataset.ids[i] for i in rows],
        "split": [SPLITS[k] for k in dataset.splits[rows]],
    }
    if dataset.labels is not None:
        columns["label"] = [dataset.schema.classes[k] for k in dataset.labels[rows]]
    if dataset.groups is not None:
        columns["group"] = [dataset.groups[i] for i in rows]
    described = dataset.schema
    parts: list[tuple[Sequence[PositionAxis | Channel], list[NDArray[Any]]]] = [
        (described.axes, [positions for positions, _ in raw]),
        (described.channels, [values for _, values in raw]),
        (described.targets, targets),
    ]
    for those, each in parts:
        if not those:
            continue
        numbers = np.concatenate(each)  # (n, D), (n, C) or (n, K)
        for k, part in enumerate(those):
            column = pa.array(np.ascontiguousarray(numbers[:, k]))
            columns[part.name] = pa.ListArray.from_arrays(offsets, column)
    return pa.table(columns, schema=schema)
