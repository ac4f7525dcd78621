"""Series from long tables: one row per observation, in Parquet or CSV files.

    object  time      band  flux    flux_err
    615     59750.42  2     -544.8  3.6        →  positions (time, band), values (flux, flux_err)

The object column is read once alone, which tells the objects, their sizes, and whether the rows of
an object stand together. If they do, one more pass gives the series, a bounded number of rows at a
time. If not, that pass sorts the rows into buckets on disk, each small enough for memory, and the
series come out of those. Both ways give the same series in the order of first appearance.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.errors import DataError
from roma_core.data.sources.buckets import Buckets
from roma_core.data.sources.columns import (
    AxisColumn,
    ChannelColumn,
    batches,
    facts,
    found_files,
    numbers,
    positions_of,
)
from roma_core.data.sources.facts import (
    FactColumns,
    Facts,
    ObjectTable,
    classes_of,
    facts_of,
    read_objects,
)
from roma_core.data.sources.objects import ObjectIndex, keys_of
from roma_core.data.sources.protocol import RawSeries, SourceConfig
from roma_core.files import sha256_of


class TableColumns(BaseModel):
    """Which column is what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: str = Field(description="Column of the object's id.")
    axes: tuple[AxisColumn, ...] = Field(min_length=1, description="Position axes; time first.")
    channels: tuple[ChannelColumn, ...] = Field(min_length=1, description="Values, errors.")
    facts: FactColumns = FactColumns()


class TableConfig(SourceConfig):
    """Long tables on this computer."""

    kind: Literal["table"] = "table"
    files: tuple[Path, ...] = Field(
        min_length=1, description="Parquet or CSV files, or patterns such as data/*.parquet."
    )
    columns: TableColumns
    objects: ObjectTable | None = Field(
        None, description="A table with one row per object that holds the facts."
    )
    rows_at_once: int = Field(
        1 << 19, gt=0, description="Rows held in memory at a time; does not change the result."
    )

    def open(self, cache: Path) -> TableSource:
        files = found_files(self.files)
        hashes = {path.name: sha256 for path, sha256 in files.items()}
        if self.objects is not None:
            if not self.objects.file.is_file():
                raise DataError(f"there is no file {self.objects.file} (from {Path.cwd()})")
            hashes[self.objects.file.name] = sha256_of(self.objects.file)
        return TableSource(
            tuple(files),
            self.columns,
            self.objects,
            hashes,
            cache,
            self.rows_at_once,
            self.citation,
            self.licence,
        )


