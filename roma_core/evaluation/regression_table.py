"""The table of a regression's predictions: what was true and what a model said, of every observation.

On disk it is one Parquet file with a row per observation: ``id``, ``position_<axis>``,
``true_<target>`` and ``predicted_<target>``; units and lineage are in the schema's metadata.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from roma_core.data.schema import Channel, PositionAxis
from roma_core.files import write_bytes

_METADATA_KEY = b"roma_regression"

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
        table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(header)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        write_bytes(path, buffer.getvalue())
