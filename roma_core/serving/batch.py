"""Apply a model to series: Parquet files, JSON lines, or a data-set folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from roma_core.serving.pyfunc_model import parse_series
from roma_core.serving.registry_client import series_of

if TYPE_CHECKING:
    import pyarrow as pa

SERIES_PER_PART = 2000
_FACTS = ("split", "label", "group")  # columns of `roma data export` that are no model inputs,
_TARGET = (b"role", b"target")  # as are columns with this field metadata
_QUERIES = "queries"  # column of an autoencoder's input: a struct of lists, or a list of structs
Row = dict[str, Any]


def input_files(source: Path | str) -> list[str]:
    """An input's file or data set, or all Parquet files below a folder or a bucket, sorted by name.

    A bucket is a URL that fsspec reads, such as ``s3://bucket/folder``. Raises ValueError if there is
    nothing to read.
    """
    import fsspec

    where = str(source)
    try:
        fs, root = fsspec.core.url_to_fs(where)
        if fs.isfile(root) or fs.exists(f"{root}/manifest.json"):
            return [where]
        found = sorted(path for path in fs.find(root) if path.endswith(".parquet"))
    except (ImportError, OSError) as error:  # the package of a protocol, or an answer of its server
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{where} holds no Parquet files, and is no data set; name one that is")
    return [fs.unstrip_protocol(path) for path in found] if "://" in where else found


def read_series(source: Path | str, split: Any, package: Any) -> Iterator[Row]:
    """Series in the form of a server's request, in the order of files and their rows.

    The unit of a Parquet column is the metadata ``unit`` of its field, or else the model's unit.
    Targets of an exported data set are left out, unless they are inputs of the model. ``split`` is
    that of a data-set folder; ``package`` is the loaded model. Raises ValueError if a file has
    another format, or a line is not a valid series.
    """
    for file in input_files(source):
        for _, chunk in read_chunks(file, split, package):
            yield from _rows(package, chunk)


def read_chunks(
    file: str, split: Any, package: Any, wanted: Collection[int] | None = None
) -> Iterator[tuple[int, list[Row] | pa.RecordBatch]]:
    """The series of a file, ``SERIES_PER_PART`` at a time, with their number: all, or those wanted."""
    if Path(file).is_dir():
        from roma_core.data.store import StoredDataset, raw_series

        subset = StoredDataset(file).split(split)
        for k, start in enumerate(range(0, len(subset), SERIES_PER_PART)):
            if wanted is None or k in wanted:
                yield k, list(raw_series(subset, range(len(subset))[start:][:SERIES_PER_PART]))
    elif file.endswith(".parquet"):
        yield from _parquet_chunks(file, package, wanted)
    elif file.endswith(".jsonl"):
        with Path(file).open(encoding="utf-8-sig") as lines:
            for k in count():
                if not (part := list(islice(lines, SERIES_PER_PART))):
                    return
                if wanted is None or k in wanted:
                    first = k * SERIES_PER_PART + 1
                    yield k, [_of_line(package, file, n, x) for n, x in enumerate(part, first)]
    else:
        raise ValueError(f"{file}: expected a data-set folder, .parquet or .jsonl")


def _of_line(package: Any, file: str, number: int, line: str) -> Row:
    try:
        (series,) = parse_series([json.loads(line)])
    except ValueError as error:
        reason = str(error).removeprefix("series 0: ")
        raise ValueError(f"{file}, line {number}: {reason}") from error
    row = series.model_dump()
    if series.observations is not None and hasattr(package, "columns_of"):
        positions, values = package.columns_of(series, f"{file}, line {number}")
        row |= {"positions": positions, "values": values, "observations": None}
    return row


def count_series(file: Path | str, split: Any) -> int:
    """Number of series of a file or data set."""
    if Path(file).is_dir():
        from roma_core.data.store import StoredDataset

        return len(StoredDataset(file, verify=False).split(split))
    if str(file).endswith(".parquet"):
        with _parquet_file(file) as parquet:
            return int(parquet.metadata.num_rows)
    with Path(file).open("rb") as lines:
        return sum(1 for _ in lines)


def assumed_units(source: Path | str, package: Any) -> Mapping[str, str]:
    """Columns of the first Parquet file without a unit, with the model's unit, which is used for them."""
    if not (file := input_files(source)[0]).endswith(".parquet"):
        return {}
    with _parquet_file(file) as parquet:
        given = _given_units(parquet.schema_arrow)
    return {
        name: unit
        for name, unit in package.units.items()
        if unit not in ("1", name) and name not in given
    }


