"""Score a file of series, in parts: an interruption loses at most the part it fell into.

Parts are ``OUTPUT.parts/00000.parquet`` and so on, each with its own lineage columns; at the end
they become OUTPUT. Inside a part, series of similar length go through the model together. Parts of
another input or another model are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from roma_core.data.mistakes import mistakes
from roma_core.files import digest_of, read_json, write_json
from roma_core.serving.reading import Row, read_series

if TYPE_CHECKING:
    import pyarrow as pa

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
            wrong = "; ".join(mistakes(error, package.module.Series))
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
