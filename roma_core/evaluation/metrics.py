"""Metrics with intervals: what those of every task share, and those of predicted values.

Those of regressions and reconstructions are here, those of classes in ``classification_metrics``.
Imports no torch.

Most metrics are functions of sums over series (correct ones per class, negative log-likelihood,
squared errors, …). A bootstrap resample only changes how often each series counts, so all resamples
together are one matrix product: counts ``(R, N)`` times contributions ``(N, M)``.

Shapes here:
    N series   T observations   K targets   R resamples   M summed quantities
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from roma_core.evaluation.predictions import (
    Bools,
    Floats,
    Ints,
    ReconstructionTable,
    RegressionTable,
)
from roma_core.settings import Frozen

N_BOOTSTRAP = 1000
LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "log_loss": "log loss",
    "brier": "Brier score",
    "calibration_error": "calibration error",
    "r2": "R²",
    "nrmse": "normalised RMSE",
    "coverage_95": "coverage of the 95 % interval",
    "rmse": "RMSE",
    "mae": "mean absolute error",
    "mse": "mean squared error",
}
"""Metrics as they are written in a sentence."""
_COUNTS_AT_ONCE = 4_000_000  # entries of the (R, N) matrix held in memory, 32 MB
N_POSITION_BINS = 20
_CONSTANT = 1e-9  # of the mean square: a smaller variance is that of equal numbers, rounded


class PartEstimate(Frozen):
    """A metric of a part of the series, such as a class.

    All resamples of a single series are that series, so its interval would have no width: with fewer
    than two series both ends are None.
    """

    value: float
    low: float | None
    high: float | None


class Estimate(PartEstimate):
    """A metric with its 95 % percentile bootstrap interval over series."""

    low: float
    high: float

    @classmethod
    def of(cls, samples: Floats) -> Estimate:
        """From ``(1 + R,)``: the value, then those of the resamples."""
        low, high = np.nanpercentile(samples[1:], [2.5, 97.5])  # NaN: undefined in a resample
        return cls(value=float(samples[0]), low=float(low), high=float(high))

    def of_part(self, n_series: int) -> PartEstimate:
        """The same estimate for a part of ``n_series`` series."""
        if n_series < 2:
            return PartEstimate(value=self.value, low=None, high=None)
        return PartEstimate(value=self.value, low=self.low, high=self.high)


class Metrics(Frozen):
    """What the metrics of every task have in common; ``metrics.json``."""

    schema_version: Literal[1] = 1
    n_series: int
    n_bootstrap: int = N_BOOTSTRAP
    seed: int = 0
    primary_metric: str  # that compares models and decides
    primary_reason: str = ""

    @property
    def primary(self) -> PartEstimate:
        return self.estimates()[self.primary_metric]

    def estimates(self) -> Mapping[str, PartEstimate]:
        """The headline metrics by name, in the order of the fields."""
        return {
            n: v for n in type(self).model_fields if isinstance(v := getattr(self, n), Estimate)
        }

    def flat(self) -> dict[str, float]:
        """Numbers for a tracker: ``accuracy``, ``accuracy_low``, ``accuracy_high``, …"""
        return {
            name if end == "value" else f"{name}_{end}": number
            for name, estimate in self.estimates().items()
            for end in ("value", "low", "high")
            if (number := getattr(estimate, end)) is not None
        }

    def document(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        return self.model_dump(mode="json")


def headline(document: Mapping[str, Any]) -> str:
    """The primary metric in the content of ``metrics.json``: ``AUROC 0.744 (95 % 0.701–0.786)``."""
    name = document.get("primary_metric", "accuracy")
    value = Estimate.model_validate(document[name])
    return f"{LABELS[name]} {value.value:.3f} (95 % {value.low:.3f}–{value.high:.3f})"


class Change(Frozen):
    """One metric of both models; the difference has a paired 95 % bootstrap interval."""

    name: str
    candidate: float
    champion: float
    difference: PartEstimate  # candidate minus champion; no interval for a single series
    n_series: int

    @classmethod
    def of(cls, name: str, ours: Floats, theirs: Floats, n_series: int) -> Change:
        """From paired samples, ``(1 + R,)`` each, over ``n_series`` series."""
        return cls(
            name=name,
            candidate=float(ours[0]),
            champion=float(theirs[0]),
            difference=Estimate.of(ours - theirs).of_part(n_series),
            n_series=n_series,
        )


class MeasuredBaseline(Frozen):
    """Another method, trained and evaluated in the same run on the same series."""

    name: str
    metric: str  # the primary metric
    value: Estimate
    difference: Estimate  # the model's minus this one's, with a paired interval
    n_train: int  # series
    seconds: float

    @property
    def slug(self) -> str:
        """The name in a tracker."""
        return re.sub(r"\W+", "_", self.name.lower())


def resample_counts(n: int, n_bootstrap: int, seed: int) -> Iterator[Floats]:
    """How often each of ``n`` series counts in every bootstrap resample: ``(r, n)`` at a time."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _COUNTS_AT_ONCE // n)
    for start in range(0, n_bootstrap, at_once):
        r = min(at_once, n_bootstrap - start)
        drawn = generator.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        yield np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n).astype(np.float64)


def resample_sums(contributions: Floats, n_bootstrap: int, seed: int) -> Floats:
    """Sums over series of ``contributions (N, M)`` in every bootstrap resample, ``(R, M)``."""
    counts = resample_counts(len(contributions), n_bootstrap, seed)
    return np.concatenate([some @ contributions for some in counts])


def sums_with_resamples(
    contributions: Floats, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> Floats:
    """``(1 + R, M)``: sums of ``contributions (N, M)`` over all series, then over each resample."""
    resampled = resample_sums(contributions, n_bootstrap, seed)
    return np.concatenate([contributions.sum(axis=0)[None], resampled])


def means_with_resamples(
    series: Ints, values: Floats, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> Floats:
    """``(1 + R, M)``: means of ``values (T, M)`` over all rows, then over those of each resample.

    Whole series are resampled; ``series`` is the ``(T,)`` series of each row. NaN is left out; a
    column of nothing else has a mean of NaN.
    """
    _, index = np.unique(series, return_inverse=True)
    known = ~np.isnan(values)
    sums = [np.bincount(index, column) for column in np.where(known, values, 0).T]
    counts = [np.bincount(index, column) for column in known.T]
    totals = sums_with_resamples(np.stack([*sums, *counts], axis=1), n_bootstrap, seed)
    with np.errstate(invalid="ignore"):
        return totals[:, : len(sums)] / totals[:, len(sums) :]


def equal_mass_bins(x: Floats, n_bins: int) -> Ints:
    """Bin number of every element of ``x (N,)``; bins hold about N / n_bins each.

    Equal numbers share a bin, so the order of ``x`` does not matter; bins may be empty.
    """
    edges = np.quantile(x, np.linspace(0, 1, n_bins + 1)[1:-1])
    return np.searchsorted(edges, x, side="left")


def bin_masks(bins: Ints) -> list[Bools]:
    """The ``(N,)`` elements of each bin that has any."""
    return [bins == b for b in np.unique(bins)]


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a fraction; valid for small ``n`` too, of at least 1."""
    from scipy.stats import binomtest

    interval = binomtest(hits, n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


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
    totals = sums_with_resamples(sums, n_bootstrap, seed)
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
