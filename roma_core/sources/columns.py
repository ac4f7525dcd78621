"""Which column of a table is what, and reading them: Arrow columns in, numpy arrays out.

Shared by the sources that read tables. A column that is missing, holds text where numbers are
needed, or a category nobody declared, is an error that shows what came.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.files import sha256_of
from roma_core.schema import Channel, DataError, PositionAxis

if TYPE_CHECKING:
    import pyarrow as pa


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Column(_Section):
    column: str
    name: str | None = Field(None, description="Name in the data set; the column's by default.")
    unit: str = Field("1", description="Unit of the numbers; '1' for a pure number.")


class ChannelColumn(_Column):
    """A column whose numbers are the values of one channel."""

    def channel(self) -> Channel:
        return Channel(name=self.name or self.column, unit=self.unit)


class AxisColumn(_Column):
    """A column whose numbers, or categories, are positions on one axis."""

    categories: tuple[str, ...] = Field(
        (),
        description="For a column of text, such as bands or sensors: all its words. A position is "
        "the word's index here, so append new words at the end.",
    )

    def axis(self) -> PositionAxis:
        unit = f"index of {', '.join(self.categories)}" if self.categories else self.unit
        return PositionAxis(name=self.name or self.column, unit=unit)


def found_files(patterns: Sequence[Path]) -> dict[Path, str]:
    """Files, and files matching patterns such as ``data/*.parquet``, in order → their sha256.

    Raises:
        DataError: a pattern matches nothing, or two files have one name.
    """
    paths: list[Path] = []
    for pattern in patterns:
        matching = sorted(Path(p) for p in glob.glob(str(pattern)))  # noqa: PTH207 - may be absolute
        files = [path for path in matching if path.is_file()]
        if not files:
            raise DataError(f"there is no file {pattern} (from {Path.cwd()})")
        paths += [path for path in files if path not in paths]
    names = [path.name for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"two files are called {twice[0]}; rename one of them")
    return {path: sha256_of(path) for path in paths}


def batches(path: Path, columns: Sequence[str], text: Iterable[str], rows: int) -> Iterator[Any]:
    """A Parquet or CSV file as Arrow record batches of up to about ``rows`` rows.

    Args:
        path: ends in ``.parquet`` or, for CSV, in ``.csv``, ``.csv.gz`` or ``.txt``, in any case.
        columns: to read, in this order.
        text: those of them that are text in a CSV file; the others are numbers.
        rows: per batch.

    Raises:
        DataError: the file cannot be read, lacks a column, or a number is none.
    """
    import pyarrow as pa

    try:
        endings = {ending.lower() for ending in path.suffixes}
        if path.suffix.lower() == ".parquet":
            yield from _parquet_batches(path, columns, rows)
        elif {".csv", ".txt"} & endings:
            yield from _csv_batches(path, columns, set(text), rows)
        elif ".tsv" in endings:
            raise DataError(
                f"{path} is separated by tabs, but a table's columns are separated by commas; write it "
                f"as CSV or Parquet, for example with pandas: "
                f"read_csv({path.name!r}, sep='\\t').to_parquet({path.stem + '.parquet'!r})"
            )
        else:
            raise DataError(f"{path}: expected a .parquet or .csv file")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parquet_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
        _refuse_missing(path, columns, file.schema_arrow.names)
        yield from map(methodcaller("select", columns), file.iter_batches(rows, columns=columns))


def _csv_batches(path: Path, columns: Sequence[str], text: set[str], rows: int) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.csv as csv

    with csv.open_csv(path, csv.ReadOptions(block_size=1 << 16)) as reader:
        _refuse_other_separator(path, columns, reader.schema.names)
        _refuse_missing(path, columns, reader.schema.names)
    types = {name: pa.string() if name in text else pa.float64() for name in columns}
    with csv.open_csv(
        path,
        read_options=csv.ReadOptions(block_size=max(1 << 16, rows * 32)),
        convert_options=csv.ConvertOptions(column_types=types, include_columns=list(columns)),
    ) as reader:
        yield from reader


def _refuse_other_separator(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    if len(present) > 1 or list(columns) == list(present):
        return
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if separator in present[0]:
            raise DataError(
                f"{path}: its first line {present[0]!r} is separated by {name}, expected commas; write "
                f"it again with commas (and decimal points), or as Parquet"
            )


def _refuse_missing(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in present]:
        raise DataError(f"{path} has no column {missing[0]!r}; it has {list(present)}")
    if twice := [name for name in columns if list(present).count(name) > 1]:
        raise DataError(
            f"{path} has more than one column {twice[0]!r}; rename all but the one that is meant"
        )


def numbers(column: pa.Array, name: str, where: str) -> NDArray[Any]:
    """A column of numbers as ``(n,)`` of its own type, or float64 with NaN where cells are empty.

    Raises:
        DataError: the column holds something else.
    """
    import pyarrow as pa

    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            return _seconds(column)
        raise DataError(
            f"{where}: column {name!r} holds {kind} (first {_first(column)!r}), expected numbers; "
            f"convert it, or list its words as 'categories' if it is a position axis"
        )
    if pa.types.is_null(kind):
        column = column.cast(pa.float64())
    return column.to_numpy(zero_copy_only=False)


def _seconds(column: pa.Array) -> NDArray[np.float64]:
    """Dates as seconds since 1970, exact to a microsecond."""
    import pyarrow as pa

    micros = column.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
    return micros.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False) / 1e6


def _first(column: pa.Array) -> Any:
    return next((cell for cell in column[:100].to_pylist() if cell is not None), None)


def positions_of(column: pa.Array, axis: AxisColumn, where: str) -> NDArray[Any]:
    """A column of positions as ``(n,)``: its numbers, or the indices of its categories.

    Raises:
        DataError: a word is not among the categories, or there are none and the column is text.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not axis.categories:
        return numbers(column, axis.column, where)
    found = text(column)
    index = pc.index_in(found, value_set=pa.array(axis.categories, pa.string()))
    if index.null_count:
        unknown = pc.unique(found.filter(index.is_null())).to_pylist()[:5]
        raise DataError(
            f"{where}: column {axis.column!r} holds {unknown}, which are not among its categories "
            f"{list(axis.categories)}; append them there, or leave those rows out"
        )
    return index.cast(pa.float64()).to_numpy(zero_copy_only=False)


def text(column: pa.Array) -> pa.Array:
    """A column as strings; whole numbers lose the '.0' that a CSV file or an empty cell gives them."""
    import pyarrow as pa

    if pa.types.is_floating(column.type) and _all_whole(column):
        column = column.cast(pa.int64())
    return column.cast(pa.string())


def _all_whole(column: pa.Array) -> bool:
    import pyarrow.compute as pc

    return bool(pc.all(pc.equal(pc.floor(column), column)).as_py())


def words(column: pa.Array) -> list[str | None]:
    """A column that says one thing of each object (class, group, split) as Python text."""
    return [None if cell is None else cell.strip() for cell in text(column).to_pylist()]