class TableSource:
    """The series of long tables that share their columns."""

    def __init__(
        self,
        paths: tuple[Path, ...],
        columns: TableColumns,
        objects: ObjectTable | None,
        hashes: Mapping[str, str],
        cache: Path,
        rows_at_once: int,
        citation: str = "",
        licence: str = "",
    ) -> None:
        self.files = hashes
        self.citation = citation
        self.licence = licence
        self.channels = tuple(column.channel() for column in columns.channels)
        self.axes = tuple(column.axis() for column in columns.axes)
        self._paths, self._columns, self._cache, self._rows = paths, columns, cache, rows_at_once
        self._in_rows = columns.facts if objects is None else FactColumns()
        self._known = None if objects is None else read_objects(objects, columns.facts)
        self._objects = ObjectIndex()
        labels: set[str] = set()
        for batch in self._batches([columns.object, *filter(None, [self._in_rows.label])]):
            self._objects.add(keys_of(batch.column(0), columns.object))
            if self._in_rows.label:
                labels.update(filter(None, facts(batch.column(1).unique())))
        if self._known is not None:
            labels = {known.label for known in self._known.values() if known.label}
        self.classes = classes_of(sorted(labels), columns.facts)

    @property
    def is_sorted(self) -> bool:
        """Whether the rows of every object stand together."""
        return self._objects.is_sorted

    def __length_hint__(self) -> int:
        return len(self._objects)

    def _batches(self, names: list[str]) -> Iterator[Any]:
        facts_columns = self._in_rows.columns()
        words = {self._columns.object, *facts_columns}
        words |= {axis.column for axis in self._columns.axes if axis.categories}
        for path in self._paths:
            yield from batches(path, names, words, self._rows)

    def read(self) -> Iterator[RawSeries]:
        """Every object in the order of its first row.

        Raises:
            DataError: a column holds what it should not, or an object has two classes.
        """
        if self.is_sorted:
            yield from self._series(self._blocks())
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="roma-sort-", dir=self._cache) as folder:
            buckets = Buckets(Path(folder), self._objects.sizes(), self._rows)
            for block in self._blocks():
                buckets.add(self._objects.ranks(block["key"]), block)
            yield from self._series(buckets.sorted_blocks())

    def _blocks(self) -> Iterator[NDArray[Any]]:
        """Rows as structured arrays: ``key``, ``positions`` (D,), ``values`` (C,), ``facts`` (F,).

        No block or batch is referred to from here once it is given, so one of each is in memory.
        """
        columns = self._columns
        self._words: dict[int, str] = {}  # of the objects in memory: key → id, where it is text
        self._cells: dict[str | None, int] = {}
        self._kind = np.dtype(
            [
                ("key", np.int64),
                ("positions", np.float64, (len(columns.axes),)),
                ("values", np.float32, (len(columns.channels),)),
                ("facts", np.int32, (len(self._in_rows.columns()),)),
            ]
        )
        names = [columns.object, *(a.column for a in columns.axes)]
        names += [*(c.column for c in columns.channels), *self._in_rows.columns()]
        return map(self._block, self._batches(list(dict.fromkeys(names))))

    def _block(self, batch: Any) -> NDArray[Any]:
        columns, where = self._columns, f"{self._paths[0].parent}"
        block = np.empty(batch.num_rows, dtype=self._kind)
        words: dict[int, str] = {}
        block["key"] = keys_of(batch.column(columns.object), columns.object, words)
        if self.is_sorted:  # the series of earlier blocks have been given, but perhaps the last
            last = next(reversed(self._words.items()), None)
            self._words = dict([last] if last else [])
        self._words |= words
        for k, axis in enumerate(columns.axes):
            block["positions"][:, k] = positions_of(batch.column(axis.column), axis, where)
        for k, channel in enumerate(columns.channels):
            with np.errstate(over="ignore"):  # inf is refused, or left out, later
                block["values"][:, k] = numbers(batch.column(channel.column), channel.column, where)
        for k, fact in enumerate(self._in_rows.columns()):
            block["facts"][:, k] = self._codes(batch.column(fact))
        return block

    def _codes(self, column: Any) -> NDArray[np.int32]:
        """A column of words as numbers that stand for them; see ``_cells``."""
        coded = column.dictionary_encode()
        codes = [self._cells.setdefault(w, len(self._cells)) for w in facts(coded.dictionary)]
        codes.append(self._cells.setdefault(None, len(self._cells)))
        indices = coded.indices.fill_null(len(codes) - 1)
        return np.array(codes, dtype=np.int32)[indices.to_numpy(zero_copy_only=False)]

    def _series(self, blocks: Iterator[NDArray[Any]]) -> Iterator[RawSeries]:
        """One series per run of equal keys; a run may reach over the end of a block."""
        waiting: list[NDArray[Any]] = []  # the parts of the run that is not over yet
        for block in blocks:
            edges = np.flatnonzero(np.diff(block["key"])) + 1
            starts = np.concatenate([[0], edges, [len(block)]])
            if waiting and len(block) and block["key"][0] != waiting[-1]["key"][0]:
                yield self._one(waiting)
                waiting = []
            for a, b in itertools.pairwise(starts[:-1]):
                yield self._one([*waiting, block[a:b]])
                waiting = []
            waiting.append(block[starts[-2] :].copy())
            del block  # before the next is made
        if waiting:
            yield self._one(waiting)

    def _one(self, parts: list[NDArray[Any]]) -> RawSeries:
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        name = self._words.get(int(rows["key"][0])) or str(rows["key"][0])
        known = self._facts(name, rows["facts"])
        return RawSeries(
            id=name,
            positions=np.ascontiguousarray(rows["positions"]),  # copies: none holds the block
            values=np.ascontiguousarray(rows["values"]),
            label=known.label,
            group=known.group,
            recorded_split=known.split,
        )

    def _facts(self, name: str, codes: NDArray[np.int32]) -> Facts:
        if self._known is not None:
            if name not in self._known:
                raise DataError(
                    f"object {name!r} has observations but no row in the table of objects; add it, "
                    f"or leave its observations out"
                )
            return self._known[name]
        if not codes.shape[1]:
            return Facts()
        words = {code: word for word, code in self._cells.items()}
        if (codes != codes[0]).any():
            row, column = np.argwhere(codes != codes[0])[0]
            pair = [words[int(codes[0, column])], words[int(codes[row, column])]]
            raise DataError(
                f"object {name!r} has {pair[0]!r} and {pair[1]!r} in column "
                f"{self._in_rows.columns()[column]!r}; one of them per object"
            )
        return facts_of([words[int(c)] for c in codes[0]], self._in_rows, f"object {name!r}")
