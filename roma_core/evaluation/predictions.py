"""Tables of predictions: true and predicted classes or values of a split.

Every metric, and every comparison between two models, is computed from such a table alone, so the
model does not have to be run again. On disk each is one Parquet file. Imports no torch.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
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

SCHEMA_VERSION = 1
_HEADER = b"roma_predictions"
_SUM_TOLERANCE = 1e-4  # the sum of probabilities computed in float32


def _write_parquet(path: Path, columns: Mapping[str, Any], **header: Any) -> None:
    """Write the file in one step; ``header`` goes into the metadata of its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = json.dumps({"schema_version": SCHEMA_VERSION, **header})
    buffer = io.BytesIO()
    pq.write_table(pa.table(dict(columns)).replace_schema_metadata({_HEADER: text}), buffer)
    write_bytes(path, buffer.getvalue())


@dataclass(frozen=True, eq=False)
class PredictionTable:
    """Labels and predicted probabilities of N series over K classes.

    Attributes:
        ids: N distinct ids.
        classes: K distinct class names; labels and columns of ``probabilities`` index them.
        labels: ``(N,)`` int64, the true classes.
        probabilities: ``(N, K)`` float64, finite, in [0, 1], rows sum to 1 within 1e-4.
        lengths: ``(N,)`` int64, observations per series, at least 1.
        lineage: identifiers such as the digest of the data.
        missing: ``(N,)`` float64, missing fraction of each series as :func:`missing_fractions` has
            it, in [0, 1); None if unknown.

    Raises:
        ValueError: shapes, ids, labels or probabilities are not as above.
    """

    ids: list[str]
    classes: tuple[str, ...]
    labels: Ints
    probabilities: Floats
    lengths: Ints
    lineage: Mapping[str, str] = field(default_factory=dict)
    missing: Floats | None = None

    def __post_init__(self) -> None:
        n, k = len(self.ids), len(self.classes)
        if n == 0 or k < 2:
            raise ValueError(f"expected at least 1 series and 2 classes, got {n} and {k}")
        for name, names in (("ids", self.ids), ("classes", self.classes)):
            if len(set(names)) != len(names):
                twice = [name for name, count in Counter(names).most_common(3) if count > 1]
                raise ValueError(f"{name} must be distinct; these occur more than once: {twice}")
        for name, dtype, shape in (
            ("labels", np.int64, (n,)),
            ("probabilities", np.float64, (n, k)),
            ("lengths", np.int64, (n,)),
            ("missing", np.float64, (n,)),
        ):
            array = getattr(self, name)
            if array is None and name == "missing":
                continue
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name}: expected {np.dtype(dtype)} of shape {shape} for {n} ids and "
                    f"{k} classes, got {array.dtype} of shape {array.shape}"
                )
        p = self.probabilities
        labelled = (self.labels >= 0) & (self.labels < k)
        self._check_rows("labels", labelled, f"0 to {k - 1}")
        self._check_rows("lengths", self.lengths >= 1, "at least 1")
        self._check_rows("probabilities", np.isfinite(p).all(axis=1), "finite numbers")
        self._check_rows("probabilities", ((p >= 0) & (p <= 1)).all(axis=1), "numbers in [0, 1]")
        normalised = np.abs(p.sum(axis=1) - 1) <= _SUM_TOLERANCE
        self._check_rows("probabilities", normalised, f"rows that sum to 1 within {_SUM_TOLERANCE}")

    def _check_rows(self, name: str, good: NDArray[np.bool_] | np.bool_, expected: str) -> None:
        if not good.all():
            row = int(good.argmin())
            raise ValueError(
                f"{name}: expected {expected}, but {int((~good).sum())} of {len(self.ids)} series "
                f"differ; the first is {self.ids[row]!r} with {getattr(self, name)[row].tolist()}"
            )

    @property
    def predicted(self) -> Ints:
        """``(N,)`` int64, the most probable class; the first one of a tie."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> NDArray[np.bool_]:
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
        _write_parquet(path, columns, classes=self.classes, lineage=dict(self.lineage))

    @classmethod
    def load(cls, path: Path) -> PredictionTable:
        """Read a table that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a table, is damaged, or has another schema version.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.ParquetFile(path).read()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
        header = json.loads((table.schema.metadata or {}).get(_HEADER, b"{}"))
        if header.get("schema_version") != SCHEMA_VERSION or "classes" not in header:
            raise ValueError(
                f"{path} is no table of predictions of schema_version {SCHEMA_VERSION} (found "
                f"{header.get('schema_version')!r}); evaluate the model again to write one"
            )
        classes = tuple(header["classes"])
        index = {name: i for i, name in enumerate(classes)}
        return cls(
            ids=table["id"].to_pylist(),
            classes=classes,
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


@dataclass(frozen=True, eq=False)
class RegressionTable:
    """K targets of T observations of N series, one series after the other.

    Attributes:
        ids: N ids of series.
        lengths: ``(N,)`` int64 observations of each, at least 1.
        axes: D axes of ``positions``.
        positions: ``(T, D)`` float64, as delivered.
        targets: K names with their units.
        true, predicted: ``(T, K)`` float64 in these units, finite.
        lineage: identifiers such as the digest of the data.

    Raises:
        ValueError: shapes do not fit together, or a number is not finite.
    """

    ids: list[str]
    lengths: Ints
    axes: tuple[PositionAxis, ...]
    positions: Floats
    targets: tuple[Channel, ...]
    true: Floats
    predicted: Floats
    lineage: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.ids or not self.targets:
            raise ValueError(
                f"expected at least 1 series and 1 target, got {len(self.ids)} and {len(self.targets)}"
            )
        total = int(self.lengths.sum())
        for name, shape in (
            ("lengths", (len(self.ids),)),
            ("positions", (total, len(self.axes))),
            ("true", (total, len(self.targets))),
            ("predicted", (total, len(self.targets))),
        ):
            array = getattr(self, name)
            if array.shape != shape:
                raise ValueError(
                    f"{name}: expected shape {shape} for {len(self.ids)} series of {total} "
                    f"observations, got {array.shape}"
                )
            bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
            if bad.any():
                row = int(bad.argmax())
                series = row if name == "lengths" else int(self.series[row])
                raise ValueError(
                    f"{name}: expected finite numbers, but {int(bad.sum())} rows of {len(array)} "
                    f"have others; the first is of series {self.ids[series]!r}: {array[row].tolist()}"
                )

    @cached_property
    def starts(self) -> Ints:
        """``(N,)`` first row of each series."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def series(self) -> Ints:
        """``(T,)`` index into ``ids`` of each row."""
        return np.repeat(np.arange(len(self.ids)), self.lengths)

    @property
    def errors(self) -> Floats:
        """``(T, K)`` predicted minus true."""
        return self.predicted - self.true

    def rows_of(self, k: int) -> slice:
        """Rows of series k."""
        return slice(int(self.starts[k]), int(self.starts[k] + self.lengths[k]))

    def save(self, path: Path) -> None:
        """Write a row per observation, in one step."""
        import pyarrow as pa

        columns = {"id": pa.array(self.ids, pa.string()).take(pa.array(self.series))}
        for k, axis in enumerate(self.axes):
            columns[f"position_{axis.name}"] = self.positions[:, k]
        for what in ("true", "predicted"):
            for k, target in enumerate(self.targets):
                columns[f"{what}_{target.name}"] = getattr(self, what)[:, k]
        _write_parquet(
            path,
            columns,
            axes={axis.name: axis.unit for axis in self.axes},
            targets={target.name: target.unit for target in self.targets},
            lineage=dict(self.lineage),
        )


@dataclass(frozen=True, eq=False)
class ReconstructionTable:
    """H hidden observations of N series, one series after the other, in the units of the data.

    Attributes:
        n_series: N, including series without a hidden observation.
        series: ``(H,)`` int64 index of the series in the split, ascending.
        index: ``(H,)`` int64 index of the observation in its series.
        true: ``(H, C)`` float32, as observed, with noise.
        predicted: ``(H, C)`` float32; NaN before prediction.
        std: ``(H, C)`` predicted standard deviation; None if the model predicts none.
        clean: ``(H, C)`` values without noise; None if unknown.
    """

    n_series: int
    series: Ints
    index: Ints
    true: Float32
    predicted: Float32
    std: Float32 | None = None
    clean: Float32 | None = None

    def select(self, series: NDArray[np.bool_]) -> ReconstructionTable:
        """The rows of the series where ``(N,)`` is True; ``n_series`` becomes their number."""
        rows = series[self.series]
        return replace(
            self,
            n_series=int(series.sum()),
            series=self.series[rows],
            index=self.index[rows],
            true=self.true[rows],
            predicted=self.predicted[rows],
            std=None if self.std is None else self.std[rows],
            clean=None if self.clean is None else self.clean[rows],
        )

    def save(self, path: Path, split: Subset) -> None:
        """Write a row per hidden observation, in one step."""
        import pyarrow as pa

        ids = pa.array([split.dataset.ids[i] for i in split.indices])
        columns = {"id": ids.take(pa.array(self.series)), "observation": self.index}
        for what in ("true", "predicted", "std", "clean"):
            if (values := getattr(self, what)) is not None:
                for c, channel in enumerate(split.dataset.schema.channels):
                    columns[f"{what}_{channel.name}"] = values[:, c]
        _write_parquet(
            path, columns, channels={c.name: c.unit for c in split.dataset.schema.channels}
        )
