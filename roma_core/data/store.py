"""A data set on disk, opened for reading: samples by index, as fast as a slice.

The layout is that of ``roma_core.data.schema``. Columns are memory-mapped, so any number of
processes share one copy in the page cache, and a worker process costs nothing.

The files of a data set: writing columns row by row, and telling a damaged file from a sound one.
Series of a stored data set as a consumer of the served model would send them.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from roma_core.data.ragged import RaggedBatch
from roma_core.data.schema import SPLITS, FileRecord, Manifest, Split, SplitCounts
from roma_core.files import digest_of, read_json, sha256_of
from roma_core.hashing import hash_ints, hash_text
from roma_core.schema import DataError, DataSchema, Normaliser
from roma_core.settings import validation_errors

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
        wrong = "; ".join(map(str, validation_errors(error, Manifest)))
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


Sample = dict[str, Any]


class StoredDataset:
    """All series of a data-set folder, whatever their split.

    Attributes:
        manifest, schema: what the data set says of itself.
        ids: the objects' ids, by row; read when first asked for.
        groups: their groups, by row, or None without groups; read when first asked for.
        offsets: ``(n_series + 1,)`` int64; series i is observations ``offsets[i]:offsets[i + 1]``.
        lengths: ``(n_series,)`` int64 observations of each series, at least 1.
        labels: ``(n_series,)`` int64 index into ``schema.classes``, or None without labels.
        splits: ``(n_series,)`` int8 index into ``SPLITS``.
    """

    def __init__(self, path: Path | str, verify: bool = True) -> None:
        """Open a folder.

        Args:
            path: the folder that holds ``manifest.json``.
            verify: read every file once and compare its sha256 with the manifest's.

        Raises:
            DataError: there is no data set, or a file is damaged; the text names it.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if verify and (found := damage(self.path, self.manifest)):
            raise DataError(
                f"the data set {self.path} is damaged: {'; '.join(found)}; remove the folder and "
                f"build it again"
            )
        self.schema: DataSchema = self.manifest.data_schema
        self._firsts = [0, *self.manifest.shards]  # series of each shard
        files = {
            column: [self._column(shard_name(column, k), mapped=True) for k in self._shard_numbers]
            for column in large_columns(self.schema)
        }
        self._values, self._positions = files["values"], files["positions"]
        self._targets = files.get("targets")
        self.offsets: NDArray[np.int64] = self._column("offsets.npy")
        self.lengths: NDArray[np.int64] = np.diff(self.offsets)
        self.splits: NDArray[np.int8] = self._column("splits.npy")
        self.labels: NDArray[np.int64] | None = (
            self._column("labels.npy") if self.schema.classes else None
        )
        self._normaliser = Normaliser(self.schema)

    @property
    def _shard_numbers(self) -> range:
        return range(len(self._firsts))

    @cached_property
    def ids(self) -> list[str]:
        return read_json(self.path / "ids.json")

    @cached_property
    def groups(self) -> list[str] | None:
        has_groups = "groups.json" in self.manifest.files
        return read_json(self.path / "groups.json") if has_groups else None

    def _column(self, name: str, mapped: bool = False) -> NDArray[Any]:
        array = np.load(self.path / name, mmap_mode="r" if mapped else None, allow_pickle=False)
        return array.view(np.ndarray)  # slicing a plain view is 10 times faster than a memmap

    def __reduce__(self) -> tuple[type[StoredDataset], tuple[Path, bool]]:
        return StoredDataset, (self.path, False)  # a worker maps the files anew, copies no data

    def __len__(self) -> int:
        return len(self.lengths)

    def raw(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Series i as delivered: positions ``(N, D)`` float64 and values ``(N, C)`` float32.

        Both are read-only views of the file.
        """
        k, rows = self._place(i)
        return self._positions[k][rows], self._values[k][rows]

    def targets(self, i: int) -> NDArray[np.float32] | None:
        """The targets of series i, ``(N, K)`` float32 as delivered; None without targets."""
        if self._targets is None:
            return None
        k, rows = self._place(i)
        return self._targets[k][rows]

    def _place(self, i: int) -> tuple[int, slice]:
        """The shard of series i, and its rows there."""
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"series {i} of a data set with {len(self.lengths)}")
        a, b = self.offsets.item(i), self.offsets.item(i + 1)  # slices of Python ints are faster
        if len(self._firsts) == 1:
            return 0, slice(a, b)
        k = bisect_right(self._firsts, i) - 1
        base = self.offsets.item(self._firsts[k])
        return k, slice(a - base, b - base)

    def shards(self) -> Iterator[RaggedBatch]:
        """The whole data set as delivered, a file at a time; see :meth:`parts`."""
        ends = [*self._firsts[1:], len(self)]
        targets = itertools.repeat(None, len(ends)) if self._targets is None else self._targets
        columns = (self._firsts, ends, self._positions, self._values, targets)
        for first, last, positions, values, of_targets in zip(*columns, strict=True):
            yield self._consecutive(first, last, positions, values, of_targets)

    def parts(self, n_observations: int) -> Iterator[RaggedBatch]:
        """The whole data set as delivered, whole series of about ``n_observations`` at a time.

        Its arrays are read-only views of the files, ``positions`` float64; its ``ids`` are rows.
        """
        for shard in self.shards():
            starts = shard.starts
            cuts = np.flatnonzero(
                np.diff((starts + shard.lengths) // n_observations, prepend=-1)
            ).tolist()
            for a, b in itertools.pairwise([*cuts, len(starts)]):
                rows = slice(starts[a], starts[b - 1] + shard.lengths[b - 1])
                targets = None if shard.targets is None else shard.targets[rows]
                first = int(shard.ids[0])
                yield self._consecutive(
                    first + a, first + b, shard.positions[rows], shard.values[rows], targets
                )

    def _consecutive(
        self, first: int, last: int, positions: Any, values: Any, targets: Any
    ) -> RaggedBatch:
        return RaggedBatch(
            values=values,
            positions=positions,
            lengths=self.lengths[first:last],
            ids=np.arange(first, last),
            labels=None if self.labels is None else self.labels[first:last],
            targets=targets,
        )

    def sample(self, i: int) -> Sample:
        """Series i as the model sees it.

        Returns:
            values: ``(N, C, 1, 1)`` float32, normalised.
            positions: ``(D, N)`` float32, anchored and scaled.
            label: int index into ``schema.classes``; absent without labels.
            targets: ``(N, K)`` float32 as delivered; absent without targets.
            id: i, which names the sample in masks and in the order of an epoch.
        """
        positions, values = self.raw(i)
        sample: Sample = {
            "values": self._normaliser.normalise(values)[:, :, None, None],
            "positions": np.ascontiguousarray(self._normaliser.normalise_positions(positions).T),
            "id": int(i),
        }
        if self.labels is not None:
            sample["label"] = int(self.labels[i])
        if self._targets is not None:
            sample["targets"] = np.array(self.targets(i))
        return sample

    def gather(self, rows: NDArray[np.int64]) -> RaggedBatch:
        """Several series at once, ``(B,)`` rows in any order: what ``sample`` gives, but faster."""
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"series {rows.tolist()} of a data set with {len(self)}")
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        base = self.offsets[np.array(self._firsts)[shards]]
        starts, ends = self.offsets[rows] - base, self.offsets[rows + 1] - base
        places = list(zip(shards.tolist(), starts.tolist(), ends.tolist(), strict=True))

        def of(column: list[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate([column[k][a:b] for k, a, b in places])

        lengths = self.lengths[rows]
        return RaggedBatch(
            values=self._normaliser.normalise(of(self._values)),
            positions=self._normaliser.normalise_positions(of(self._positions), lengths),
            lengths=lengths,
            ids=rows,
            labels=None if self.labels is None else self.labels[rows],
            targets=None if self._targets is None else of(self._targets),
        )

    def split(self, name: Split) -> Subset:
        """The series of one split, in stored order."""
        if name not in SPLITS:
            raise ValueError(f"there is no split {name!r}; splits are {SPLITS}")
        return Subset(self, np.flatnonzero(self.splits == SPLITS.index(name)))


class Subset:
    """Some series of a data set, as a map-style data set: ``len(subset)``, ``subset[k]``.

    Attributes:
        dataset: the whole.
        indices: ``(n,)`` int64 rows in the whole; ``subset[k]["id"] == indices[k]``.
        lengths: ``(n,)`` int64 observations of each series.
    """

    def __init__(self, dataset: StoredDataset, indices: NDArray[np.int64]) -> None:
        self.dataset = dataset
        self.indices = indices
        self.lengths = dataset.lengths[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, k: int) -> Sample:
        """Sample k of the subset; see ``StoredDataset.sample``."""
        return self.dataset.sample(int(self.indices[k]))

    def gather(self, indices: NDArray[np.int64]) -> RaggedBatch:
        """Samples of the subset at ``(B,)`` indices; see ``StoredDataset.gather``."""
        return self.dataset.gather(self.indices[indices])

    def part(self, share: float, seed: int) -> Subset:
        """This share of the samples of every class, rounded up.

        Which ones is a pure function of the seed and the objects' ids, and a larger share holds a
        smaller one of the same seed.
        """
        if share == 1 or not len(self):
            return self
        exact = Fraction(repr(share))
        labels = self.dataset.labels
        classes = np.zeros(len(self), np.int64) if labels is None else labels[self.indices]
        named = [hash_text(self.dataset.ids[i]) for i in self.indices]
        noise = hash_ints(seed, np.array(named, dtype=np.uint64).view(np.int64))
        kept = [
            places[np.argsort(noise[places], kind="stable")[: math.ceil(exact * len(places))]]
            for places in (np.flatnonzero(classes == label) for label in np.unique(classes))
        ]
        return Subset(self.dataset, self.indices[np.sort(np.concatenate(kept))])


def raw_series(subset: Subset, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Chosen rows of a split as delivered, neither normalised nor anchored.

    Yields:
        ``id``, ``positions`` (axis name → numbers), ``values`` (channel name → numbers) and
        ``units``: the fields of :class:`roma_core.serving.schema.Series`.
    """
    dataset = subset.dataset
    units = dataset.schema.units
    for row in rows:
        i = int(subset.indices[row])
        positions, values = dataset.raw(i)
        yield {
            "id": dataset.ids[i],
            "positions": {
                a.name: positions[:, k].tolist() for k, a in enumerate(dataset.schema.axes)
            },
            "values": {
                c.name: values[:, k].tolist() for k, c in enumerate(dataset.schema.channels)
            },
            "units": units,
        }
