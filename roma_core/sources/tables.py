"""Series from tables in Parquet and CSV files, with one row per observation or one per series.

    object  time      band  flux    flux_err
    615     59750.42  2     -544.8  3.6        →  positions (time, band), values (flux, flux_err)

    id    time           flux           label
    a     [0.0, 1.5, 4]  [3.1, 3.0, 2]  "Ia"   (what ``roma data export`` writes)

DuckDB streams two queries: the objects with their metadata and numbers of rows, and the rows in the
order of those objects, sorted on disk where the rows of an object do not stand together. Series come
in the order of first appearance.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.schema import Channel, Covariate, DataError, PositionAxis, TargetLevel
from roma_core.settings import Frozen
from roma_core.sources.base import MetadataColumns, RawSeries, Source, SourceConfig, hash_files
from roma_core.sources.table_files import (
    FILE_NAME,
    Number,
    OptionalText,
    TableFile,
    connect,
    expand,
    open_tables,
    read_errors,
)

_MEMORY_MB = 96  # to begin with, and for each million rows that are to be sorted:
_MEMORY_MB_PER_MILLION = 1.1
_MAX_MEMORY_MB = 1 << 15
_ROWS = 1 << 16  # of observations at a time
_OBJECTS = 1 << 12  # at a time


class ChannelColumn(Frozen):
    """A column whose numbers, or dates in the unit, are the values of one channel."""

    column: str
    name: str | None = Field(None, description="Name in the data set; the column's by default.")
    unit: str = Field("1", description="Unit of the numbers; '1' for a pure number.")

    def channel(self, kind: str) -> Channel:
        unit = "s" if kind == "date" and self.unit == "1" else self.unit
        return Channel(name=self.name or self.column, unit=unit)


class AxisColumn(ChannelColumn):
    """A column whose numbers, dates or categories are positions on one axis."""

    categories: tuple[str, ...] | dict[str, str] = ()
    """For a column such as bands or sensors: all its words, or each with its name. A position is
    the word's index here, so append new words at the end."""
    unknown: bool = False
    """Take any other word as one more category, 'unknown', which is learned."""

    def axis(self, kind: str) -> PositionAxis:
        channel = self.channel(kind)
        if not self.categories:
            return PositionAxis(name=channel.name, unit=channel.unit)
        words = self.categories
        names = tuple(words.values() if isinstance(words, dict) else words)
        return PositionAxis(
            name=channel.name,
            unit=f"index of {', '.join(names)}",
            categories=names,
            encoding="embedding",
            unknown=self.unknown,
        )


class CovariateColumn(ChannelColumn):
    """A column with one number or category per object, such as age or sex; empty where unknown."""

    categories: tuple[str, ...] = ()
    """For a column of text: all its words; append new words at the end."""

    def covariate(self) -> Covariate:
        name = self.name or self.column
        return Covariate(name=name, unit=self.unit, categories=self.categories)

    def number(self, text: str | None, object_: str) -> float:
        """The number, or the index of the category, of an object; NaN for None."""
        if text is None:
            return math.nan
        expected = "a number"
        if self.categories:
            if text in self.categories:
                return float(self.categories.index(text))
            expected = f"one of {', '.join(self.categories)}; append it there, or empty the cell"
        else:
            with suppress(ValueError):
                return float(text)
        raise DataError(
            f"object {object_!r} has {text!r} in the column {self.column!r}, expected {expected}"
        )


class QuantityColumn(Frozen):
    """Columns of a table with a row per value: which quantity it is of, and its number."""

    column: str = Field(description="Column of the quantity's word.")
    value: str = Field(description="Column of the number.")
    others: Literal["refuse", "drop"] = "refuse"
    """Rows of a quantity that is no channel: raise an error, or drop them."""


class ObjectTable(Frozen):
    """A Parquet or CSV file with one row per object."""

    file: Path
    object: str = Field(description="Column of the object's id.")


