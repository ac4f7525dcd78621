"""Tables of predictions: true and predicted classes or values of a split.

Every metric, and every comparison between two models, is computed from such a table alone, so the
model does not have to be run again. On disk each is one Parquet file. Imports no torch.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma_core.data.store import Subset
from roma_core.files import write_bytes
from roma_core.schema import Channel, PositionAxis

Floats = NDArray[np.float64]
Float32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

SCHEMA_VERSION = 1
_HEADER = b"roma_predictions"
_SUM_TOLERANCE = 1e-4  # the sum of probabilities computed in float32


class _Table:
    """What every table has: checks of its arrays that name the series, and the Parquet file."""

    ids: list[str]

    def _check_arrays(self, **expected: tuple[type[np.generic], tuple[int, ...]]) -> None:
        for name, (dtype, shape) in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {np.dtype(dtype)} of shape {shape} for {len(self.ids)} "
                    f"series, got {array.dtype} of shape {array.shape}"
                )

    def _check_rows(self, name: str, good: Any, expected: str, series: Ints) -> None:
        """Check the ``(T,)`` bool of the rows of an array; ``series``: their indices in ``ids``."""
        if not good.all():
            row = int(good.argmin())
            raise ValueError(
                f"{name}: expected {expected}, but {int((~good).sum())} of {len(good)} rows differ; "
                f"the first is of series {self.ids[series[row]]!r}: {getattr(self, name)[row].tolist()}"
            )

    def _write(self, path: Path, columns: Mapping[str, Any], **header: Any) -> None:
        """Write the file in one step; ``header`` goes into the metadata of its schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        text = json.dumps({"schema_version": SCHEMA_VERSION, **header})
        buffer = io.BytesIO()
        pq.write_table(pa.table(dict(columns)).replace_schema_metadata({_HEADER: text}), buffer)
        write_bytes(path, buffer.getvalue())

    @staticmethod
    def _read(path: Path, mark: str) -> tuple[Any, dict[str, Any]]:
        """The file's table, and its header, in which ``mark`` must be; raises as ``load``."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path).read()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        header = json.loads((table.schema.metadata or {}).get(_HEADER, b"{}"))
        if header.get("schema_version") != SCHEMA_VERSION or mark not in header:
            raise ValueError(
                f"{path} is no table of predictions with {mark}, of schema_version {SCHEMA_VERSION} "
                f"(found {header.get('schema_version')!r}); evaluate the model again to write one"
            )
        return table, header


@dataclass(frozen=True, eq=False)
class PredictionTable(_Table):
    """Labels and predicted probabilities of N series over K classes.

    Raises:
        ValueError: shapes, ids, labels or probabilities are not as below.
    """

    ids: list[str]  # N distinct ones
    classes: tuple[str, ...]  # K distinct ones, which labels and columns of probabilities index
    labels: Ints  # (N,) the true classes
    probabilities: Floats  # (N, K) finite, in [0, 1], rows sum to 1 within 1e-4
    lengths: Ints  # (N,) observations per series, at least 1
    lineage: Mapping[str, str] = field(default_factory=dict)  # such as the digest of the data
    missing: Floats | None = None  # (N,) of missing_fractions(); None if unknown

    def __post_init__(self) -> None:
        n, k = len(self.ids), len(self.classes)
        if n == 0 or k < 2:
            raise ValueError(f"expected at least 1 series and 2 classes, got {n} and {k}")
        for name, names in (("ids", self.ids), ("classes", self.classes)):
            if len(set(names)) != len(names):
                twice = [name for name, count in Counter(names).most_common(3) if count > 1]
                raise ValueError(f"{name} must be distinct; these occur more than once: {twice}")
        self._check_arrays(
            labels=(np.int64, (n,)), probabilities=(np.float64, (n, k)), lengths=(np.int64, (n,))
        )
        if self.missing is not None:
            self._check_arrays(missing=(np.float64, (n,)))
        p, labels = self.probabilities, self.labels
        normalised = np.abs(p.sum(axis=1) - 1) <= _SUM_TOLERANCE
        for name, good, expected in (
            ("labels", (labels >= 0) & (labels < k), f"0 to {k - 1}"),
            ("lengths", self.lengths >= 1, "at least 1"),
            ("probabilities", np.isfinite(p).all(axis=1), "finite numbers"),
            ("probabilities", ((p >= 0) & (p <= 1)).all(axis=1), "numbers in [0, 1]"),
            ("probabilities", normalised, f"rows that sum to 1 within {_SUM_TOLERANCE}"),
        ):
            self._check_rows(name, good, expected, np.arange(n))

    @classmethod
    def of_split(
        cls, test: Subset, probabilities: Floats, lineage: Mapping[str, str]
    ) -> PredictionTable:
        """The table of the ``(N, K)`` probabilities of a labelled split."""
        dataset = test.dataset
        assert dataset.labels is not None
        return cls(
            ids=[dataset.ids[i] for i in test.indices],
            classes=dataset.schema.classes,
            labels=dataset.labels[test.indices],
            probabilities=probabilities,
            lengths=test.lengths,
            lineage=lineage,
            missing=missing_fractions(test),
        )

    @property
    def predicted(self) -> Ints:
        """``(N,)`` int64, the most probable class; the first one of a tie."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> Bools:
        """``(N,)`` bool."""
        return self.predicted == self.labels

    def save(self, path: Path) -> None:
        """Write a row per series, in one step."""
        import pyarrow as pa

        names = np.array(self.classes, dtype=object)
        flat = pa.array(self.probabilities.ravel())
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "length": self.lengths,
            "label": pa.array(names[self.labels], pa.string()),
            "predicted": pa.array(names[self.predicted], pa.string()),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(self.classes)),
        }
        if self.missing is not None:
            columns["missing"] = self.missing
        self._write(path, columns, classes=self.classes, lineage=dict(self.lineage))

    @classmethod
    def load(cls, path: Path) -> PredictionTable:
        """Read a table that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a table, is damaged, or has another schema version.
        """
        table, header = cls._read(path, "classes")
        index = {name: i for i, name in enumerate(header["classes"])}
        return cls(
            ids=table["id"].to_pylist(),
            classes=tuple(index),
            labels=np.array([index[name] for name in table["label"].to_pylist()], np.int64),
            probabilities=np.array(table["probabilities"].to_pylist(), np.float64),
            lengths=table["length"].to_numpy(),
            lineage=header["lineage"],
            missing=table["missing"].to_numpy() if "missing" in table.column_names else None,
        )


