"""On-disk format of a data set: its files, ``manifest.json``, writing and verification of both.

A data set is a folder of flat columns. Row i of ``values.npy`` and ``positions.npy`` is one
observation; series k owns rows ``offsets[k]:offsets[k + 1]``. Beyond 67 million observations, these
columns continue in ``values-1.npy``, ``values-2.npy`` and so on, each with whole series.

    manifest.json      ``Manifest``
    values.npy         (n_observations, n_channels) float32, as delivered: not normalised
    positions.npy      (n_observations, n_axes) float64, as delivered: not normalised
    offsets.npy        (n_series + 1,) int64
    targets.npy        (n_observations, n_targets) float32, as delivered, or (n_series, n_targets) if
                       they are of whole series; absent without targets
    labels.npy         (n_series,) int64 index into ``classes``; absent without labels
    splits.npy         (n_series,) int8 index into ``SPLITS``
    ids.json           list of n_series strings
    groups.json        list of n_series strings; absent without groups

Version 2 of the format added targets, version 4 their mean, std and level. A set without them is
written, and has the digest, as in version 1 or 3; all versions are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from roma_core.files import digest_of, read_json, sha256_of
from roma_core.schema import DataError, DataSchema
from roma_core.settings import Frozen, validation_errors

MANIFEST = "manifest.json"
VERSIONS = (1, 2, 3, 4)  # of the format, that can be read
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Leakage = Literal["error", "warn", "ignore"]
_HASH_THREADS = 4  # hashing a file releases the interpreter lock


class FileRecord(Frozen):
    """Size and sha256 of one file of the folder."""

    n_bytes: int
    sha256: str


class SplitCounts(Frozen):
    n_series: int
    n_observations: int


class Irregularity(Frozen):
    """Observations that were dropped on purpose, counted so that an ineffective drop is noticed."""

    drop_rate: float = 0.0
    seed: int = 0
    n_observations_before: int
    n_dropped: int


class Repairs(Frozen):
    """Number of repairs made while building; see ``cleaning.RepairOptions``."""

    series_sorted: int = Field(0, description="Series whose observations were out of order.")
    duplicate_observations: int = Field(0, description="Dropped, or merged into a mean.")
    observations_not_finite: int = Field(0, description="Observations dropped.")
    empty_series_dropped: int = 0
    observations_without_values: int = Field(0, exclude_if=lambda n: n == 0)
    """Dropped, of series with missing values."""
    series_without_targets: int = Field(0, exclude_if=lambda n: n == 0)
    """Dropped, as a target of theirs is not finite."""


class Provenance(Frozen):
    """Where the data came from, down to the bytes."""

    source: str = Field(description="The source's registered name and its parameters, as text.")
    files: dict[str, str] = Field(description="sha256 of every input file, by name.")
    citation: str = ""
    licence: str = ""


class Manifest(Frozen):
    """Everything about a data set except its numbers."""

    schema_version: Literal[1, 2, 3, 4] = 1
    """4 for a set with targets (2 for an older one), else 3 for one with missing values,
    categories, covariates or the per_channel layout, 1 for others."""
    name: str
    data_schema: DataSchema
    counts: dict[Split, SplitCounts]
    shards: tuple[int, ...] = ()
    """First series of every further file of values, positions and targets."""
    split_rule: str
    irregularity: Irregularity | None = None
    repairs: Repairs | None = None
    # manifests without it keep their digest
    leakage: Leakage = Field("error", exclude_if=lambda leakage: leakage == "error")
    """What a group or equal content in two splits is."""
    provenance: Provenance
    files: dict[str, FileRecord]
    digest: str
    """sha256 over every other field but `provenance.source`: the version of the data. Equal input
    gives an equal digest."""

    def computed_digest(self) -> str:
        """What ``digest`` must be, from the other fields."""
        document = self.model_dump(mode="json", exclude={"digest": True, "provenance": {"source"}})
        for name in ("repairs", "shards"):  # sets without them have the digest of older manifests
            if not document[name]:
                del document[name]
        return digest_of(document)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a data-set folder.

    Raises:
        DataError: there is none, or it is damaged or of another version of the software.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder} has no {MANIFEST}; build a data set: roma data build")
    try:
        document = read_json(path)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version not in VERSIONS:
            raise ValueError(
                f"{path} has schema_version {version!r}, this version of the software reads "
                f"{' and '.join(map(str, VERSIONS))}; use another one, or build the data set again"
            )
        return Manifest.model_validate(document)
    except ValidationError as error:
        problems = "; ".join(map(str, validation_errors(error, Manifest)))
        raise DataError(f"{path} is invalid: {problems}") from error
    except ValueError as error:
        raise DataError(f"{folder} cannot be read: {error}") from error


def large_columns(schema: DataSchema) -> dict[str, tuple[type[np.generic], int]]:
    """Names of the columns with a row per observation, with their dtypes and widths."""
    columns: dict[str, tuple[type[np.generic], int]] = {
        "positions": (np.float64, len(schema.axes)),
        "values": (np.float32, schema.n_values),
    }
    if schema.targets and schema.target_level == "observation":
        columns["targets"] = np.float32, len(schema.targets)
    return columns


def series_columns(schema: DataSchema) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
    """Names of the columns with a row per series, with their dtypes and the shapes of a row."""
    columns: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {"splits": (np.int8, ())}
    if schema.classes:
        columns["labels"] = np.int64, ()
    if schema.covariates:
        columns["covariates"] = np.float32, (len(schema.covariates),)
    if schema.targets and schema.target_level == "series":
        columns["targets"] = np.float32, (len(schema.targets),)
    return columns


def shard_name(column: str, k: int) -> str:
    """Name of the k-th file of one of the ``large_columns``."""
    return f"{column}.npy" if k == 0 else f"{column}-{k}.npy"


def record_of(path: Path) -> FileRecord:
    return FileRecord(n_bytes=path.stat().st_size, sha256=sha256_of(path))


def records_of(folder: Path) -> dict[str, FileRecord]:
    """Records of every file of a folder, by name, in order."""
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        return dict(zip([p.name for p in paths], threads.map(record_of, paths), strict=True))


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


def find_damage(folder: Path, manifest: Manifest) -> list[str]:
    """A line per file of a data-set folder that is missing or differs from its manifest."""
    found = []
    if (expected := manifest.computed_digest()) != manifest.digest:
        found.append(
            f"{MANIFEST}: its content has the digest {expected}, it says {manifest.digest}"
        )
    columns, shards = large_columns(manifest.data_schema), range(len(manifest.shards) + 1)
    needed = {"offsets.npy", "ids.json"}
    needed |= {f"{column}.npy" for column in series_columns(manifest.data_schema)}
    needed |= {shard_name(column, k) for column in columns for k in shards}
    if set(manifest.files) - {"groups.json"} != needed:
        return [*found, f"{MANIFEST}: lists {sorted(manifest.files)}, expected {sorted(needed)}"]

    def damage(name: str) -> str | None:
        path, record = folder / name, manifest.files[name]
        if not path.is_file():
            return f"{name}: missing"
        if (size := path.stat().st_size) != record.n_bytes:
            return f"{name}: {size} bytes, expected {record.n_bytes}"
        if (sha256 := sha256_of(path)) != record.sha256:
            return f"{name}: sha256 {sha256}, expected {record.sha256}"
        return None

    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        return [*found, *filter(None, threads.map(damage, manifest.files))]


class ColumnFiles(ExitStack):
    """Files of a folder to which data larger than memory are appended, from their ``sizes`` on.

    All other files of the folder are removed.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.folder, self._sizes = folder, sizes
        self._opened: dict[str, IO[bytes]] = {}
        for path in folder.iterdir():
            if path.name not in sizes:
                path.unlink()

    def _open(self, name: str) -> IO[bytes]:
        file = self.enter_context(_synced(self.folder / name, self._sizes.get(name, 0)))
        return self._opened.setdefault(name, file)

    @property
    def n_bytes(self) -> int:
        return sum(file.tell() for file in self._opened.values())

    def sync(self) -> dict[str, int]:
        """Sizes of all files, which are on disk now."""
        for file in self._opened.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._opened.items()}

    def column(
        self, name: str, dtype: type[np.generic], n_columns: int
    ) -> Callable[[NDArray[Any]], object]:
        """Appends ``(n, n_columns)`` rows to an ``.npy`` file.

        The header, in which numpy leaves room for the first axis to grow, is written again at the end.
        """
        file, row = self._open(name), np.dtype((dtype, n_columns))

        def write_header(n_rows: int) -> None:
            file.seek(0)
            descr = np.lib.format.dtype_to_descr(row.base)
            header = {"descr": descr, "fortran_order": False, "shape": (n_rows, n_columns)}
            np.lib.format.write_array_header_1_0(file, header)

        write_header(0)
        start, _ = file.tell(), file.seek(0, os.SEEK_END)
        self.callback(lambda: write_header((file.seek(0, os.SEEK_END) - start) // row.itemsize))
        return lambda rows: file.write(np.ascontiguousarray(rows, dtype=dtype).data)

    def texts(self, name: str) -> Callable[[str], None]:
        """Appends texts to a JSON file of a list, one by one."""
        file = self._open(name)
        separator = ", " if file.tell() > 1 else "["

        def append(text: str) -> None:
            nonlocal separator
            file.write((separator + json.dumps(text, ensure_ascii=False)).encode())
            separator = ", "

        self.callback(lambda: file.write(b"]" if separator == ", " else b"[]"))
        return append


def write_column(path: Path, column: NDArray[Any]) -> None:
    with _synced(path) as file:
        np.lib.format.write_array(file, column, version=(1, 0), allow_pickle=False)


@contextmanager
def _synced(path: Path, size: int = 0) -> Iterator[IO[bytes]]:
    """The file, cut to its first bytes, at their end."""
    with path.open("r+b" if size else "wb") as file:
        file.truncate(size)
        file.seek(size)
        yield file
        file.flush()
        os.fsync(file.fileno())
