"""The files of a data set: writing columns row by row, and telling a damaged file from a sound one."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from roma_core.data.errors import DataError
from roma_core.data.mistakes import mistakes
from roma_core.data.schema import (
    SPLITS,
    DataSchema,
    FileRecord,
    Manifest,
    Split,
    SplitCounts,
)
from roma_core.files import digest_of, read_json, sha256_of

MANIFEST = "manifest.json"
VERSIONS = (1, 2)  # of the format, that can be read
_HASHERS = 4  # threads; hashing a file releases the interpreter


def large_columns(schema: DataSchema) -> tuple[str, ...]:
    """Names of the columns with a row per observation."""
    return ("values", "positions", *(("targets",) if schema.targets else ()))


def shard_name(column: str, k: int) -> str:
    """Name of the k-th file of one of the ``large_columns``."""
    return f"{column}.npy" if k == 0 else f"{column}-{k}.npy"


class GrowingColumn:
    """A ``.npy`` file to which rows are appended, for data that does not fit in memory.

    numpy leaves room in the header for the first axis to grow, so the header is written once with
    no rows, to hold the place, and once more with all of them when the ``with`` block ends. After an
    error in the block the file stays incomplete.
    """

    def __init__(self, path: Path, dtype: type[np.generic], n_columns: int) -> None:
        self._dtype = np.dtype(dtype)
        self._n_columns = n_columns
        self._n_rows = 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, rows: NDArray[Any]) -> None:
        """Add ``(n, n_columns)`` rows."""
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._n_rows += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error is None:
                self._file.seek(0)
                self._write_header()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._n_rows, self._n_columns),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


class ShardedColumn:
    """A ``GrowingColumn`` that goes on in a new file when it is told to."""

    def __init__(self, folder: Path, column: str, dtype: type[np.generic], n_columns: int) -> None:
        self._folder, self._column, self._kind = folder, column, (dtype, n_columns)
        self._n_files = 0
        self._open_next()

    def _open_next(self) -> None:
        path = self._folder / shard_name(self._column, self._n_files)
        self._file = GrowingColumn(path, *self._kind)
        self._n_files += 1

    def append(self, rows: NDArray[Any]) -> None:
        """Add ``(n, n_columns)`` rows."""
        self._file.append(rows)

    def next_file(self) -> None:
        """Complete this file; what is appended from now on goes to the next."""
        self._file.__exit__(None)
        self._open_next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._file.__exit__(error)


class GrowingList:
    """A JSON file of a list of texts, written one by one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[")
        self._separator = ""

    def append(self, text: str) -> None:
        self._file.write(self._separator + json.dumps(text, ensure_ascii=False))
        self._separator = ", "

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if error is None:
                self._file.write("]")
                self._file.flush()
                os.fsync(self._file.fileno())


def write_column(path: Path, array: NDArray[Any]) -> None:
    """Write a whole ``.npy`` file and bring it to the disk."""
    with path.open("wb") as file:
        np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def records_of(folder: Path) -> dict[str, FileRecord]:
    """Size and sha256 of every file of a folder, by name, in order."""
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(_HASHERS) as threads:
        return dict(zip([p.name for p in paths], threads.map(record_of, paths), strict=True))


def record_of(path: Path) -> FileRecord:
    return FileRecord(n_bytes=path.stat().st_size, sha256=sha256_of(path))


def split_counts(
    offsets: NDArray[np.int64], split_column: NDArray[np.int8]
) -> dict[Split, SplitCounts]:
    """Series and observations of every split, the empty ones too."""
    lengths = np.diff(offsets)
    return {
        split: SplitCounts(
            n_series=int((split_column == k).sum()),
            n_observations=int(lengths[split_column == k].sum()),
        )
        for k, split in enumerate(SPLITS)
    }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data-set folder.

    Raises:
        DataError: there is none, or it is damaged or of another version of the software.
    """
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is no data set: it has no {MANIFEST}")
    try:
        document = read_json(folder / MANIFEST)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version not in VERSIONS:
            raise ValueError(
                f"{folder / MANIFEST} has schema_version {version!r}, this version of the software "
                f"reads {' and '.join(map(str, VERSIONS))}; use the version that wrote it, or build "
                f"the data set again"
            )
        return Manifest.model_validate(document)
    except ValidationError as error:
        wrong = "; ".join(mistakes(error, Manifest))
        raise DataError(f"{folder / MANIFEST} is not as it was written: {wrong}") from error
    except ValueError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error


def manifest_digest(manifest: Manifest) -> str:
    """The digest a manifest should carry; see ``Manifest.digest``."""
    document = manifest.model_dump(mode="json", exclude={"digest": True, "provenance": {"source"}})
    for name in ("repairs", "shards"):  # sets without them keep the digest they had before
        if not document[name]:
            del document[name]
    return digest_of(document)


def damage(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the bytes of a data-set folder, one line per file; empty if sound."""
    found = []
    if (expected := manifest_digest(manifest)) != manifest.digest:
        found.append(
            f"{MANIFEST}: its content has the digest {expected}, it says {manifest.digest}"
        )
    needed = {"offsets.npy", "splits.npy", "ids.json"}
    needed |= {
        shard_name(column, k)
        for column in large_columns(manifest.data_schema)
        for k in range(len(manifest.shards) + 1)
    }
    needed |= {"labels.npy"} if manifest.data_schema.classes else set()
    if set(manifest.files) - {"groups.json"} != needed:
        return [*found, f"{MANIFEST}: lists {sorted(manifest.files)}, expected {sorted(needed)}"]
    with ThreadPoolExecutor(_HASHERS) as threads:
        paths = [folder / name for name in manifest.files]
        return found + [
            text for text in threads.map(_damage_of, paths, manifest.files.values()) if text
        ]


def _damage_of(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path.name}: missing"
    if (size := path.stat().st_size) != record.n_bytes:
        return f"{path.name}: {size} bytes, expected {record.n_bytes}"
    if (sha256 := sha256_of(path)) != record.sha256:
        return f"{path.name}: sha256 {sha256}, expected {record.sha256}"
    return None
