"""A data set on disk, opened for reading: samples by index, as fast as a slice.

The files are those of ``roma_core.data.manifest``. Columns are memory-mapped, so any number of
processes share one copy in the page cache, and a data-loading worker costs no memory.

Shapes of a ragged batch:
    B series   T observations of all series   C numbers of an observation   D axes   K targets
"""

from __future__ import annotations

import itertools
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from roma_core.data.layout import pivot
from roma_core.data.manifest import (
    SPLITS,
    Split,
    find_damage,
    large_columns,
    read_manifest,
    series_columns,
    shard_name,
)
from roma_core.files import read_json
from roma_core.hashing import hash_ints, hash_text
from roma_core.schema import DataError, DataSchema, Normaliser

Sample = dict[str, Any]
_ROW_GROUP = 1 << 18  # observations in a row group of Parquet, unless one series has more

Ints = NDArray[np.int64]


def _of_series(columns: Any, rows: slice | Ints) -> dict[str, Any]:
    """The optional columns of some series, of a batch or of a data set."""
    names = ("labels", "series_targets", "covariates")
    arrays = ((name, getattr(columns, name)) for name in names)
    return {name: array[rows] for name, array in arrays if array is not None}


@dataclass(frozen=True)
class RaggedBatch:
    """Some series, one after the other, without padding."""

    values: NDArray[np.float32]  # (T, C), NaN where missing; for a model of tubelets, (T, P) tokens
    positions: NDArray[Any]  # (T, D) float64 as delivered, or float32 as the model takes them
    lengths: Ints  # (B,) observations of each series, at least 1
    ids: Ints  # (B,) stable names of the series
    labels: NDArray[Any] | None = None  # (B,) int64 or (B, K) float, one per series
    targets: NDArray[Any] | None = None  # (T,) or (T, K), one per observation
    series_targets: NDArray[np.float32] | None = None  # (B, K), one per series
    covariates: NDArray[np.float32] | None = None  # (B, K) of each series, NaN where missing

    @classmethod
    def of(
        cls,
        values: Sequence[NDArray[Any]],
        positions: Sequence[NDArray[Any]],
        ids: Sequence[int] | Ints,
    ) -> RaggedBatch:
        """Copy single series, each ``(N, C)`` and ``(N, D)``, into one batch."""
        return cls(
            np.ascontiguousarray(np.concatenate(values)),
            np.ascontiguousarray(np.concatenate(positions)),
            np.array([len(v) for v in values]),
            np.asarray(ids),
        )

    @cached_property
    def starts(self) -> Ints:
        """``(B,)`` row of the first observation of each series."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def series(self) -> Ints:
        """``(T,)`` index into ``lengths`` and ``ids`` of each observation's series."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def index(self) -> Ints:
        """``(T,)`` 0 for the first observation of each series."""
        return np.arange(len(self.series)) - np.repeat(self.starts, self.lengths)

    def select(self, kept: NDArray[np.bool_]) -> RaggedBatch:
        """The observations where ``(T,)`` kept is True; at least one of every series must be."""
        lengths = np.bincount(self.series[kept], minlength=len(self.lengths))
        return replace(self._take(np.flatnonzero(kept)), lengths=lengths)

    def reorder(self, order: Ints) -> RaggedBatch:
        """Series in another order, or fewer: ``(B,)`` indices into the present ones."""
        lengths = self.lengths[order]
        shift = self.starts[order] - (np.cumsum(lengths) - lengths)  # of each series' rows
        rows = np.arange(lengths.sum()) + np.repeat(shift, lengths)
        own = _of_series(self, order)
        return replace(self._take(rows), lengths=lengths, ids=self.ids[order], **own)

    def split(self) -> tuple[list[NDArray[np.float32]], list[NDArray[Any]]]:
        """Values and positions of each series."""
        return np.split(self.values, self.starts[1:]), np.split(self.positions, self.starts[1:])

    def _take(self, rows: Ints) -> RaggedBatch:
        """Only the ``(n,)`` rows given; ``lengths`` is not updated."""
        return replace(
            self,
            values=self.values.take(rows, axis=0),
            positions=self.positions.take(rows, axis=0),
            targets=None if self.targets is None else self.targets.take(rows, axis=0),
        )


