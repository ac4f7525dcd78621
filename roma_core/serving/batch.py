"""Score a file of series, in parts: an interruption loses at most the part it fell into.

Parts are ``OUTPUT.parts/00000.parquet`` and so on, each with its own lineage columns; at the end
they become OUTPUT. Inside a part, series of similar length go through the model together. Parts of
another input or another model are thrown away.

Series to be scored, out of a file: Parquet, JSON lines, or a data-set folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from roma_core.files import digest_of, read_json, write_json
from roma_core.settings import validation_errors

if TYPE_CHECKING:
    import pyarrow as pa

_AT_ONCE = 1000
_FACTS = ("split", "label", "group")  # columns of `roma data export` that are no input of a model,
_TARGET = (b"role", b"target")  # as are those whose field says this
Row = dict[str, Any]


def read_series(path: Path, split: Any, package: Any, start: int = 0) -> Iterator[Row]:
    """Series as a server would be sent them, in the file's order, from row ``start``.

    A column of a Parquet file whose field has the metadata ``unit`` says its unit; others are taken
    to be in the model's. Targets of an exported data set are left out, unless the model takes them.

    Args:
        split: of a data-set folder.
        package: what will score them; its axes and units are needed to read columns.

    Raises:
        ValueError: the file is none of these, or a line of it is no series.
    """
    if path.is_dir():
        from roma_core.data.store import StoredDataset, raw_series

        subset = StoredDataset(path).split(split)
        yield from raw_series(subset, range(start, len(subset)))
    elif path.suffix == ".parquet":
        yield from _parquet(path, package, start)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, start, None), start=start + 1):
                try:
                    row = json.loads(line)
                    package.module.Series(**row)
                except ValidationError as error:
                    wrong = "; ".join(map(str, validation_errors(error, package.module.Series)))
                    raise ValueError(f"{path}, line {number}: {wrong}") from error
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                yield row
    else:
        raise ValueError(f"{path}: expected a data-set folder, .parquet or .jsonl")


def count_series(path: Path, split: Any) -> int:
    """How many ``read_series`` will give."""
    if path.is_dir():
        from roma_core.data.store import StoredDataset

        return len(StoredDataset(path, verify=False).split(split))
    if path.suffix == ".parquet":
        with _parquet_file(path) as file:
            return int(file.metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def assumed_units(path: Path, package: Any) -> Mapping[str, str]:
    """Columns of a Parquet file that do not say their unit, with the model's, which they get."""
    if path.suffix != ".parquet":
        return {}
    with _parquet_file(path) as file:
        given = _given_units(file.schema_arrow)
    return {
        name: unit
        for name, unit in package.units.items()
        if unit not in ("1", name) and name not in given
    }


def _parquet(path: Path, package: Any, start: int) -> Iterator[Row]:
    axes = [axis["name"] for axis in package.axes]
    channels = [channel["name"] for channel in package.channels]
    with _parquet_file(path) as file:
        targets = [
            field.name for field in file.schema_arrow if _TARGET in (field.metadata or {}).items()
        ]
        known = [name for name in (*_FACTS, *targets) if name not in (*axes, *channels)]
        _refuse_what_holds_no_lists(path, file.schema_arrow, (*axes, *channels), {"id", *known})
        units = dict(package.units) | _given_units(file.schema_arrow)
        units = {name: unit for name, unit in units.items() if name in (*axes, *channels)}
        for batch in _batches(path, file):
            if start >= len(batch):
                start -= len(batch)
                continue
            for row in batch.slice(start).to_pylist():
                name = row.pop("id", None)
                for fact in known:
                    row.pop(fact, None)
                yield {
                    "id": None if name is None else str(name),
                    "positions": {axis: row.pop(axis) for axis in axes if axis in row},
                    "values": row,
                    "units": units,
                }
            start = 0


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    with file:
        yield file


def _batches(path: Path, file: Any) -> Iterator[Any]:
    import pyarrow as pa

    try:
        yield from file.iter_batches(_AT_ONCE)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _refuse_what_holds_no_lists(
    path: Path, schema: Any, inputs: tuple[str, ...], facts: set[str]
) -> None:
    """A table with a row per observation, or a column nobody asked for, is refused before any model."""
    import pyarrow as pa

    single = [
        field.name
        for field in schema
        if field.name not in facts and not pa.types.is_nested(field.type)
    ]
    if of_inputs := [name for name in single if name in inputs]:
        raise ValueError(
            f"{path}: expected one row per series, with a list in the column of every axis and channel; "
            f"of single values, or empty: {', '.join(of_inputs[:6])}. Gather the rows of a series into "
            f"lists (in pandas: table.groupby(ID).agg(list))"
        )
    if single:
        raise ValueError(
            f"{path}: neither an axis nor a channel of the model: {', '.join(single[:6])}; leave out such "
            f"columns, and call the one that names the series 'id'"
        )