def _parquet_chunks(
    file: str, package: Any, wanted: Collection[int] | None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    import pyarrow as pa

    inputs = [one["name"] for one in (*package.axes, *package.channels)]
    # the code of the model may be older than this
    covariates = [one["name"] for one in getattr(package, "covariates", [])]
    with _parquet_file(file) as parquet:
        schema = parquet.schema_arrow
        targets = [field.name for field in schema if _TARGET in (field.metadata or {}).items()]
        ignored = [name for name in (*_FACTS, *targets) if name not in (*inputs, *covariates)]
        _check_columns(file, schema, inputs, {"id", *ignored, *covariates})
        columns = [name for name in schema.names if name not in ignored]
        try:
            groups = range(parquet.metadata.num_row_groups)
            ends = np.cumsum([0, *(parquet.metadata.row_group(k).num_rows for k in groups)])
            first = min(wanted) if wanted else 0
            start = int(np.searchsorted(ends, first * SERIES_PER_PART, side="right")) - 1
            batches = parquet.iter_batches(SERIES_PER_PART, [*groups[start:]], columns=columns)
            for k, batch in enumerate(
                _parts(batches, first * SERIES_PER_PART - ends[start]), first
            ):
                if wanted is None or k in wanted:
                    yield k, batch
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is damaged: {error}; write it again") from error


def _parts(batches: Iterator[pa.RecordBatch], skip: int) -> Iterator[pa.RecordBatch]:
    """Parts of ``SERIES_PER_PART`` rows without the first ``skip``; the last may be shorter."""
    import pyarrow as pa

    held: list[pa.RecordBatch] = []
    for batch in batches:
        held.append(batch.slice(min(skip, len(batch))))
        skip -= min(skip, len(batch))
        if sum(map(len, held)) >= SERIES_PER_PART:
            rows = pa.Table.from_batches(held)
            yield rows.slice(0, SERIES_PER_PART).combine_chunks().to_batches()[0]
            held = rows.slice(SERIES_PER_PART).to_batches()
    if sum(map(len, held)):
        yield pa.Table.from_batches(held).combine_chunks().to_batches()[0]


def _rows(package: Any, chunk: list[Row] | pa.RecordBatch) -> list[Row]:
    if isinstance(chunk, list):
        return chunk
    axes = [axis["name"] for axis in package.axes]
    covariates = [one["name"] for one in getattr(package, "covariates", [])]
    units, rows = _units(package, chunk), []
    has_queries = package.golden_field == "interpolation"
    for row in chunk.to_pylist():
        name = row.pop("id", None)
        given = {one: row.pop(one) for one in covariates if one in row}
        asked = {_QUERIES: row.pop(_QUERIES)} if has_queries and _QUERIES in row else {}
        rows.append(
            {
                "id": name,
                **asked,
                **({"covariates": given} if covariates else {}),
                "positions": {axis: row.pop(axis) for axis in axes if axis in row},
                "values": row,
                "units": units,
            }
        )
    return rows


def _outputs(package: Any, chunk: pa.RecordBatch) -> tuple[pa.Array, Any]:
    """Ids, and outputs ``(n, K)`` straight from Arrow's arrays; ValueError if rows must be looked at."""
    import pyarrow as pa
    import pyarrow.compute as pc

    of_series = [one["name"] for one in package.covariates if one["name"] in chunk.schema.names]
    columns: dict[str, Any] = {}
    lengths: Any = None
    for name in chunk.schema.names:
        if name == "id" or name in of_series:
            continue
        column = chunk[name]
        counts = pc.list_value_length(column)
        lengths = counts if lengths is None else lengths
        entries, kind = column.flatten(), column.type.value_type
        if column.null_count or not counts.equals(lengths):
            raise ValueError("a list is missing, or of another length")
        if pa.types.is_floating(kind) or pa.types.is_integer(kind):
            columns[name] = entries.cast(pa.float64()).to_numpy(zero_copy_only=False)
        elif pa.types.is_string(kind) and not entries.null_count:
            words = entries.dictionary_encode()
            columns[name] = (words.indices.to_numpy(), words.dictionary.to_pylist())
        else:
            raise ValueError(f"{name} holds {kind}")
    given = chunk.select(of_series).to_pylist() if of_series else []
    numbers = np.asarray(lengths, np.int64)
    outputs = package.outputs_of_columns(numbers, columns, given, _units(package, chunk))
    ids = chunk["id"] if "id" in chunk.schema.names else pa.nulls(len(chunk), pa.string())
    if not (pa.types.is_string(ids.type) or pa.types.is_integer(ids.type)):
        raise ValueError(f"id holds {ids.type}")
    return ids.cast(pa.string()), outputs


def _units(package: Any, chunk: pa.RecordBatch) -> dict[str, str]:
    units = dict(package.units) | _given_units(chunk.schema)
    return {name: unit for name, unit in units.items() if name in package.units}


@contextmanager
def _parquet_file(path: Path | str) -> Iterator[Any]:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(str(path), "rb") as raw:
        try:
            file = pq.ParquetFile(raw)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"{path} cannot be read as Parquet: {error}; write it again"
            ) from error
        yield file