def missing_fractions(test: Subset) -> Floats:
    """``(N,)`` fraction of the observations between first and last that are missing.

    Expected is one observation per median gap between different positions on the first axis, over
    all series. Dropped observations count as missing, and so do long pauses.
    """
    positions = [np.unique(test.dataset.raw(int(i))[0][:, 0]) for i in test.indices]
    gaps = np.concatenate([np.diff(one) for one in positions])
    if len(gaps) == 0:
        return np.zeros(len(positions))
    step = float(np.median(gaps))
    expected = np.array([round((one[-1] - one[0]) / step) + 1 for one in positions])
    return np.clip(1 - np.array([len(one) for one in positions]) / expected, 0, 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class _ObservationTable(_Table):
    """K true and predicted values of T observations of N series, in the units of the data."""

    ids: list[str]  # of the N series
    series: Ints  # (T,) ascending: the index in ids of each observation's series
    channels: tuple[Channel, ...]  # K names with their units
    true: NDArray[np.floating]  # (T, K)
    predicted: NDArray[np.floating]  # (T, K)

    def _columns(self, own: Mapping[str, NDArray[Any]], *fields: str) -> dict[str, Any]:
        """``id``, ``own``, and a column for each channel of the fields that are not None."""
        import pyarrow as pa

        by_channel = {
            f"{name}_{channel.name}": values[:, k]
            for name in fields
            if (values := getattr(self, name)) is not None
            for k, channel in enumerate(self.channels)
        }
        ids = pa.array(self.ids, pa.string()).take(pa.array(self.series))
        return {"id": ids, **own, **by_channel}

    @staticmethod
    def _fields(table: Any, channels: Mapping[str, str], *fields: str) -> dict[str, Any]:
        """What ``_columns`` wrote: ids, series, channels, and the fields, None where one was."""
        names = table["id"].to_pylist()
        row_of = {name: k for k, name in enumerate(dict.fromkeys(names))}
        return {
            "ids": list(row_of),
            "series": np.array([row_of[name] for name in names]),
            "channels": tuple(Channel(name=name, unit=unit) for name, unit in channels.items()),
            **{field: _stacked(table, field, channels) for field in fields},
        }


def _stacked(table: Any, field: str, names: Iterable[str]) -> NDArray[Any] | None:
    """``(T, K)`` of the columns ``field_NAME``; None if there are none."""
    columns = [f"{field}_{name}" for name in names]
    if not columns or columns[0] not in table.column_names:
        return None
    return np.column_stack([table[column].to_numpy() for column in columns])


@dataclass(frozen=True, eq=False, kw_only=True)
class RegressionTable(_ObservationTable):
    """K targets of N series, or of all T observations of these; finite float64 numbers.

    Targets of whole series are a row for each, without positions.

    Raises:
        ValueError: shapes do not fit together, or a number is not finite.
    """

    scale: Floats  # (K,) standard deviations of the targets in train
    lengths: Ints  # (N,) observations of each series
    axes: tuple[PositionAxis, ...] = ()  # D of them
    positions: Floats | None = None  # (T, D) as delivered
    std: Floats | None = None  # (T, K) predicted standard deviations, if the model predicts them
    lineage: Mapping[str, str] = field(default_factory=dict)  # such as the digest of the data

    def __post_init__(self) -> None:
        n, k, total = len(self.ids), len(self.channels), len(self.series)
        if not n or not k:
            raise ValueError(f"expected at least 1 series and 1 target, got {n} and {k}")
        self._check_arrays(lengths=(np.int64, (n,)), scale=(np.float64, (k,)))
        widths = {"positions": len(self.axes), "true": k, "predicted": k, "std": k}
        for name, width in widths.items():
            if getattr(self, name) is None:
                continue
            self._check_arrays(**{name: (np.float64, (total, width))})
            finite = np.isfinite(getattr(self, name)).all(axis=1)
            self._check_rows(name, finite, "finite numbers", self.series)

    @property
    def errors(self) -> Floats:
        """``(T, K)`` predicted minus true."""
        return self.predicted - self.true

    def differs_from(self, other: RegressionTable) -> str | None:
        """Why metrics of the two cannot be compared; None if they can."""
        targets = [[(one.name, one.unit) for one in table.channels] for table in (self, other)]
        if targets[0] != targets[1]:
            return f"targets {targets[0]} against the champion's {targets[1]}"
        if self.ids != other.ids or not np.array_equal(self.series, other.series):
            return "they are of other series or observations"
        if n := int((self.true != other.true).any(axis=1).sum()):
            return f"{n} rows have other true targets in either table"
        return None

    @classmethod
    def of_split(cls, test: Subset, outputs: Floats, lineage: Mapping[str, str]) -> RegressionTable:
        """The table of the ``(T, K)`` targets in units, and perhaps deviations beside them, of a split."""
        dataset, schema = test.dataset, test.dataset.schema
        k, of_series = len(schema.targets), schema.target_level == "series"
        if of_series:
            assert dataset.series_targets is not None
            true, rows = dataset.series_targets[test.indices], np.arange(len(test))
        else:
            found = [dataset.targets(int(i)) for i in test.indices]
            true = np.concatenate([one for one in found if one is not None])
            rows = np.repeat(np.arange(len(test)), test.lengths)
        return cls(
            ids=[dataset.ids[i] for i in test.indices],
            series=rows,
            channels=schema.targets,
            true=true.astype(np.float64),
            predicted=outputs[:, :k],
            std=outputs[:, k:] if outputs.shape[1] > k else None,
            scale=np.array([target.std for target in schema.targets]),
            lengths=test.lengths,
            axes=() if of_series else schema.axes,
            positions=None
            if of_series
            else np.concatenate([dataset.raw(int(i))[0] for i in test.indices]),
            lineage=lineage,
        )

    def save(self, path: Path) -> None:
        """Write a row per series or observation, in one step."""
        own: dict[str, NDArray[Any]] = {"length": self.lengths[self.series]}
        for k, axis in enumerate(self.axes):
            assert self.positions is not None
            own[f"position_{axis.name}"] = self.positions[:, k]
        self._write(
            path,
            self._columns(own, "true", "predicted", "std"),
            axes={axis.name: axis.unit for axis in self.axes},
            targets={target.name: target.unit for target in self.channels},
            scale=self.scale.tolist(),
            lineage=dict(self.lineage),
        )

    @classmethod
    def load(cls, path: Path) -> RegressionTable:
        """Read a table that ``save`` wrote; raises as that of :class:`PredictionTable`."""
        table, header = cls._read(path, "targets")
        fields = cls._fields(table, header["targets"], "true", "predicted", "std")
        first = np.unique(fields["series"], return_index=True)[1]
        return cls(
            **fields,
            scale=np.array(header["scale"]),
            lengths=table["length"].to_numpy()[first],
            axes=tuple(PositionAxis(name=n, unit=unit) for n, unit in header["axes"].items()),
            positions=_stacked(table, "position", header["axes"]),
            lineage=header["lineage"],
        )


_SQUARED = ("squared_error", "squared_error_of_mean")  # columns of ReconstructionTable.squared


@dataclass(frozen=True, eq=False, kw_only=True)
class ReconstructionTable(_ObservationTable):
    """T hidden observations, of all or some of N series; values are float32, as observed, with noise.

    A value that was not observed is NaN in every field.
    """

    index: Ints  # (T,) of the observation in its series
    std: Float32 | None = None  # (T, K) predicted standard deviation, if the model predicts it
    clean: Float32 | None = None  # (T, K) values without noise, if known
    # (T, 2) squared errors in normalised units, summed over the hidden values of an observation: those
    # of the prediction, and those of the mean of train
    squared: Floats | None = None

    def select(self, rows: Bools) -> ReconstructionTable:
        """The observations where ``(T,)`` is True."""
        of_rows = ("series", "index", "true", "predicted", "std", "clean", "squared")
        arrays = {name: getattr(self, name) for name in of_rows}
        return replace(self, **{name: x[rows] for name, x in arrays.items() if x is not None})

    def save(self, path: Path) -> None:
        """Write a row per hidden observation, in one step."""
        own = {"observation": self.index}
        if self.squared is not None:
            own |= dict(zip(_SQUARED, self.squared.T, strict=True))
        columns = self._columns(own, "true", "predicted", "std", "clean")
        self._write(path, columns, channels={c.name: c.unit for c in self.channels})

    @classmethod
    def load(cls, path: Path) -> ReconstructionTable:
        """Read a table that ``save`` wrote, without ``std`` and ``clean``; raises as the others."""
        table, header = cls._read(path, "channels")
        return cls(
            **cls._fields(table, header["channels"], "true", "predicted"),
            index=table["observation"].to_numpy(),
            squared=np.column_stack([table[column].to_numpy() for column in _SQUARED]),
        )

    def differs_from(self, other: ReconstructionTable) -> str | None:
        """Why metrics of the two cannot be compared; None if they can."""
        pairs = [(getattr(self, n), getattr(other, n)) for n in ("series", "index", "true")]
        same = self.ids == other.ids and self.channels == other.channels
        if not same or not all(np.array_equal(a, b, equal_nan=True) for a, b in pairs):
            return "other values are hidden in either table"
        return None
