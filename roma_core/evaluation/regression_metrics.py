"""How far a regression is off, and how sure we are of that.

Errors are in the units of the targets. As for classifiers, every metric is a function of sums over
series, and a bootstrap resample changes only how often each series counts: observations of one
series are alike, so resampling them one by one would promise too much.

Shapes here:  N series   T observations   K targets   R resamples
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.metrics import Estimate, equal_mass_bins, estimated, resample_sums
from roma_core.evaluation.regression_table import Floats, RegressionTable

N_BINS = 20


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetMetrics(_Document):
    """One target, in its own unit."""

    name: str
    unit: str
    mse: Estimate = Field(description="Mean squared error, in the square of the unit.")
    rmse: Estimate = Field(description="Its root.")
    mae: Estimate = Field(description="Mean absolute error.")
    r2: Estimate | None = Field(
        description="1 - mse / variance of the true values: 0 is no better than their mean. None if "
        "they never differ."
    )


class PositionBin(_Document):
    """Observations at neighbouring positions on the first axis."""

    first: float
    last: float
    count: int
    rmse: tuple[float, ...] = Field(description="One per target.")


class RegressionMetrics(_Document):
    """What ``evaluate_regression`` finds.

    ``mse``, ``rmse`` and ``mae`` are per value: means over all observations and targets alike. They
    say something only where the targets share a unit.
    """

    schema_version: Literal[1] = 1
    n_series: int
    n_observations: int
    n_bootstrap: int
    seed: int
    mse: Estimate = Field(description="Mean squared error per value.")
    rmse: Estimate = Field(description="Its root.")
    mae: Estimate = Field(description="Mean absolute error per value.")
    per_target: tuple[TargetMetrics, ...]
    by_position: tuple[PositionBin, ...]

    def flat(self) -> dict[str, float]:
        """Numbers for a tracker: ``mse``, ``mse_low``, ``mse_high``, …"""
        named = {"mse": self.mse, "rmse": self.rmse, "mae": self.mae}
        ends = {f"{n}_{end}": getattr(e, end) for n, e in named.items() for end in ("low", "high")}
        return {n: e.value for n, e in named.items()} | ends


def evaluate_regression(
    table: RegressionTable, n_bootstrap: int = 1000, seed: int = 0
) -> RegressionMetrics:
    """Judge a table of predictions.

    Args:
        n_bootstrap: resamples behind the 95 % intervals.
        seed: of the resamples; equal input gives equal output.
    """
    contributions = _contributions(table)  # (N, 4K + 1)
    value = _means(contributions.sum(axis=0)[None])  # each (1, K)
    drawn = _means(resample_sums(contributions, n_bootstrap, seed))  # each (R, K)

    def all_of(name: str, root: bool = False) -> Estimate:
        one, many = value[name].mean(axis=1), drawn[name].mean(axis=1)
        return estimated(np.sqrt(one), np.sqrt(many)) if root else estimated(one, many)

    per_target = []
    for k, target in enumerate(table.targets):
        one, many = ({name: x[:, k] for name, x in means.items()} for means in (value, drawn))
        varied = many["variance"] > 0  # a resample may hold one value again and again
        many_r2 = 1 - many["mse"][varied] / many["variance"][varied]
        r2 = None
        if one["variance"] > 0 and varied.any():
            r2 = estimated(1 - one["mse"] / one["variance"], many_r2)
        per_target.append(
            TargetMetrics(
                name=target.name,
                unit=target.unit,
                mse=estimated(one["mse"], many["mse"]),
                rmse=estimated(np.sqrt(one["mse"]), np.sqrt(many["mse"])),
                mae=estimated(one["mae"], many["mae"]),
                r2=r2,
            )
        )
    return RegressionMetrics(
        n_series=len(table.ids),
        n_observations=len(table.true),
        n_bootstrap=n_bootstrap,
        seed=seed,
        mse=all_of("mse"),
        rmse=all_of("mse", root=True),
        mae=all_of("mae"),
        per_target=tuple(per_target),
        by_position=_by_position(table),
    )


def _contributions(table: RegressionTable) -> Floats:
    """What every series adds: K squared and K absolute errors, K true values and their squares, count."""
    errors = table.errors
    true = table.true - table.true.mean(axis=0)  # so that squares do not cancel
    parts = np.hstack([errors**2, np.abs(errors), true, true**2, np.ones((len(errors), 1))])
    return np.add.reduceat(parts, table.starts, axis=0)


def _means(sums: Floats) -> dict[str, Floats]:
    """The quantities of every row of sums ``(R, 4K + 1)``, each ``(R, K)``."""
    squared, absolute, true, true_squared = np.split(sums[:, :-1] / sums[:, -1:], 4, axis=1)
    return {"mse": squared, "mae": absolute, "variance": true_squared - true**2}


def _by_position(table: RegressionTable) -> tuple[PositionBin, ...]:
    places, squared = table.positions[:, 0], table.errors**2
    bins = equal_mass_bins(places, N_BINS)
    return tuple(
        PositionBin(
            first=float(places[inside].min()),
            last=float(places[inside].max()),
            count=int(inside.sum()),
            rmse=tuple(np.sqrt(squared[inside].mean(axis=0)).tolist()),
        )
        for inside in (bins == b for b in np.unique(bins))
    )