def _check_columns(path: str, schema: Any, inputs: list[str], ignored: set[str]) -> None:
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


def score(package: Any, chunk: list[Row] | pa.RecordBatch, lineage: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    ids: Any = None
    if package.golden_field in ("targets", "interpolation"):
        return _with_lineage(_by_name(package, chunk), lineage)
    if not isinstance(chunk, list) and hasattr(package, "outputs_of_columns"):
        try:
            ids, outputs = _outputs(package, chunk)
        except (ValueError, TypeError, pa.ArrowException):  # row by row: it names the series
            ids = None
    if ids is None:
        series = series_of(package, _rows(package, chunk))
        ids = pa.array([one.id for one in series], pa.string())
        outputs = package.outputs(series)
    n, n_outputs = outputs.shape
    columns: dict[str, Any] = {"id": ids}
    flat, offsets = (
        pa.array(outputs.ravel()),
        pa.array(np.arange(n + 1, dtype=np.int32) * n_outputs),
    )
    if package.golden_field == "features":
        columns["features"] = pa.ListArray.from_arrays(offsets, flat)
    else:
        labels = pa.array(package.classes, pa.string())
        columns["label"] = labels.take(pa.array(outputs.argmax(axis=1)))
        names = labels.take(pa.array(np.tile(np.arange(n_outputs), n)))
        columns["probabilities"] = pa.MapArray.from_arrays(offsets, names, flat)
    return _with_lineage(columns, lineage)


def _by_name(package: Any, chunk: list[Row] | pa.RecordBatch) -> dict[str, Any]:
    """Columns of a regressor: maps of targets to numbers, or to lists of those of observations.

    Those of an autoencoder are maps of channels to a list with a number per query.
    """
    import pyarrow as pa

    answers = package.predict(series_of(package, _rows(package, chunk)))
    has_queries = package.golden_field == "interpolation"
    of_lists = has_queries or package.per_observation
    number = pa.list_(pa.float64()) if of_lists else pa.float64()
    fields = ("mean" if has_queries else "values", "std")
    columns = {"id": pa.array([one.id for one in answers], pa.string())}
    for field in fields if answers[0].std else fields[:1]:
        entries = [list(getattr(one, field).items()) for one in answers]
        columns[field] = pa.array(entries, pa.map_(pa.string(), number))
    return columns


def _with_lineage(columns: dict[str, Any], lineage: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    n = len(columns["id"])
    for name, value in lineage.items():
        columns[name] = pa.array([value] * n, pa.string())
    columns["scored_at"] = pa.array([datetime.now(UTC)] * n, pa.timestamp("ms", tz="UTC"))
    return pa.table(columns)