def _given_units(schema: Any) -> dict[str, str]:
    return {
        field.name: field.metadata[b"unit"].decode()
        for field in schema
        if field.metadata and b"unit" in field.metadata
    }


SERIES_IN_A_PART = 2000
SCHEMA_VERSION = 1
_STATE = "state.json"  # in the folder of parts


def score_file(
    package: Any,
    lineage: dict[str, str],
    source: Path,
    split: str,
    output: Path,
    *,
    progress: Callable[[int], object] = lambda _: None,
) -> int:
    """Write one row per series of ``source`` to ``output`` (Parquet).

    Columns: ``id``; ``label`` and ``probabilities`` (map), or ``features`` (list) of an encoder; the
    entries of ``lineage``; ``scored_at`` (UTC).

    Args:
        package: from ``fetching.load``.
        lineage: text columns, equal in every row.
        progress: told the number of series that are done, also those of an earlier call.

    Returns:
        The number of series.

    Raises:
        ValueError: a series does not fit; the message names it by its row. The parts before it stay.
    """
    import pyarrow.parquet as pq

    parts = output.with_name(f"{output.name}.parts")
    fingerprint = _fingerprint(source, split, lineage)
    if not _is_of(parts, fingerprint):
        _remove(parts)
    done = sorted(parts.glob("[0-9]*.parquet"))
    n = sum(pq.read_metadata(part).num_rows for part in done)
    progress(n)
    rows = read_series(source, split, package, start=n)
    while part := list(islice(rows, SERIES_IN_A_PART)):
        path = parts / f"{n // SERIES_IN_A_PART:05d}.parquet"
        try:
            table = _scored(package, part, lineage)
        except ValidationError as error:
            wrong = "; ".join(map(str, validation_errors(error, package.module.Series)))
            raise ValueError(f"rows {n} to {n + len(part) - 1} of {source}: {wrong}") from error
        except ValueError as error:
            raise ValueError(f"rows {n} to {n + len(part) - 1} of {source}: {error}") from error
        if n == 0:  # not before: a file that is refused leaves nothing behind
            parts.mkdir(parents=True, exist_ok=True)
            state = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint}
            write_json(parts / _STATE, state)
        aside = path.with_suffix(".part")
        pq.write_table(table, aside)
        aside.replace(path)
        n += len(part)
        progress(n)
    if n == 0:
        raise ValueError(f"{source} holds no series")
    _join(parts, output)
    _remove(parts)
    return n


def _fingerprint(source: Path, split: str, lineage: dict[str, str]) -> str:
    """Changes with the input and with the model."""
    stamps = []
    for file in [source] if source.is_file() else sorted(source.iterdir()):
        stat = file.stat()
        stamps.append([file.name, stat.st_size, stat.st_mtime_ns])
    return digest_of([str(source.absolute()), stamps, split, lineage, SERIES_IN_A_PART])


def _is_of(parts: Path, fingerprint: str) -> bool:
    state = parts / _STATE
    if not state.is_file():
        return False
    return bool(read_json(state, schema_version=SCHEMA_VERSION)["fingerprint"] == fingerprint)


def _remove(parts: Path) -> None:
    """Our files in a folder of parts, and the folder if nobody else put anything there."""
    if not parts.is_dir():
        return
    (parts / _STATE).unlink(missing_ok=True)  # first: parts without it are nobody's
    for part in parts.glob("[0-9][0-9][0-9][0-9][0-9].par*"):  # .parquet, or .part in writing
        part.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()


def _scored(package: Any, rows: list[Row], lineage: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    answers = package.predict([package.module.Series(**row) for row in rows])
    columns: dict[str, Any] = {"id": pa.array([a.id for a in answers], pa.string())}
    if hasattr(answers[0], "features"):
        features = [a.features for a in answers]
        columns["features"] = pa.array(features, pa.list_(pa.float64()))
    else:
        columns["label"] = pa.array([a.label for a in answers], pa.string())
        probabilities = [list(a.probabilities.items()) for a in answers]
        columns["probabilities"] = pa.array(probabilities, pa.map_(pa.string(), pa.float64()))
    for name, value in lineage.items():
        columns[name] = pa.array([value] * len(answers), pa.string())
    now = datetime.now(UTC)
    columns["scored_at"] = pa.array([now] * len(answers), pa.timestamp("ms", tz="UTC"))
    return pa.table(columns)


def _join(parts: Path, output: Path) -> None:
    import pyarrow.parquet as pq

    aside = output.with_name(f".{output.name}.joining")
    tables: Iterator[Any] = (pq.read_table(part) for part in sorted(parts.glob("[0-9]*.parquet")))
    first = next(tables)
    with pq.ParquetWriter(aside, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
    aside.replace(output)
