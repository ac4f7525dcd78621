"""Series from Parquet files with one row per series: a list column per axis and per channel.

    id    time           flux           label
    a     [0.0, 1.5, 4]  [3.1, 3.0, 2]  "Ia"

It is what ``roma data export`` writes and what ``roma predict`` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.schema import DataError
from roma_core.sources.base import RawSeries, SourceConfig
from roma_core.sources.columns import (
    AxisColumn,
    ChannelColumn,
    batches,
    found_files,
    numbers,
    positions_of,
    text,
    words,
)
from roma_core.sources.facts import FactColumns, classes_of, facts_of


class ParquetConfig(SourceConfig):
    """Parquet files on this computer, a row per series."""

    kind: Literal["parquet"] = "parquet"
    files: tuple[Path, ...] = Field(
        min_length=1, description="Parquet files, or patterns such as data/*.parquet."
    )
    id: str = Field("id", description="Column of the series' id.")
    axes: tuple[AxisColumn, ...] = Field(min_length=1, description="List columns of positions.")
    channels: tuple[ChannelColumn, ...] = Field(min_length=1, description="List columns of values.")
    targets: tuple[ChannelColumn, ...] = Field(
        (), description="List columns of numbers that a model may be trained to tell."
    )
    facts: FactColumns = FactColumns()
    series_at_once: int = Field(
        256, gt=0, description="Series held in memory at a time; does not change the result."
    )

    def open(self, cache: Path) -> ParquetSource:
        return ParquetSource(self, found_files(self.files))


class ParquetSource:
    """The rows of Parquet files, in file order."""

    def __init__(self, config: ParquetConfig, files: Mapping[Path, str]) -> None:
        import pyarrow.parquet as pq

        self.config = config
        self.files = {path.name: sha256 for path, sha256 in files.items()}
        self.citation, self.licence = config.citation, config.licence
        self.channels = tuple(column.channel() for column in config.channels)
        self.axes = tuple(column.axis() for column in config.axes)
        self.targets = tuple(column.channel() for column in config.targets)
        self._lists = [
            column.column for column in (*config.axes, *config.channels, *config.targets)
        ]
        self._paths = tuple(files)
        labels: set[str] = set()
        if config.facts.label is not None:
            for path in self._paths:
                for batch in batches(path, [config.facts.label], [], 1 << 16):
                    labels.update(filter(None, words(batch.column(0).unique())))
        self.classes = classes_of(sorted(labels), config.facts)
        for path in self._paths:  # a file without one of the columns is refused before any is read
            next(batches(path, self._names(), [], 1), None)
        self._n_series = sum(pq.read_metadata(path).num_rows for path in self._paths)

    def __length_hint__(self) -> int:
        return self._n_series

    def _names(self) -> list[str]:
        config = self.config
        return list(dict.fromkeys([config.id, *self._lists, *config.facts.columns()]))

    def read(self) -> Iterator[RawSeries]:
        """Every row.

        Raises:
            DataError: lists of one row differ in length, or a column holds what it should not.
        """
        for path in self._paths:
            for batch in batches(path, self._names(), [], self.config.series_at_once):
                yield from self._rows(batch, str(path))

    def _rows(self, batch: Any, where: str) -> Iterator[RawSeries]:
        config = self.config
        ids = text(batch.column(config.id)).to_pylist()
        lists = {name: _flat(batch.column(name), name, where) for name in self._lists}
        first = config.axes[0].column
        offsets = lists[first][1]
        for name, (_, other) in lists.items():
            if not np.array_equal(np.diff(offsets), np.diff(other)):
                row = int(np.flatnonzero(np.diff(offsets) != np.diff(other))[0])
                raise DataError(
                    f"{where}: series {ids[row]!r} has {np.diff(offsets)[row]} numbers in "
                    f"{first!r} and {np.diff(other)[row]} in {name!r}; one per observation in each"
                )
        positions = np.stack(
            [positions_of(lists[a.column][0], a, where).astype(np.float64) for a in config.axes],
            axis=1,
        )

        def float32(columns: tuple[ChannelColumn, ...]) -> NDArray[np.float32]:
            with np.errstate(over="ignore"):
                each = [
                    numbers(lists[c.column][0], c.column, where).astype(np.float32) for c in columns
                ]
            return np.stack(each, axis=1)

        values = float32(config.channels)
        targets = float32(config.targets) if config.targets else None
        columns = [words(batch.column(name)) for name in config.facts.columns()]
        for row, name in enumerate(ids):
            known = facts_of(
                [column[row] for column in columns], config.facts, f"{where}: series {name!r}"
            )
            a, b = offsets[row], offsets[row + 1]
            yield RawSeries(
                id=name or "",
                positions=positions[a:b],
                values=values[a:b],
                targets=None if targets is None else targets[a:b],
                label=known.label,
                group=known.group,
                recorded_split=known.split,
            )


def _flat(column: Any, name: str, where: str) -> tuple[Any, NDArray[np.int64]]:
    """A list column as its numbers, one after the other, and the offsets of its rows in them."""
    import pyarrow as pa

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise DataError(
            f"{where}: column {name!r} holds {column.type}, expected a list of numbers per series; "
            f"for one row per observation use a source of kind 'table'"
        )
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return column.flatten(), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
