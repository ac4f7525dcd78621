"""The files of a data set: writing columns row by row, and telling a damaged file from a sound one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from roma_core.data.errors import DataError
from roma_core.data.schema import SPLITS, FileRecord, Manifest, Split, SplitCounts
from roma_core.files import digest_of, read_json, sha256_of

MANIFEST = "manifest.json"


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
        return Manifest.model_validate(read_json(folder / MANIFEST, schema_version=1))
    except ValueError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error


def manifest_digest(manifest: Manifest) -> str:
    """The digest a manifest should carry; see ``Manifest.digest``."""
    document = manifest.model_dump(mode="json", exclude={"digest": True, "provenance": {"source"}})
    if manifest.repairs is None:  # sets that needed none keep the digest they had before repairs
        del document["repairs"]
    return digest_of(document)


def damage(folder: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the bytes of a data-set folder, one line per file; empty if sound."""
    found = []
    if (expected := manifest_digest(manifest)) != manifest.digest:
        found.append(
            f"{MANIFEST}: its content has the digest {expected}, it says {manifest.digest}"
        )
    needed = {"values.npy", "positions.npy", "offsets.npy", "splits.npy", "ids.json"}
    needed |= {"labels.npy"} if manifest.data_schema.classes else set()
    if set(manifest.files) - {"groups.json"} != needed:
        return [*found, f"{MANIFEST}: lists {sorted(manifest.files)}, expected {sorted(needed)}"]
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif (size := path.stat().st_size) != record.n_bytes:
            found.append(f"{name}: {size} bytes, expected {record.n_bytes}")
        elif (sha256 := sha256_of(path)) != record.sha256:
            found.append(f"{name}: sha256 {sha256}, expected {record.sha256}")
    return found