class StoredDataset:
    """All series of a data-set folder, whatever their split.

    ``offsets``, ``labels`` (None without labels) and ``splits`` are columns of the folder; ``lengths``
    are the ``(n_series,)`` int64 observations of each series, at least 1.
    """

    def __init__(self, path: Path | str, verify: bool = True) -> None:
        """Open the folder ``path``; ``verify`` compares the sha256 of every file with the manifest.

        Raises:
            DataError: there is no data set, or a file is damaged; the text names it.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if verify and (found := find_damage(self.path, self.manifest)):
            problems = "; ".join(found)
            raise DataError(f"{self.path} is damaged: {problems}; remove it and build it again")
        self.schema: DataSchema = self.manifest.data_schema
        self._firsts = [0, *self.manifest.shards]  # series of each shard
        shards = range(len(self._firsts))
        files = {
            column: [self._column(shard_name(column, k), mapped=True) for k in shards]
            for column in large_columns(self.schema)
        }
        self._values, self._positions = files["values"], files["positions"]
        self._targets = files.get("targets")
        self.offsets: NDArray[np.int64] = self._column("offsets.npy")
        self.lengths: NDArray[np.int64] = np.diff(self.offsets)
        of_series = {name: self._column(f"{name}.npy") for name in series_columns(self.schema)}
        self.splits: NDArray[np.int8] = of_series["splits"]
        self.labels: NDArray[np.int64] | None = of_series.get("labels")
        # (n_series, K) each, as delivered
        self.covariates: NDArray[np.float32] | None = of_series.get("covariates")
        self.series_targets: NDArray[np.float32] | None = of_series.get("targets")
        self._normaliser = Normaliser(self.schema)

    @cached_property
    def ids(self) -> list[str]:
        """Id of every object, by row."""
        return read_json(self.path / "ids.json")

    @cached_property
    def groups(self) -> list[str] | None:
        """Group of every object, by row; None without groups."""
        has_groups = "groups.json" in self.manifest.files
        return read_json(self.path / "groups.json") if has_groups else None

    def _column(self, name: str, mapped: bool = False) -> NDArray[Any]:
        array = np.load(self.path / name, mmap_mode="r" if mapped else None, allow_pickle=False)
        return array.view(np.ndarray)  # slicing a plain view is 10 times faster than a memmap

    def __reduce__(self) -> tuple[type[StoredDataset], tuple[Path, bool]]:
        return StoredDataset, (self.path, False)  # unpickling maps the files again, copies no data

    def __len__(self) -> int:
        return len(self.lengths)

    def raw(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Series i as delivered: positions ``(N, D)`` float64 and values ``(N, C)`` float32.

        Both are read-only views of the file.
        """
        k, rows = self._locate(i)
        return self._positions[k][rows], self._values[k][rows]

    def joint(self, i: int) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Series i as delivered in the joint layout: a value of every channel, NaN where missing."""
        positions, values = self.raw(i)
        if self.schema.layout == "joint":
            return positions, values
        at, joint, _ = pivot(positions, values, len(self.schema.channels), self.targets(i))
        return at, joint

    def targets(self, i: int) -> NDArray[np.float32] | None:
        """The targets of series i's observations, ``(N, K)`` float32 as delivered, if there are any."""
        if self._targets is None:
            return None
        k, rows = self._locate(i)
        return self._targets[k][rows]

    def _locate(self, i: int) -> tuple[int, slice]:
        """The shard of series i, and its rows there."""
        if not 0 <= i < len(self.lengths):
            raise IndexError(f"series {i} of a data set with {len(self.lengths)}")
        a, b = self.offsets.item(i), self.offsets.item(i + 1)  # slices of Python ints are faster
        if len(self._firsts) == 1:
            return 0, slice(a, b)
        k = bisect_right(self._firsts, i) - 1
        base = self.offsets.item(self._firsts[k])
        return k, slice(a - base, b - base)

    def parts(self, n_observations: int | None = None) -> Iterator[RaggedBatch]:
        """The whole data set as delivered: about ``n_observations`` at a time, or a file at a time.

        Parts hold whole series, in order. Their arrays are read-only views of the files,
        ``positions`` float64; their ``ids`` are rows.
        """
        for k, (first, last) in enumerate(itertools.pairwise([*self._firsts, len(self)])):
            base, ends = self.offsets[first], self.offsets[first + 1 : last + 1]
            cuts = [first]
            if n_observations is not None:
                chunk = (ends - base) // n_observations
                cuts = (first + np.flatnonzero(np.diff(chunk, prepend=-1))).tolist()
            for a, b in itertools.pairwise([*cuts, last]):
                rows = slice(self.offsets[a] - base, self.offsets[b] - base)
                rows = slice(None) if n_observations is None else rows
                yield RaggedBatch(
                    values=self._values[k][rows],
                    positions=self._positions[k][rows],
                    lengths=self.lengths[a:b],
                    ids=np.arange(a, b),
                    targets=None if self._targets is None else self._targets[k][rows],
                    **_of_series(self, slice(a, b)),
                )

    def joint_parts(self, n_observations: int, every: int = 1) -> Iterator[RaggedBatch]:
        """The series of the same ``parts``, or one in ``every`` of them, in the joint layout."""
        for part in self.parts(n_observations):
            if every > 1:
                part = part.reorder(np.flatnonzero(part.ids % every == 0))
            if not len(part.ids):
                continue
            if self.schema.layout == "joint":
                yield part
                continue
            positions = np.column_stack([part.series, part.positions])
            n_channels = len(self.schema.channels)
            at, values, rows = pivot(positions, part.values, n_channels, part.targets)
            yield replace(
                part,
                positions=at[:, 1:],
                values=values,
                lengths=np.bincount(at[:, 0].astype(np.int64), minlength=len(part.ids)),
                targets=None if part.targets is None else part.targets[rows],
            )

    def sample(self, i: int) -> Sample:
        """Series i as the model sees it: values ``(N, C, 1, 1)`` and positions ``(D, N)``, normalised.

        Also ``id``, i, by which masks are drawn; ``label``, an index into ``schema.classes``,
        ``targets``, ``(N, K)`` float32 as delivered, or ``(K,)`` of the series, and ``covariates``,
        ``(K,)`` float32 normalised, if there are any.
        """
        positions, values = self.raw(i)
        at = np.ascontiguousarray(self._normaliser.normalise_positions(positions).T)
        values = self._normaliser.normalise(values, positions)[:, :, None, None]
        sample: Sample = {"values": values, "positions": at, "id": int(i)}
        if self.labels is not None:
            sample["label"] = int(self.labels[i])
        if self._targets is not None:
            sample["targets"] = np.array(self.targets(i))
        if self.series_targets is not None:
            sample["targets"] = self.series_targets[i]
        if self.covariates is not None:
            sample["covariates"] = self._normaliser.normalise_covariates(self.covariates[i])
        return sample

    def gather(self, rows: NDArray[np.int64]) -> RaggedBatch:
        """Several series at once, ``(B,)`` rows in any order: equal to ``sample``, but faster."""
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"series {rows.tolist()} of a data set with {len(self)}")
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        base = self.offsets[np.array(self._firsts)[shards]]
        starts, ends = self.offsets[rows] - base, self.offsets[rows + 1] - base
        slices = list(zip(shards.tolist(), starts.tolist(), ends.tolist(), strict=True))

        def of(column: list[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate([column[k][a:b] for k, a, b in slices])

        lengths, positions = self.lengths[rows], of(self._positions)
        of_series = _of_series(self, rows)
        if self.covariates is not None:
            numbers = self._normaliser.normalise_covariates(of_series["covariates"])
            of_series["covariates"] = numbers
        return RaggedBatch(
            values=self._normaliser.normalise(of(self._values), positions),
            positions=self._normaliser.normalise_positions(positions, lengths),
            lengths=lengths,
            ids=rows,
            targets=None if self._targets is None else of(self._targets),
            **of_series,
        )

    def split(self, name: Split | Literal["all"]) -> Subset:
        """The series of one split, or all, in stored order."""
        if name == "all":
            return Subset(self, np.arange(len(self)))
        if name not in SPLITS:
            raise ValueError(f"there is no split {name!r}; splits are {SPLITS}")
        return Subset(self, np.flatnonzero(self.splits == SPLITS.index(name)))

    def to_parquet(self, target: Path, split: Split | None = None) -> int:
        """Write all series, or those of one split, to a Parquet file; returns their number.

        A row per series, as delivered and in the joint layout: ``id``, ``split``, ``label`` and
        ``group`` where there are any, covariates and targets of series, then a list per axis, channel
        and target of observations: of doubles, of floats, null where one is missing, or of names of
        categories. A source of kind ``parquet`` reads it back. The columns' metadata hold ``unit``, ``role`` and ``categories``, by which
        ``infer_source`` finds axes, targets and covariates; batch prediction ignores targets.

        Raises:
            DataError: an axis, channel, covariate or target has the name of another column.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.schema
        texts = {"id": self.ids, "split": [SPLITS[k] for k in self.splits.tolist()]}
        if self.labels is not None:
            texts["label"] = [schema.classes[k] for k in self.labels.tolist()]
        if self.groups is not None:
            texts["group"] = self.groups
        lists: dict[str, Sequence[Any]] = {"axis": schema.given_axes, "channel": schema.channels}
        singles: dict[str, Sequence[Any]] = {"covariate": schema.covariates}
        (singles if schema.target_level == "series" else lists)["target"] = schema.targets
        fields = [pa.field(name, pa.string()) for name in texts]
        for role, parts in (singles | lists).items():
            for one in parts:
                marks = {"unit": one.unit, "role": role}
                kind = pa.float64() if role == "axis" else pa.float32()
                if words := getattr(one, "categories", ()):
                    marks |= {"categories": json.dumps(words)}
                    marks |= {"unknown": "true"} if getattr(one, "unknown", False) else {}
                    kind = pa.string()
                kind = pa.list_(kind) if role in lists else kind
                fields.append(pa.field(one.name, kind, metadata=marks))
        of_series = [one for parts in singles.values() for one in parts]
        arrays = [x for x in (self.covariates, self.series_targets) if x is not None]
        of_objects = np.hstack([np.empty((len(self), 0)), *arrays])
        names = [field.name for field in fields]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(
                f"two columns would be called {twice[0]!r}; rename the channel, axis, target or covariate"
            )

        def table(part: RaggedBatch) -> Any:
            columns = [[column[i] for i in part.ids] for column in texts.values()]
            columns += [
                _as_delivered(one, column)
                for one, column in zip(of_series, of_objects[part.ids].T, strict=True)
            ]
            offsets = pa.array(np.append(part.starts, len(part.values)).astype(np.int32))
            arrays = (part.positions, part.values, part.targets)
            for parts, array in zip(lists.values(), arrays, strict=False):
                for one, column in zip(parts, () if array is None else array.T, strict=True):
                    entries: Any = np.ascontiguousarray(column)
                    if getattr(one, "categories", ()):
                        entries = _as_delivered(one, column)
                    entries = pa.array(entries, from_pandas=True)  # NaN is null
                    columns.append(pa.ListArray.from_arrays(offsets, entries))
            return pa.table(columns, schema=pa.schema(fields))

        aside, n = target.with_name(f".{target.name}.part"), 0
        try:
            with pq.ParquetWriter(aside, pa.schema(fields), compression="zstd") as writer:
                for part in self.joint_parts(_ROW_GROUP):
                    if split is not None:
                        chosen = self.splits[part.ids] == SPLITS.index(split)
                        part = part.reorder(np.flatnonzero(chosen))
                    if len(part.ids):
                        writer.write_table(table(part))
                    n += len(part.ids)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
        return n


class Subset:
    """Some series of a data set, as a map-style data set: ``len(subset)``, ``subset[k]``.

    ``indices`` are the ``(n,)`` rows of ``dataset``: ``subset[k]["id"] == indices[k]``.
    """

    def __init__(self, dataset: StoredDataset, indices: NDArray[np.int64]) -> None:
        self.dataset, self.indices = dataset, indices
        self.lengths = dataset.lengths[indices]  # (n,) observations of each series

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def schema(self) -> DataSchema:
        return self.dataset.schema

    def __getitem__(self, k: int) -> Sample:
        """Sample k of the subset; see ``StoredDataset.sample``."""
        return self.dataset.sample(int(self.indices[k]))

    def gather(self, indices: NDArray[np.int64]) -> RaggedBatch:
        """Samples of the subset at ``(B,)`` indices; see ``StoredDataset.gather``."""
        return self.dataset.gather(self.indices[indices])

    @property
    def class_counts(self) -> dict[str, int]:
        """Number of series of each class; empty without labels."""
        classes, labels = self.dataset.schema.classes, self.dataset.labels
        if labels is None:
            return {}
        counts = np.bincount(labels[self.indices], minlength=len(classes))
        return dict(zip(classes, counts.tolist(), strict=True))

    def subsample(self, fraction: float, seed: int) -> Subset:
        """A fraction of the samples of every class, rounded up: a pure function of seed and ids.

        A larger fraction contains a smaller one of the same seed.
        """
        if fraction == 1 or not len(self):
            return self
        exact = Fraction(repr(fraction))
        labels = self.dataset.labels
        classes = np.zeros(len(self), np.int64) if labels is None else labels[self.indices]
        hashes = [hash_text(self.dataset.ids[i]) for i in self.indices]
        noise = hash_ints(seed, np.array(hashes, dtype=np.uint64).view(np.int64))  # (n,)
        kept = []
        for rows in (np.flatnonzero(classes == label) for label in np.unique(classes)):
            order = np.argsort(noise[rows], kind="stable")
            kept.append(rows[order[: math.ceil(exact * len(rows))]])
        return Subset(self.dataset, self.indices[np.sort(np.concatenate(kept))])


def raw_series(subset: Subset, rows: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Chosen rows of a split as delivered: fields of :class:`roma_core.serving.client.Series`."""
    for i in (int(subset.indices[row]) for row in rows):
        yield as_delivered(subset.dataset, i, *subset.dataset.joint(i))


def as_delivered(
    dataset: StoredDataset, i: int, positions: NDArray[Any], values: NDArray[Any]
) -> dict[str, Any]:
    """Observations ``(n, D)``, ``(n, C)`` of series i in the joint layout as fields of a request."""
    schema = dataset.schema
    columns = zip(schema.given_axes, positions.T, strict=True)
    found: dict[str, Any] = {
        "id": dataset.ids[i],
        "positions": {axis.name: _as_delivered(axis, column) for axis, column in columns},
        "values": {
            channel.name: _as_delivered(channel, column)
            for channel, column in zip(schema.channels, values.T, strict=True)
        },
        "units": schema.units,
    }
    if dataset.covariates is not None:
        given = zip(schema.covariates, dataset.covariates[i], strict=True)
        found["covariates"] = {one.name: _as_delivered(one, x[None])[0] for one, x in given}
    return found


def _as_delivered(one: Any, column: NDArray[Any]) -> list[Any]:
    """Numbers, or names of categories; None where one is missing."""
    if not getattr(one, "categories", ()):
        return [None if number != number else number for number in column.tolist()]
    names = (*one.categories, "unknown")  # of an axis that accepts others
    return [None if k != k else names[int(k)] for k in column.tolist()]