class _Columns(Frozen):
    axes: tuple[AxisColumn, ...] = Field(min_length=1, description="Position axes; time first.")
    channels: tuple[ChannelColumn, ...] = Field(min_length=1, description="Values, errors.")
    targets: tuple[ChannelColumn, ...] = ()
    """Numbers that a model may be trained to predict."""
    target_level: TargetLevel = Field(
        "observation", exclude_if=lambda level: level == "observation"
    )
    """'series': every object has the targets, in a column as those of metadata."""
    covariates: tuple[CovariateColumn, ...] = Field((), description="Inputs that are an object's.")
    metadata: MetadataColumns = MetadataColumns()


class TableColumns(_Columns):
    """The role of each column."""

    object: str
    """Column of the object's id; 'filename' if each file is an object."""
    quantity: QuantityColumn | None = None
    """For a table with a row per value; the `column` of a channel is then a word of this one."""


class _FilesConfig(SourceConfig):
    files: tuple[Path, ...] = Field(min_length=1)
    """Parquet or CSV files, or patterns such as data/*.parquet."""
    missing_values: tuple[float | str, ...] = ()
    """Numbers and words that stand for a missing number, such as -9999 or 'bad'."""
    memory_limit_mb: int | None = Field(None, ge=16)
    """Memory for reading and sorting; sorts beyond it spill to disk. None starts with about 100 and
    takes more for a table that cannot be sorted in it."""
    threads: int = Field(1, gt=0)
    """Threads that read and sort; a job uses at least its own threads."""


class TableConfig(_FilesConfig):
    """Long tables on this computer, in Parquet or CSV: a row per observation."""

    kind: Literal["table"] = "table"
    columns: TableColumns
    objects: ObjectTable | None = None
    """A table with one row per object that holds the metadata."""

    def open(self, cache: Path) -> TableSource:
        files = expand(self.files)
        if self.columns.object == FILE_NAME and len({p.name for p in files}) < len(files):
            raise DataError(
                f"each file is an object, but some of {self.files[0]} share a name; rename them"
            )
        all_files = files if self.objects is None else [*files, self.objects.file]
        return TableSource(self, hash_files(all_files), cache)


class ParquetConfig(_FilesConfig, _Columns):
    """Parquet files on this computer: a row per series, a list column per axis and channel."""

    kind: Literal["parquet"] = "parquet"
    id: str = Field("id", description="Column of the series' id.")

    def open(self, cache: Path) -> ParquetSource:
        return ParquetSource(self, hash_files(expand(self.files)), cache)


class _Observations:
    """Rows of Arrow batches, taken some at a time as positions, values and targets."""

    def __init__(self, batches: Iterator[Any], n_axes: int, n_channels: int) -> None:
        self._batches = batches
        self._n_axes, self._n_channels = n_axes, n_channels
        self._block: list[NDArray[Any]] = []
        self._start = 0

    def take(self, n: int) -> list[NDArray[Any]]:
        """Copies of the next rows: ``(n, D)`` float64, ``(n, C)`` and ``(n, K)`` float32."""
        parts: list[list[NDArray[Any]]] = []
        while not parts or n:
            if not self._block or (n and self._start == len(self._block[0])):
                self._block, self._start = self._arrays(next(self._batches)), 0
            parts.append([array[self._start : self._start + n] for array in self._block])
            self._start += len(parts[-1][0])
            n -= len(parts[-1][0])
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _arrays(self, batch: Any) -> list[NDArray[Any]]:
        columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
        a, b = self._n_axes, self._n_axes + self._n_channels
        arrays = []
        for part, dtype in ((columns[:a], "f8"), (columns[a:b], "f4"), (columns[b:], "f4")):
            arrays.append(np.empty((batch.num_rows, len(part)), dtype))
            with np.errstate(over="ignore"):  # too large for float32: inf, which is refused later
                for k, column in enumerate(part):
                    arrays[-1][:, k] = column
        return arrays


