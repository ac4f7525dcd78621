"""Export to one Parquet file: a row per series, a list column per axis, channel and target.

The numbers are as delivered, not normalised; the source of kind ``parquet`` reads the file back. The
fields of targets have the metadata ``role: target``, so that batch prediction ignores them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.manifest import SPLITS, Split
from roma_core.data.store import StoredDataset
from roma_core.schema import Channel, DataError, PositionAxis

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP = 1 << 18  # observations in a row group, unless one series has more


def export_parquet(dataset: StoredDataset, target: Path, split: Split | None = None) -> int:
    """Write a data set, or one split of it; returns the number of series.

    Columns: ``id``, ``split``, ``label`` and ``group`` where there are any, then the axes (lists of
    double), the channels and the targets (lists of float). The file is renamed when complete.

    Raises:
        DataError: an axis, channel or target has the name of another column.
    """
    import pyarrow.parquet as pq

    schema = _schema(dataset)
    chosen = np.arange(len(dataset)) if split is None else dataset.split(split).indices
    groups = np.cumsum(dataset.lengths[chosen]) // _ROW_GROUP
    aside = target.with_name(f".{target.name}.part")
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for rows in np.split(chosen, np.flatnonzero(np.diff(groups)) + 1):
                if len(rows):
                    writer.write_table(_table(dataset, rows, schema))
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
    return len(chosen)


def _schema(dataset: StoredDataset) -> pa.Schema:
    import pyarrow as pa

    def lists(parts: Sequence[PositionAxis | Channel], kind: Any, **role: str) -> list[pa.Field]:
        return [pa.field(p.name, pa.list_(kind), metadata={"unit": p.unit, **role}) for p in parts]

    schema = dataset.schema
    optional = {"label": dataset.labels, "group": dataset.groups}
    texts = ["id", "split", *(name for name, column in optional.items() if column is not None)]
    fields = [
        *(pa.field(name, pa.string()) for name in texts),
        *lists(schema.axes, pa.float64()),
        *lists(schema.channels, pa.float32()),
        *lists(schema.targets, pa.float32(), role="target"),
    ]
    names = [field.name for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(
            f"two columns would be called {twice[0]!r}; rename the channel, axis or target"
        )
    return pa.schema(fields)


def _table(dataset: StoredDataset, rows: NDArray[np.int64], arrow: pa.Schema) -> pa.Table:
    import pyarrow as pa

    schema = dataset.schema
    columns: dict[str, Any] = {
        "id": [dataset.ids[i] for i in rows],
        "split": [SPLITS[k] for k in dataset.splits[rows]],
    }
    if dataset.labels is not None:
        columns["label"] = [schema.classes[k] for k in dataset.labels[rows]]
    if dataset.groups is not None:
        columns["group"] = [dataset.groups[i] for i in rows]
    series: list[tuple[Any, ...]] = [(*dataset.raw(int(i)), dataset.targets(int(i))) for i in rows]
    groups: list[Sequence[PositionAxis | Channel]] = [schema.axes, schema.channels, schema.targets]
    offsets = np.concatenate([[0], np.cumsum(dataset.lengths[rows])]).astype(np.int32)
    for which, parts in enumerate(groups):
        for k, part in enumerate(parts):
            column = pa.array(np.concatenate([arrays[which][:, k] for arrays in series]))
            columns[part.name] = pa.ListArray.from_arrays(offsets, column)
    return pa.table(columns, schema=arrow)
