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
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from roma_core.files import sha256_of
from roma_core.schema import DataError
from roma_core.sources.base import RawSeries, SourceConfig
from roma_core.sources.buckets import Buckets
from roma_core.sources.columns import batches, found_files, words
from roma_core.sources.facts import FactColumns, Facts, ObjectTable, classes_of, read_objects
from roma_core.sources.objects import ObjectIndex, keys_of
from roma_core.sources.rows import Block, RowReader, TableColumns


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
        self.targets = tuple(column.channel() for column in columns.targets)
        self._paths, self._columns, self._cache, self._rows = paths, columns, cache, rows_at_once
        self._in_rows = columns.facts if objects is None else FactColumns()
        self._known = None if objects is None else read_objects(objects, columns.facts)
        self._objects = ObjectIndex()
        labels: set[str] = set()
        for path in self._paths:
            for batch in self._batches(
                path, [columns.object, *filter(None, [self._in_rows.label])]
            ):
                self._objects.add(keys_of(batch.column(0), columns.object, str(path)))
                if self._in_rows.label:
                    labels.update(filter(None, words(batch.column(1).unique())))
        if self._known is not None:
            labels = {known.label for known in self._known.values() if known.label}
        self.classes = classes_of(sorted(labels), columns.facts)

    @property
    def is_sorted(self) -> bool:
        """Whether the rows of every object stand together."""
        return self._objects.is_sorted

    def __length_hint__(self) -> int:
        return len(self._objects)

    def _batches(self, path: Path, names: list[str]) -> Iterator[Any]:
        text = {self._columns.object, *self._in_rows.columns()}
        text |= {axis.column for axis in self._columns.axes if axis.categories}
        return batches(path, names, text, self._rows)

    def read(self) -> Iterator[RawSeries]:
        """Every object in the order of its first row.

        Raises:
            DataError: a column holds what it should not, or an object has two classes.
        """
        reader = RowReader(self._columns, self._in_rows, forget=self.is_sorted)
        # by map, nothing here refers to a batch or block once it is given: one of each in memory
        blocks = itertools.chain.from_iterable(
            map(partial(reader.block, str(path)), self._batches(path, reader.columns()))
            for path in self._paths
        )
        if self.is_sorted:
            yield from self._series(reader, blocks)
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="roma-sort-", dir=self._cache) as folder:
            buckets = Buckets(Path(folder), self._objects.sizes(), self._rows)
            for block in blocks:
                buckets.add(self._objects.ranks(block["key"]), block)
                del block
            yield from self._series(reader, buckets.sorted_blocks())

    def _series(self, reader: RowReader, blocks: Iterator[Block]) -> Iterator[RawSeries]:
        """One series per run of equal keys; a run may reach over the end of a block."""
        waiting: list[Block] = []  # the parts of the run that is not over yet
        for block in blocks:
            if len(block) == 0:
                continue
            edges = np.flatnonzero(block["key"][1:] != block["key"][:-1]) + 1
            starts = np.concatenate([[0], edges])
            if waiting and block["key"][0] != waiting[0]["key"][0]:
                yield self._one(reader, waiting)
                waiting = []
            for a, b in itertools.pairwise(starts):
                yield self._one(reader, [*waiting, block[a:b]])
                waiting = []
            waiting.append(block[starts[-1] :].copy())
            del block  # before the next is made
        if waiting:
            yield self._one(reader, waiting)

    def _one(self, reader: RowReader, parts: list[Block]) -> RawSeries:
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        name = reader.name_of(int(rows["key"][0]))
        known = (
            reader.facts_of_codes(rows["facts"], name)
            if self._known is None
            else self._known_of(name)
        )
        return RawSeries(
            id=name,
            positions=np.ascontiguousarray(rows["positions"]),  # copies: none holds the block
            values=np.ascontiguousarray(rows["values"]),
            targets=np.ascontiguousarray(rows["targets"]) if self.targets else None,
            label=known.label,
            group=known.group,
            recorded_split=known.split,
        )

    def _known_of(self, name: str) -> Facts:
        assert self._known is not None
        if name not in self._known:
            raise DataError(
                f"object {name!r} has observations but no row in the table of objects; add it, or "
                f"leave its observations out"
            )
        return self._known[name]
