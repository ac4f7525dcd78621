"""What the metrics of every task share: estimates with intervals, resampling, bins. Imports no torch.

Most metrics are functions of sums over series (correct ones per class, negative log-likelihood,
squared errors, …). A bootstrap resample only changes how often each series counts, so all resamples
together are one matrix product: counts ``(R, N)`` times contributions ``(N, M)``.

Shapes here:
    N series   T observations   R resamples   M summed quantities
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np

from roma_core.evaluation.predictions import Bools, Floats, Ints
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