class _Source(Source):
    """What both kinds of table share: a query of objects beside one of their observations."""

    _n: int  # series

    def __init__(
        self, config: TableConfig | ParquetConfig, hashes: Mapping[str, str], cache: Path
    ) -> None:
        super().__init__(config)
        columns = config.columns if isinstance(config, TableConfig) else config
        quantity = getattr(columns, "quantity", None)
        self.files = hashes
        self._metadata = columns.metadata
        self.target_level = columns.target_level
        targets, self._numbers_of_object = columns.targets, columns.covariates
        if self.target_level == "series":
            own = (CovariateColumn(**column.model_dump()) for column in targets)
            targets, self._numbers_of_object = (), (*columns.covariates, *own)
        self.covariates = tuple(column.covariate() for column in columns.covariates)
        values = [Number(column.column, column.unit) for column in columns.channels]
        if quantity is not None:
            self.layout = "per_channel"
            words = tuple(column.column for column in columns.channels)
            index = Number(quantity.column, "1", words, what="channels")
            values = [index, Number(quantity.value, "1")]
        self._numbers = [
            *(Number(a.column, a.unit, tuple(a.categories), a.unknown) for a in columns.axes),
            *values,
            *(Number(column.column, column.unit) for column in targets),
        ]
        self._may_grow = config.memory_limit_mb is None
        of_job = os.environ.get("OMP_NUM_THREADS") or "1"  # it may be set and empty
        threads = max(config.threads, int(of_job.split(",")[0]))
        self._memory_mb = config.memory_limit_mb or _MEMORY_MB * threads
        self._database = connect(cache, self._memory_mb, threads)
        self._missing = config.missing_values
        self._tables = open_tables(expand(config.files), self._database, self._missing)
        if quantity is not None and quantity.others == "drop":
            for table in self._tables:
                table.keep(quantity.column, words)
        self._lists = list(dict.fromkeys(number.column for number in self._numbers))
        ids = [config.columns.object] if isinstance(config, TableConfig) else []
        long = self._tables if ids else [table.unnested(self._lists) for table in self._tables]
        self._observations = _union(long, ids, self._numbers)
        kinds = long[0].kinds
        for table, name in itertools.product(long, self._lists):
            if {kinds[name], table.kinds[name]} == {"date", "number"}:
                raise DataError(
                    f"column {name!r} holds {kinds[name]}s in {long[0].path}, and {table.kinds[name]}s "
                    f"in {table.path}; convert one of them"
                )
        self.axes = tuple(column.axis(kinds[column.column]) for column in columns.axes)
        self.channels = tuple(
            column.channel("number" if quantity else kinds[column.column])
            for column in columns.channels
        )
        self.targets = tuple(
            column.channel(kinds[column.column] if targets else "number")
            for column in columns.targets
        )

    def _object_columns(self) -> list[str | OptionalText]:
        """Columns with one text per object: the metadata, then covariates, then targets of series."""
        numbers = [OptionalText(c.column, not c.categories) for c in self._numbers_of_object]
        return [*self._metadata.columns(), *numbers]

    def __length_hint__(self) -> int:
        return self._n

    def _query(self, sql: str) -> list[tuple[Any, ...]]:
        with read_errors(self._tables):
            return self._in_memory(lambda: self._database.execute(sql).fetchall())

    def _in_memory(self, run: Callable[[], Any]) -> Any:
        """Run a query again with more memory, if it may take more and cannot do with less."""
        import duckdb

        while True:
            try:
                return run()
            except (duckdb.Error, OSError) as error:
                may_grow = self._may_grow and self._memory_mb <= _MAX_MEMORY_MB
                if "Out of Memory" not in str(error) or not may_grow:
                    raise
            self._allow(self._memory_mb * 3 // 2)

    def _allow(self, memory_mb: int) -> None:
        self._memory_mb = memory_mb
        self._database.execute(f"SET GLOBAL memory_limit = '{memory_mb}MB'")

    def read(self) -> Iterator[RawSeries]:
        return self.read_from(0)

    def read_from(self, start: int) -> Iterator[RawSeries]:
        """The series without the first ones, which DuckDB skips."""
        raise NotImplementedError

    def _series(self, objects: str, observations: str, start: int) -> Iterator[RawSeries]:
        """Series of a query for id, length ``n`` and metadata, and of a relation with their ``n*`` in order."""
        columns = ", ".join(f"n{k}" for k in range(len(self._numbers)))
        if start:
            ((n_rows,),) = self._query(f"SELECT sum(n) FROM ({objects} LIMIT {start})")
            objects, observations = f"{objects} OFFSET {start}", f"{observations} OFFSET {n_rows}"
        cursors = self._database.cursor(), self._database.cursor()
        cursors[0].execute("SET streaming_buffer_size = '2MB'")

        def sort() -> Iterator[Any]:
            query = cursors[0].sql(f"SELECT {columns} FROM {observations}")
            batches = query.to_arrow_reader(_ROWS)
            return itertools.chain([*itertools.islice(batches, 1)], batches)  # now a sort is over

        with read_errors(self._tables):
            is_long = self.layout == "per_channel"
            n_values = 1 if is_long else len(self.channels)
            rows = _Observations(self._in_memory(sort), len(self.axes) + is_long, n_values)
            for batch in cursors[1].sql(objects).to_arrow_reader(_OBJECTS):
                cells = [column.to_pylist() for column in batch.columns]
                for id_, n, *others in zip(*cells, strict=True):
                    positions, values, targets = rows.take(n)
                    metadata = others[: len(others) - len(self._numbers_of_object)]
                    texts = zip(self._numbers_of_object, others[len(metadata) :], strict=True)
                    numbers = np.array([c.number(x, id_) for c, x in texts], np.float32)
                    if self.target_level == "series":
                        targets = numbers[len(self.covariates) :]
                    yield RawSeries(
                        id=id_ or "",
                        positions=positions,
                        values=values,
                        targets=targets if self.targets else None,
                        covariates=numbers[: len(self.covariates)],
                        **self._metadata.metadata(metadata, f"object {id_!r}"),
                    )


class TableSource(_Source):
    """The series of long tables that share their columns.

    Attributes:
        is_sorted: whether the rows of every object stand together.
    """

    def __init__(self, config: TableConfig, hashes: Mapping[str, str], cache: Path) -> None:
        super().__init__(config, hashes, cache)
        names = self._object_columns()
        self._create_objects(config.columns.object, [] if config.objects else names)
        if config.objects is not None:
            self._join_metadata(config.objects, names)
        labels = self._query("SELECT DISTINCT m0 FROM metadata") if self._metadata.label else []
        self.classes = self._metadata.all_classes(label for (label,) in labels)
        ((self._n, n_rows, n_apart),) = self._query(
            "SELECT count(*), sum(n), count(*) FILTER (last_row - first_row + 1 <> n) FROM objects"
        )
        self.is_sorted = n_apart == 0
        if self._may_grow and not self.is_sorted:
            self._allow(self._memory_mb + int(_MEMORY_MB_PER_MILLION * n_rows / 1e6))

    def _create_objects(self, id_: str, names: Sequence[str | OptionalText]) -> None:
        """Table ``objects``: t0 (id), first_row, last_row, n, and the metadata m0, m1, …"""
        cells = [f"CAST(t{k} AS VARCHAR)" for k in range(1, len(names) + 1)]
        # of a covariate, a cell may be empty where others of the object are not
        n = len(names) and len(self._metadata.columns())
        cells = [f"coalesce({cell}, '')" for cell in cells[:n]] + cells[n:]
        columns = ["t0", "min(row) AS first_row", "max(row) AS last_row", "count(*) AS n"]
        columns += [f"min({cell}) AS m{k}, max({cell}) AS other{k}" for k, cell in enumerate(cells)]
        rows = f"SELECT *, row_number() OVER () AS row FROM ({_union(self._tables, [id_, *names])})"
        self._query(
            f"CREATE TABLE objects AS SELECT {', '.join(columns)} FROM ({rows}) GROUP BY t0"
        )
        self._query("CREATE VIEW metadata AS FROM objects")
        is_empty = "coalesce(CAST(t0 AS VARCHAR), '') = ''"
        if self._query(f"SELECT t0 FROM objects WHERE {is_empty}"):
            for table in self._tables:
                rows = f"SELECT *, row_number() OVER () AS row FROM ({table.select([id_])})"
                for (row,) in self._query(f"SELECT row FROM ({rows}) WHERE {is_empty} LIMIT 1"):
                    raise DataError(
                        f"{table.path}: column {id_!r} has an empty id, at first in row {row} of the "
                        f"data; every row needs one"
                    )
        for k, name in enumerate(names):
            differing = f"SELECT t0, m{k}, other{k} FROM objects WHERE m{k} <> other{k}"
            for object_, one, other in self._query(f"{differing} ORDER BY first_row LIMIT 1"):
                raise DataError(
                    f"object '{object_}' has {one!r} and {other!r} in column "
                    f"{(name if isinstance(name, str) else name.column)!r}; expected one"
                )

    def _join_metadata(self, objects: ObjectTable, names: Sequence[str | OptionalText]) -> None:
        """View ``metadata``: ``objects`` with the metadata of the table of objects."""
        table = TableFile([objects.file], self._database, self._missing)
        with read_errors([table]):
            columns = [f"CAST(t{k + 1} AS VARCHAR) AS m{k}" for k in range(len(names))]
            columns = ["CAST(t0 AS VARCHAR) AS id", *columns]
            rows = table.select([objects.object, *names])
            self._database.execute(
                f"CREATE TABLE known AS SELECT {', '.join(columns)} FROM ({rows})"
            )
        for (id_,) in self._query(
            "SELECT id FROM known GROUP BY id HAVING count(*) > 1 OR coalesce(id, '') = '' LIMIT 1"
        ):
            raise DataError(
                f"{objects.file}: the object {id_!r} has two rows, or no id; one row per object"
            )
        self._query(
            "CREATE OR REPLACE VIEW metadata AS FROM objects LEFT JOIN known ON id = CAST(t0 AS VARCHAR)"
        )
        for (id_,) in self._query(
            "SELECT t0 FROM metadata WHERE id IS NULL ORDER BY first_row LIMIT 1"
        ):
            raise DataError(
                f"object '{id_}' has observations but no row in the table of objects; add one"
            )

    def read_from(self, start: int) -> Iterator[RawSeries]:
        """The objects in the order of their first rows, without the first ones."""
        metadata = [f"m{k}" for k in range(len(self._object_columns()))]
        columns = ", ".join(["CAST(t0 AS VARCHAR)", "n", *metadata])
        rows = f"({self._observations})"
        if not self.is_sorted:
            rows = f"(SELECT *, row_number() OVER () AS row FROM {rows}) JOIN objects USING (t0)"
            rows += " ORDER BY first_row, row"
        return self._series(f"SELECT {columns} FROM metadata ORDER BY first_row", rows, start)


class ParquetSource(_Source):
    """The rows of Parquet files, in file order."""

    def __init__(self, config: ParquetConfig, hashes: Mapping[str, str], cache: Path) -> None:
        super().__init__(config, hashes, cache)
        lists = self._lists
        self._objects = _union(self._tables, [config.id, *self._object_columns()], [], lists[:1])
        self._n = self._query(f"SELECT count(*) FROM ({self._objects})")[0][0]
        differ = " OR ".join(f"l{k} <> l0" for k in range(1, len(lists)))
        labels: set[str] = set()
        for table in self._tables:
            rows = table.select([config.id], lists=lists)
            for name, *lengths in self._query(f"FROM ({rows}) WHERE {differ or False} LIMIT 1"):
                k = next(k for k, length in enumerate(lengths) if length != lengths[0])
                raise DataError(
                    f"{table.path}: series '{name}' has {lengths[0]} numbers in {lists[0]!r} and "
                    f"{lengths[k]} in {lists[k]!r}; one per observation in each"
                )
            if self._metadata.label is not None:
                labels |= set(table.words(self._metadata.label))
        self.classes = self._metadata.all_classes(labels)

    def read_from(self, start: int) -> Iterator[RawSeries]:
        metadata = [f"CAST(t{k + 1} AS VARCHAR)" for k in range(len(self._object_columns()))]
        columns = ", ".join(["CAST(t0 AS VARCHAR)", "l0 AS n", *metadata])
        objects = f"SELECT {columns} FROM ({self._objects})"
        return self._series(objects, f"({self._observations})", start)


def _union(tables: Sequence[TableFile], *columns: Any) -> str:
    """SQL of the rows of all files, in order; for the columns see ``TableFile.select``."""
    return " UNION ALL ".join(table.select(*columns) for table in tables)
