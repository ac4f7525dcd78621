"""Metrics of predicted values with intervals: of regressions and of reconstructions. Imports no torch.

Shapes here:
    N series   T observations   K targets   R resamples
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from roma_core.evaluation.metrics import (
    LABELS,
    N_BOOTSTRAP,
    Change,
    Estimate,
    Metrics,
    PartEstimate,
    bin_masks,
    equal_mass_bins,
    means_with_resamples,
    resample_sums,
)
from roma_core.evaluation.predictions import Floats, ReconstructionTable, RegressionTable
from roma_core.settings import Frozen

N_POSITION_BINS = 20
_CONSTANT = 1e-9  # of the mean square: a smaller variance is that of equal numbers, rounded


class TargetMetrics(Frozen):
    """One target, in its own unit."""

    name: str
    unit: str
    mse: Estimate  # mean squared error, in the square of the unit
    rmse: Estimate  # its root
    mae: Estimate  # mean absolute error
    nrmse: Estimate  # rmse as a fraction of the standard deviation in train
    # 1 - mse / variance of the true values: 0 is no better than their mean; None if they never differ
    r2: Estimate | None


class PositionBin(Frozen):
    """Observations at neighbouring positions on the first axis."""

    first: float
    last: float
    count: int
    rmse: tuple[float, ...]  # one per target


class RegressionMetrics(Metrics):
    """Metrics of a regressor; see :func:`evaluate_regression`.

    ``r2`` is the mean over the targets, of those that differ; ``nrmse`` the root of the mean of their
    squares. ``mse``, ``rmse`` and ``mae`` are per value: means over all observations and targets
    alike. They are meaningful only where the targets share a unit.
    """

    task: Literal["regression"] = "regression"
    primary_metric: str = "r2"
    n_observations: int  # rows: of observations, or of series if they have the targets
    r2: Estimate | None  # None if no target differs
    nrmse: Estimate
    coverage_95: Estimate | None = None  # fraction of values within 1.96 predicted deviations
    mse: Estimate  # mean squared error per value
    rmse: Estimate  # its root
    mae: Estimate  # mean absolute error per value
    per_target: tuple[TargetMetrics, ...]
    by_position: tuple[PositionBin, ...] = ()  # of targets of observations


class GroupErrors(Frozen):
    """Reconstruction errors of the series of one class."""

    name: str
    slug: str  # the distinct name in metrics: lower-case letters, digits and underscores
    n_series: int
    mse: PartEstimate  # without an interval if there is one series only
    clean_mse: PartEstimate | None


class ReconstructionMetrics(Metrics):
    """Metrics of a pretraining model's reconstructions, by the names that ``report.METRICS`` explains.

    ``mean_…`` and ``linear_…`` are those of two baselines, the mean of train and straight lines;
    ``gain_r2`` is ``r2`` less ``linear_r2``;
    ``…_observed_N`` those with only N observations of each series visible, and ``mse_GROUP`` and
    ``clean_mse_GROUP`` those of the series of one class.
    """

    task: Literal["interpolation"] = "interpolation"
    primary_metric: str = "r2"
    n_series: int  # with a hidden observation
    n_hidden: int  # hidden observations
    mean_hidden_fraction: float
    overall: dict[str, Estimate]
    groups: tuple[GroupErrors, ...] = ()

    @property
    def primary(self) -> Estimate:
        """The metric that compares models and decides."""
        return self.overall[self.primary_metric]

    def estimates(self) -> Mapping[str, PartEstimate]:
        """Estimates by name, those of groups included."""
        found: dict[str, PartEstimate] = dict(self.overall)
        for group in self.groups:
            found[f"mse_{group.slug}"] = group.mse
            if group.clean_mse is not None:
                found[f"clean_mse_{group.slug}"] = group.clean_mse
        return found

    def document(self) -> dict[str, Any]:
        """As of every task, with each estimate by name at the top level."""
        head = self.model_dump(mode="json", exclude={"overall", "groups"})
        return head | {n: e.model_dump(mode="json") for n, e in self.estimates().items()}


def r2_samples(table: ReconstructionTable, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> Floats:
    """``(1 + R,)``: R² of reconstructions, of all series and then of each resample.

    1 - squared error / that of the mean of train, over hidden values of all channels in normalised
    units: 0 is no better than that mean.
    """
    assert table.squared is not None
    _, index = np.unique(table.series, return_inverse=True)
    sums = np.zeros((index[-1] + 1, 2))
    np.add.at(sums, index, table.squared)
    totals = np.concatenate([sums.sum(axis=0)[None], resample_sums(sums, n_bootstrap, seed)])
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - totals[:, 0] / totals[:, 1]


def error_estimates(mse: Floats, mae: Floats) -> dict[str, Estimate]:
    """From samples ``(1 + R,)`` each."""
    return {"mse": Estimate.of(mse), "rmse": Estimate.of(np.sqrt(mse)), "mae": Estimate.of(mae)}


class RegressionSamples(NamedTuple):
    """Metrics of all series, then of each resample; NaN where the targets do not differ."""

    r2: Floats  # (1 + R,)
    nrmse: Floats  # (1 + R,)
    r2_of: Floats  # (1 + R, K), as all below
    nrmse_of: Floats
    mse_of: Floats
    mae_of: Floats


def regression_samples(
    table: RegressionTable, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> RegressionSamples:
    """Equal seeds resample equal series, so that differences between two tables are paired."""
    errors, k = table.errors, len(table.channels)
    true = table.true - table.true.mean(axis=0)  # so that squares do not cancel
    values = np.hstack([errors**2, np.abs(errors), true, true**2])  # (T, 4K)
    means = means_with_resamples(table.series, values, n_bootstrap, seed)
    mse, mae, mean, square = np.split(means, [k, 2 * k, 3 * k], axis=1)  # each (1 + R, K)
    variance = square - mean**2
    differs = variance > _CONSTANT * square  # not so where a resample repeats a single value
    r2 = 1 - mse / np.where(differs, variance, np.nan)
    scaled = mse / table.scale**2
    with np.errstate(invalid="ignore"):
        mean_r2 = np.where(differs, r2, 0).sum(axis=1) / differs.sum(axis=1)
    return RegressionSamples(mean_r2, np.sqrt(scaled.mean(axis=1)), r2, np.sqrt(scaled), mse, mae)


def evaluate_regression(table: RegressionTable) -> RegressionMetrics:
    """Metrics of a table of predicted values; equal input gives equal output."""
    samples, errors = regression_samples(table), table.errors
    bins = []
    if table.positions is not None:
        position = table.positions[:, 0]
        bins = bin_masks(equal_mass_bins(position, N_POSITION_BINS))
    inside_95 = None
    if table.std is not None:
        hits = (np.abs(errors) <= 1.96 * table.std).mean(axis=1, keepdims=True)
        inside_95 = Estimate.of(means_with_resamples(table.series, hits)[:, 0])
    return RegressionMetrics(
        n_series=len(table.ids),
        n_observations=len(table.true),
        r2=_if_known(samples.r2),
        nrmse=Estimate.of(samples.nrmse),
        coverage_95=inside_95,
        **error_estimates(samples.mse_of.mean(axis=1), samples.mae_of.mean(axis=1)),
        per_target=tuple(
            TargetMetrics(
                name=target.name,
                unit=target.unit,
                **error_estimates(samples.mse_of[:, i], samples.mae_of[:, i]),
                nrmse=Estimate.of(samples.nrmse_of[:, i]),
                r2=_if_known(samples.r2_of[:, i]),
            )
            for i, target in enumerate(table.channels)
        ),
        by_position=tuple(
            PositionBin(
                first=float(position[inside].min()),
                last=float(position[inside].max()),
                count=int(inside.sum()),
                rmse=tuple(np.sqrt((errors[inside] ** 2).mean(axis=0)).tolist()),
            )
            for inside in bins
        ),
    )


def _if_known(samples: Floats) -> Estimate | None:
    known = not np.isnan(samples[0]) and not np.isnan(samples[1:]).all()
    return Estimate.of(samples) if known else None


def compare_regressions(
    candidate: RegressionTable, champion: RegressionTable
) -> tuple[Change, ...]:
    """Changes of the headline metrics, and of R² of every target.

    Raises:
        ValueError: the tables are not about the same series with the same targets.
    """
    if problem := candidate.differs_from(champion):
        raise ValueError(f"the tables cannot be compared: {problem}")
    ours, theirs = regression_samples(candidate), regression_samples(champion)
    pairs = {LABELS[name]: (getattr(ours, name), getattr(theirs, name)) for name in ("r2", "nrmse")}
    for i, target in enumerate(candidate.channels):
        pairs[f"R² of {target.name}"] = ours.r2_of[:, i], theirs.r2_of[:, i]
    known = {name: pair for name, pair in pairs.items() if not np.isnan(pair[0][0])}
    return tuple(Change.of(name, *pair, len(candidate.ids)) for name, pair in known.items())
