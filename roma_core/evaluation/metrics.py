"""How good a classifier is, and how sure we are of that.

Every metric is a function of sums over series (correct ones per class, negative log-likelihood,
calibration gap per bin, …). A bootstrap resample only changes how often each series counts, so
all resamples together are one matrix product: counts ``(R, N)`` times contributions ``(N, M)``.

Shapes here:  N series   K classes   R resamples   M summed quantities

How far a regression is off, and how sure we are of that.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.predictions import Floats, PredictionTable, RegressionTable

N_BINS = 15
N_BUCKETS = 4
_COUNTS_AT_ONCE = 4_000_000  # entries of the (R, N) matrix held in memory, 32 MB


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Document):
    """A metric with its 95 % percentile bootstrap interval over series."""

    value: float
    low: float
    high: float


class PartEstimate(_Document):
    """A metric of a part of the series, such as a class.

    All resamples of one series are that series, so an interval of it would have no width and promise
    certainty where nothing is known: with fewer than two series both ends are None.
    """

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, whole: Estimate, n_series: int) -> PartEstimate:
        """The estimate, and its interval if there are series enough."""
        if n_series < 2:
            return cls(value=whole.value, low=None, high=None)
        return cls(value=whole.value, low=whole.low, high=whole.high)


class ClassMetrics(_Document):
    """One class against the rest; None where nothing is there to divide by."""

    name: str
    precision: float | None = Field(description="None if the class was never predicted.")
    recall: float | None = Field(description="None if the class has no series.")
    f1: float | None
    recall_interval: tuple[float, float] | None = Field(
        None, description="95 % Wilson interval; None if the class has fewer than two series."
    )
    support: int = Field(description="Series of this class.")
    predicted: int = Field(description="Series predicted as this class.")


class ReliabilityBin(_Document):
    """Series of similar confidence, the probability given to the predicted class."""

    confidence: float = Field(description="Mean confidence.")
    accuracy: float
    count: int


class LengthBucket(_Document):
    """Series of similar length."""

    shortest: int = Field(description="Observations of the shortest series in it.")
    longest: int
    count: int
    accuracy: float
    interval: tuple[float, float] | None = Field(None, description="95 % Wilson interval.")


class MissingBucket(_Document):
    """Series with a similar share of observations missing; see ``PredictionTable.missing``."""

    least: float
    most: float
    count: int
    accuracy: float
    interval: tuple[float, float]


class Metrics(_Document):
    """What ``evaluate`` finds."""

    schema_version: Literal[1] = 1
    n_series: int
    n_bootstrap: int
    seed: int
    accuracy: Estimate
    balanced_accuracy: Estimate = Field(description="Mean recall over classes that have series.")
    macro_f1: Estimate = Field(
        description="Mean F1 over classes that have series or were predicted."
    )
    log_loss: Estimate = Field(description="Mean of -ln p(true class), p not below 2.2e-16.")
    calibration_error: Estimate = Field(
        description="Expected calibration error of the predicted class (top label): the mean over "
        "15 bins of equal mass, weighted by their series, of |accuracy - mean confidence|. Never "
        "negative, therefore resamples lie a little above the value."
    )
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...] = Field(
        description="Row: true class. Column: predicted."
    )
    reliability: tuple[ReliabilityBin, ...]
    by_length: tuple[LengthBucket, ...]
    by_missing: tuple[MissingBucket, ...] = Field((), description="Empty if it is not known.")

    def estimates(self) -> dict[str, Estimate]:
        """The five headline metrics by name, in the order of the fields."""
        return {
            n: v for n in type(self).model_fields if isinstance(v := getattr(self, n), Estimate)
        }

    def flat(self) -> dict[str, float]:
        """Numbers for a tracker: ``accuracy``, ``accuracy_low``, ``accuracy_high``, …"""
        named = self.estimates().items()
        ends = {f"{n}_{end}": getattr(e, end) for n, e in named for end in ("low", "high")}
        return {n: e.value for n, e in named} | ends


def evaluate(table: PredictionTable, n_bootstrap: int = 1000, seed: int = 0) -> Metrics:
    """Judge a table of predictions.

    Args:
        n_bootstrap: resamples behind the intervals, at least 100.
        seed: of the resamples; equal input gives equal output.

    Raises:
        ValueError: too few resamples.
    """
    if n_bootstrap < 100:
        raise ValueError(f"n_bootstrap={n_bootstrap}: a 95 % interval needs at least 100 resamples")
    k = len(table.classes)
    confidence = table.probabilities.max(axis=1)
    bins = equal_mass_bins(confidence, N_BINS)
    contributions = _contributions(table, confidence, bins)  # (N, M)
    values = _headline(contributions.sum(axis=0)[None], k)  # each (1,)
    totals = resample_sums(contributions, n_bootstrap, seed)  # (R, M)
    resampled = _headline(totals, k)  # each (R,)
    estimates = {name: estimated(value, resampled[name]) for name, value in values.items()}
    confusion = np.zeros((k, k), np.int64)
    np.add.at(confusion, (table.labels, table.predicted), 1)
    return Metrics(
        n_series=len(table.ids),
        n_bootstrap=n_bootstrap,
        seed=seed,
        **estimates,
        per_class=_per_class(table.classes, confusion),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        reliability=_reliability(table, confidence, bins),
        by_length=_by_length(table),
        by_missing=_by_missing(table),
    )


def estimated(value: Floats, resampled: Floats) -> Estimate:
    """A metric ``(1,)`` with the interval of its resamples ``(R,)``."""
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(value=float(value[0]), low=float(low), high=float(high))


def equal_mass_bins(x: Floats, n_bins: int) -> NDArray[np.int64]:
    """Bin number of every element of ``x (N,)``; bins hold about N / n_bins each.

    Equal numbers share a bin, so the order of ``x`` does not matter; bins may be empty.
    """
    edges = np.quantile(x, np.linspace(0, 1, n_bins + 1)[1:-1])
    return np.searchsorted(edges, x, side="left")


def resample_sums(contributions: Floats, n_bootstrap: int, seed: int) -> Floats:
    """Sums over series of ``contributions (N, M)`` in every bootstrap resample, ``(R, M)``."""
    n = len(contributions)
    generator = np.random.default_rng(seed)
    at_once = max(1, _COUNTS_AT_ONCE // n)
    sums = []
    for start in range(0, n_bootstrap, at_once):
        r = min(at_once, n_bootstrap - start)
        drawn = generator.integers(n, size=(r, n)) + n * np.arange(r)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=r * n).reshape(r, n)
        sums.append(counts.astype(np.float64) @ contributions)
    return np.concatenate(sums)


def _contributions(table: PredictionTable, confidence: Floats, bins: NDArray[np.int64]) -> Floats:
    """What every series adds: K hits, K labels, K predictions, NLL, N_BINS calibration gaps."""
    n, k = table.probabilities.shape
    is_label = np.eye(k)[table.labels]  # (N, K)
    is_predicted = np.eye(k)[table.predicted]  # (N, K)
    of_label = table.probabilities[np.arange(n), table.labels]
    nll = -np.log(of_label.clip(np.finfo(np.float64).eps))
    gap = np.eye(N_BINS)[bins] * (table.correct - confidence)[:, None]  # (N, N_BINS)
    return np.hstack([is_label * is_predicted, is_label, is_predicted, nll[:, None], gap])


def _headline(sums: Floats, k: int) -> dict[str, Floats]:
    """The five metrics of every row of ``sums (R, M)``, each ``(R,)``."""
    hits, labels, predicted, nll, gap = np.split(sums, [k, 2 * k, 3 * k, 3 * k + 1], axis=1)
    n = labels.sum(axis=1)
    present = labels > 0
    recall = hits / np.where(present, labels, 1)
    either = labels + predicted
    f1 = 2 * hits / np.where(either > 0, either, 1)
    return {
        "accuracy": hits.sum(axis=1) / n,
        "balanced_accuracy": recall.sum(axis=1) / present.sum(axis=1),
        "macro_f1": f1.sum(axis=1) / (either > 0).sum(axis=1),
        "log_loss": nll[:, 0] / n,
        "calibration_error": np.abs(gap).sum(axis=1) / n,
    }


def _per_class(classes: tuple[str, ...], confusion: NDArray[np.int64]) -> tuple[ClassMetrics, ...]:
    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    rows = []
    for c, name in enumerate(classes):
        hits, support, predicted = (
            int(x) for x in (confusion[c, c], confusion[c].sum(), confusion[:, c].sum())
        )
        rows.append(
            ClassMetrics(
                name=name,
                precision=share(hits, predicted),
                recall=share(hits, support),
                f1=share(2 * hits, support + predicted),
                recall_interval=wilson(hits, support) if support > 1 else None,
                support=support,
                predicted=predicted,
            )
        )
    return tuple(rows)


def _reliability(
    table: PredictionTable, confidence: Floats, bins: NDArray[np.int64]
) -> tuple[ReliabilityBin, ...]:
    return tuple(
        ReliabilityBin(
            confidence=float(confidence[inside].mean()),
            accuracy=float(table.correct[inside].mean()),
            count=int(inside.sum()),
        )
        for inside in (bins == b for b in np.unique(bins))
    )


def _by_length(table: PredictionTable) -> tuple[LengthBucket, ...]:
    bins = equal_mass_bins(table.lengths.astype(np.float64), N_BUCKETS)
    return tuple(
        LengthBucket(
            shortest=int(table.lengths[inside].min()),
            longest=int(table.lengths[inside].max()),
            count=int(inside.sum()),
            accuracy=float(table.correct[inside].mean()),
            interval=wilson(int(table.correct[inside].sum()), int(inside.sum())),
        )
        for inside in (bins == b for b in np.unique(bins))
    )


def _by_missing(table: PredictionTable) -> tuple[MissingBucket, ...]:
    if table.missing is None:
        return ()
    bins = equal_mass_bins(table.missing, N_BUCKETS)
    return tuple(
        MissingBucket(
            least=float(table.missing[inside].min()),
            most=float(table.missing[inside].max()),
            count=int(inside.sum()),
            accuracy=float(table.correct[inside].mean()),
            interval=wilson(int(table.correct[inside].sum()), int(inside.sum())),
        )
        for inside in (bins == b for b in np.unique(bins))
    )


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share; holds for small ``n`` too, of at least 1."""
    z = 1.959964
    centre, spread = hits + z * z / 2, z * np.sqrt(hits * (n - hits) / n + z * z / 4)
    low, high = (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)
    return max(0.0, float(low)), min(1.0, float(high))


N_POSITION_BINS = 20


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
    contributions = _regression_metrics_contributions(table)  # (N, 4K + 1)
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


def _regression_metrics_contributions(table: RegressionTable) -> Floats:
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
    bins = equal_mass_bins(places, N_POSITION_BINS)
    return tuple(
        PositionBin(
            first=float(places[inside].min()),
            last=float(places[inside].max()),
            count=int(inside.sum()),
            rmse=tuple(np.sqrt(squared[inside].mean(axis=0)).tolist()),
        )
        for inside in (bins == b for b in np.unique(bins))
    )
