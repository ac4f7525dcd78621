"""Apply a model to a file of series: Parquet, JSON lines, or a data-set folder.

``python -m roma_core.serving.batch MODEL_FOLDER N_MAX FILE...`` prints medians of encoder features,
``{"n": 640, "center": [...]}``, or exits with code 1 and one line of text.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from roma_core.files import digest_of, read_json, write_json
from roma_core.serving.pyfunc_model import parse_series
from roma_core.serving.registry_client import series_of

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
SERIES_PER_PART = 2000
_STATE = "state.json"  # in the folder of parts
_ROWS_PER_BATCH, _N_EMBEDDED = 1000, 1000
_FACTS = ("split", "label", "group")  # columns of `roma data export` that are no model inputs,
_TARGET = (b"role", b"target")  # as are columns with this field metadata
Row = dict[str, Any]


def read_series(path: Path, split: Any, package: Any, start: int = 0) -> Iterator[Row]:
    """Series in the form of a server's request, in the file's order, from row ``start``.

    The unit of a Parquet column is the metadata ``unit`` of its field, or else the model's unit.
    Targets of an exported data set are left out, unless they are inputs of the model. ``split`` is
    that of a data-set folder; ``package`` is the loaded model. Raises ValueError if the file has
    another format, or a line is not a valid series.
    """
    if path.is_dir():
        from roma_core.data.store import StoredDataset, raw_series

        subset = StoredDataset(path).split(split)
        yield from raw_series(subset, range(start, len(subset)))
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, package, start)
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(islice(lines, start, None), start=start + 1):
                try:
                    (series,) = parse_series([json.loads(line)])
                except ValueError as error:
                    reason = str(error).removeprefix("series 0: ")
                    raise ValueError(f"{path}, line {number}: {reason}") from error
                row = series.model_dump()
                if series.observations is not None and hasattr(package, "columns_of"):
                    positions, values = package.columns_of(series, f"{path}, line {number}")
                    row |= {"positions": positions, "values": values, "observations": None}
                yield row
    else:
        raise ValueError(f"{path}: expected a data-set folder, .parquet or .jsonl")


def count_series(path: Path, split: Any) -> int:
    """Number of series that ``read_series`` yields."""
    if path.is_dir():
        from roma_core.data.store import StoredDataset

        return len(StoredDataset(path, verify=False).split(split))
    if path.suffix == ".parquet":
        with _parquet_file(path) as file:
            return int(file.metadata.num_rows)
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def assumed_units(path: Path, package: Any) -> Mapping[str, str]:
    """Columns of a Parquet file without a unit, with the model's unit, which is used for them."""
    if path.suffix != ".parquet":
        return {}
    with _parquet_file(path) as file:
        given = _given_units(file.schema_arrow)
    return {
        name: unit
        for name, unit in package.units.items()
        if unit not in ("1", name) and name not in given
    }


def _read_parquet(path: Path, package: Any, start: int) -> Iterator[Row]:
    import pyarrow as pa

    axes = [axis["name"] for axis in package.axes]
    inputs = [*axes, *(channel["name"] for channel in package.channels)]
    with _parquet_file(path) as file:
        schema = file.schema_arrow
        targets = [field.name for field in schema if _TARGET in (field.metadata or {}).items()]
        ignored = [name for name in (*_FACTS, *targets) if name not in inputs]
        # the code of the model may be older than this
        covariates = [one["name"] for one in getattr(package, "covariates", [])]
        _check_columns(path, schema, inputs, {"id", *ignored, *covariates})
        units = dict(package.units) | _given_units(schema)
        units = {name: unit for name, unit in units.items() if name in package.units}
        try:
            for batch in file.iter_batches(_ROWS_PER_BATCH):
                for row in batch.slice(min(start, len(batch))).to_pylist():
                    name = row.pop("id", None)
                    for column in ignored:
                        row.pop(column, None)
                    given = {one: row.pop(one) for one in covariates if one in row}
                    yield {
                        "id": name,
                        **({"covariates": given} if covariates else {}),
                        "positions": {axis: row.pop(axis) for axis in axes if axis in row},
                        "values": row,
                        "units": units,
                    }
                start = max(0, start - len(batch))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


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


