"""The table of predictions: what was true, what a model said, series by series.

Every number of an evaluation, and every comparison between two models, is computed from such a
table alone, so the model does not have to be run again. On disk it is one Parquet file with a row
per series; its schema metadata holds the class order and the lineage.

The table of a regression's predictions: what was true and what a model said, of every observation.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.files import write_bytes
from roma_core.schema import Channel, PositionAxis

SCHEMA_VERSION = 1
_METADATA_KEY = b"roma_predictions"
_SUM_TOLERANCE = 1e-4  # probabilities computed in float32 sum to one only so well


@dataclass(frozen=True, eq=False)
class PredictionTable:
    """Labels and predicted probabilities of N series over K classes.

    Attributes:
        ids: N distinct ids.
        classes: K distinct class names; labels and columns of ``probabilities`` index them.
        labels: ``(N,)`` int64, the true classes.
        probabilities: ``(N, K)`` float64, finite, in [0, 1], rows sum to 1 within 1e-4.
        lengths: ``(N,)`` int64, observations per series, at least 1.
        lineage: facts that travel along, such as the model's and the data's digest.
        missing: ``(N,)`` float64, share of the observations that a series sampled at the usual pace
            would have beyond those it has, in [0, 1); None if nobody knows.

    Raises:
        ValueError: shapes, ids, labels or probabilities are not as above.
    """

    ids: list[str]
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    lengths: NDArray[np.int64]
    lineage: Mapping[str, str] = field(default_factory=dict)
    missing: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        n, k = len(self.ids), len(self.classes)
        if n == 0 or k < 2:
            raise ValueError(f"expected at least 1 series and 2 classes, got {n} and {k}")
        for name, names in (("ids", self.ids), ("classes", self.classes)):
            if len(set(names)) != len(names):
                twice = [name for name, count in Counter(names).most_common(3) if count > 1]
                raise ValueError(f"{name} must be distinct; these come more than once: {twice}")
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
        self._refuse_rows("labels", ~labelled, f"0 to {k - 1}")
        self._refuse_rows("lengths", ~(self.lengths >= 1), "at least 1")
        self._refuse_rows("probabilities", ~np.isfinite(p).all(axis=1), "finite numbers")
        self._refuse_rows("probabilities", ((p < 0) | (p > 1)).any(axis=1), "numbers in [0, 1]")
        off = np.abs(p.sum(axis=1) - 1) > _SUM_TOLERANCE
        self._refuse_rows("probabilities", off, f"rows that sum to 1 within {_SUM_TOLERANCE}")

    def _refuse_rows(self, name: str, bad: NDArray[np.bool_] | np.bool_, expected: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise ValueError(
                f"{name}: expected {expected}, but {int(bad.sum())} of {len(self.ids)} series "
                f"differ; the first is {self.ids[row]!r} with {getattr(self, name)[row].tolist()}"
            )

    @property
    def predicted(self) -> NDArray[np.int64]:
        """``(N,)`` int64, the most probable class; the first one of a tie."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``(N,)`` bool."""
        return self.predicted == self.labels

    def save(self, path: Path) -> None:
        """Write the table as Parquet, in one step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = np.array(self.classes, dtype=object)
        flat = pa.array(self.probabilities.ravel())
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "length": pa.array(self.lengths),
            "label": pa.array(names[self.labels], pa.string()),
            "predicted": pa.array(names[self.predicted], pa.string()),
            "probabilities": pa.FixedSizeListArray.from_arrays(flat, len(self.classes)),
        }
        if self.missing is not None:
            columns["missing"] = pa.array(self.missing)
        header = {
            "schema_version": SCHEMA_VERSION,
            "classes": self.classes,
            "lineage": dict(self.lineage),
        }
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(header)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(path, buffer.getvalue())

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
        header = json.loads((table.schema.metadata or {}).get(_METADATA_KEY, b"{}"))
        if header.get("schema_version") != SCHEMA_VERSION:
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


_regression_table_METADATA_KEY = b"roma_regression"

Floats = NDArray[np.float64]


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
        lineage: facts that travel along, such as the data's digest.

    Raises:
        ValueError: shapes do not fit together, or a number is not finite.
    """

    ids: list[str]
    lengths: NDArray[np.int64]
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
    def starts(self) -> NDArray[np.int64]:
        """``(N,)`` first row of each series."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def series(self) -> NDArray[np.int64]:
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
        """Write the table as Parquet, in one step."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {"id": pa.array(self.ids, pa.string()).take(pa.array(self.series))}
        for k, axis in enumerate(self.axes):
            columns[f"position_{axis.name}"] = pa.array(self.positions[:, k])
        for what in ("true", "predicted"):
            for k, target in enumerate(self.targets):
                columns[f"{what}_{target.name}"] = pa.array(getattr(self, what)[:, k])
        header = {
            "schema_version": 1,
            "axes": {axis.name: axis.unit for axis in self.axes},
            "targets": {target.name: target.unit for target in self.targets},
            "lineage": dict(self.lineage),
        }
        table = pa.table(columns).replace_schema_metadata(
            {_regression_table_METADATA_KEY: json.dumps(header)}
        )
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(path, buffer.getvalue())