def _check_columns(path: Path, schema: Any, inputs: list[str], ignored: set[str]) -> None:
    """Reject a table with one row per observation, and columns that are no inputs of the model."""
    import pyarrow as pa

    single = [
        field.name
        for field in schema
        if field.name not in ignored and not pa.types.is_nested(field.type)
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

    Predictions are first written in parts, ``OUTPUT.parts/00000.parquet`` and so on: an interrupted
    call loses at most one. Parts of another input or another model are discarded.

    Columns: ``id``; ``label`` and ``probabilities`` (map), or ``features`` (list) of an encoder; the
    entries of ``lineage``, equal in every row; ``scored_at`` (UTC). ``package`` comes from
    ``registry_client.load``. ``progress`` is called with the number of series done, including those
    of an earlier call. Returns the number of series.

    Raises:
        ValueError: a series does not fit; the message names its row. Earlier parts are kept.
    """
    import pyarrow.parquet as pq

    parts = output.with_name(f"{output.name}.parts")
    files = [source] if source.is_file() else sorted(source.iterdir())
    stamps = [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]
    fingerprint = digest_of([str(source.absolute()), stamps, split, lineage, SERIES_PER_PART])
    state = parts / _STATE
    if (
        not state.is_file()
        or read_json(state, schema_version=SCHEMA_VERSION)["fingerprint"] != fingerprint
    ):
        _remove(parts)
    done = sorted(parts.glob("[0-9]*.parquet"))
    n = sum(pq.read_metadata(part).num_rows for part in done)
    progress(n)
    rows = read_series(source, split, package, start=n)
    while part := list(islice(rows, SERIES_PER_PART)):
        path = parts / f"{n // SERIES_PER_PART:05d}.parquet"
        try:
            table = _score(package, part, lineage)
        except ValueError as error:
            rows_of_part = f"rows {n} to {n + len(part) - 1} of {source}"
            raise ValueError(f"{rows_of_part}: {error}") from error
        if n == 0:  # not earlier, so that a rejected file leaves nothing behind
            parts.mkdir(parents=True, exist_ok=True)
            write_json(state, {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint})
        aside = path.with_suffix(".part")
        pq.write_table(table, aside)
        aside.replace(path)
        n += len(part)
        progress(n)
    if n == 0:
        raise ValueError(f"{source} holds no series")
    aside = output.with_name(f".{output.name}.joining")
    paths = sorted(parts.glob("[0-9]*.parquet"))
    with pq.ParquetWriter(aside, pq.read_schema(paths[0]), compression="zstd") as writer:
        for path in paths:
            writer.write_table(pq.read_table(path))
    aside.replace(output)
    _remove(parts)
    return n


def _remove(parts: Path) -> None:
    """Remove our files from a folder of parts, and the folder if it then is empty."""
    if not parts.is_dir():
        return
    (parts / _STATE).unlink(missing_ok=True)  # first: parts without it are not resumed
    for part in parts.glob("[0-9][0-9][0-9][0-9][0-9].par*"):  # .parquet, or .part while written
        part.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()


def _score(package: Any, rows: list[Row], lineage: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    predictions = package.predict(series_of(package, rows))
    columns: dict[str, Any] = {"id": pa.array([a.id for a in predictions], pa.string())}
    if hasattr(predictions[0], "features"):
        features = [a.features for a in predictions]
        columns["features"] = pa.array(features, pa.list_(pa.float64()))
    else:
        columns["label"] = pa.array([a.label for a in predictions], pa.string())
        probabilities = [list(a.probabilities.items()) for a in predictions]
        columns["probabilities"] = pa.array(probabilities, pa.map_(pa.string(), pa.float64()))
    for name, value in lineage.items():
        columns[name] = pa.array([value] * len(predictions), pa.string())
    now = datetime.now(UTC)
    columns["scored_at"] = pa.array([now] * len(predictions), pa.timestamp("ms", tz="UTC"))
    return pa.table(columns)


class EmbeddingFailed(RuntimeError):
    """The features could not be computed; the message says why."""


class FeatureMedians(NamedTuple):
    """Median of every encoder feature over ``n`` series."""

    n: int
    center: list[float]


def embed_medians(
    model: Path, files: Sequence[Path], environment: Mapping[str, str], timeout_s: float
) -> FeatureMedians:
    """Embed the series of files in a new process; of many series, 1000 evenly spaced ones.

    The caller, the daemon that watches for drift, must not import torch. ``model`` is the verified
    folder of a registered encoder. Observations that are not finite are left out.

    Raises:
        EmbeddingFailed: no result within ``timeout_s``, or the encoder does not accept the series.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(model), str(_N_EMBEDDED), *map(str, files)],
            env={**environment, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired as error:
        raise EmbeddingFailed(f"the encoder did not finish within {timeout_s:g} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EmbeddingFailed(lines[-1])
    return FeatureMedians(**json.loads(done.stdout.splitlines()[-1]))


def _observed(package: Any, row: Row) -> Row | None:
    """A row without observations that are not finite; None if none is left.

    A value that is not finite is missing, if the model accepts missing values.
    """
    parts = (("positions", package.axes), ("values", package.channels))
    columns = {
        (part, one["name"]): row[part].get(one["name"]) or []
        for part, names in parts
        for one in names
    }
    if len({len(column) for column in columns.values()}) != 1:
        raise ValueError(f"series {row['id']!r}: its lists differ in length, or one is missing")
    entries = {key: [_usable(entry) for entry in column] for key, column in columns.items()}
    rows = list(zip(*(entries[key] for key in entries if key[0] == "positions"), strict=True))
    values = list(zip(*(entries[key] for key in entries if key[0] == "values"), strict=True))
    enough = any if getattr(package, "may_miss", False) else all
    kept = [
        k
        for k, (at, numbers) in enumerate(zip(rows, values, strict=True))
        if None not in at and enough(number is not None for number in numbers)
    ]
    if not kept:
        return None
    found: dict[str, dict[str, list[Any]]] = {"positions": {}, "values": {}}
    for (part, name), column in entries.items():
        found[part][name] = [column[k] for k in kept]
    return row | found


def _usable(entry: Any) -> Any:
    """The entry, or None if it is no finite number; text stays."""
    return entry if isinstance(entry, str) or (entry is not None and np.isfinite(entry)) else None


def _print_medians(model: str, n_max: str, *names: str) -> None:
    import torch

    from roma_core.serving.registry_client import load

    torch.set_num_threads(1)
    files = [Path(name) for name in names]
    try:
        package = load(Path(model))
        step = -(-sum(count_series(file, "test") for file in files) // int(n_max)) or 1
        rows = chain.from_iterable(read_series(file, "test", package) for file in files)
        found = (_observed(package, row) for row in islice(rows, 0, None, step))
        series = series_of(package, (one for one in found if one is not None))
        features = package.outputs(series)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(" ".join(str(error).split()))
    print(json.dumps({"n": len(series), "center": np.median(features, axis=0).tolist()}))


if __name__ == "__main__":
    _print_medians(*sys.argv[1:])
