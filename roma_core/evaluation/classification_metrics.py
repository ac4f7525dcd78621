"""Metrics of a classifier with intervals, computed from a table of its predictions. Imports no torch.

The areas under curves are cumulative sums of how often each series counts, in the order of the scores.

Shapes here:
    N series   K classes   R resamples   M summed quantities
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import numpy as np

from roma_core.evaluation.metrics import (
    LABELS,
    N_BOOTSTRAP,
    Change,
    Estimate,
    Metrics,
    bin_masks,
    equal_mass_bins,
    resample_counts,
    sums_with_resamples,
    wilson,
)
from roma_core.evaluation.predictions import Bools, Floats, PredictionTable
from roma_core.settings import Frozen
from roma_core.trainer.defaults import PrimaryMetric, primary_metric

N_BINS, N_ACCURACY_BINS = 15, 4


class ClassMetrics(Frozen):
    """One class against the rest; None where a denominator is zero."""

    name: str
    precision: float | None  # None if the class was never predicted
    recall: float | None  # None if the class has no series
    f1: float | None
    recall_interval: tuple[float, float] | None = None  # 95 % Wilson, of two series or more
    auroc: float | None = None  # None if all series or none are of this class, as the next
    average_precision: float | None = None
    support: int  # series of this class
    predicted: int  # series predicted as this class


class ThresholdMetrics(Frozen):
    """Of two classes, the second predicted where its probability is at least ``threshold``."""

    threshold: float
    predicted: int  # series predicted as the second class
    sensitivity: float  # fraction of the second class that is predicted as such: its recall
    sensitivity_interval: tuple[float, float]  # 95 % Wilson
    specificity: float  # the same of the first class
    specificity_interval: tuple[float, float]
    precision: float | None  # None if none was predicted
    f1: float


class ReliabilityBin(Frozen):
    """Series of similar confidence, the probability given to the predicted class."""

    confidence: float  # the mean
    accuracy: float
    count: int


class AccuracyBin(Frozen):
    """Accuracy of series of similar length, or with a similar fraction of observations missing."""

    least: float
    most: float
    count: int
    accuracy: float
    interval: tuple[float, float]  # 95 % Wilson


class ClassificationMetrics(Metrics):
    """Metrics of a classifier; see :func:`evaluate`."""

    task: Literal["classification"] = "classification"
    primary_metric: PrimaryMetric = "accuracy"
    accuracy: Estimate
    balanced_accuracy: Estimate  # mean recall over classes that have series
    macro_f1: Estimate  # mean F1 over classes that have series or were predicted
    # areas under the ROC curve and, as a sum of steps, the precision-recall curve: of the second of two
    # classes, else the mean over classes against the rest; None if all series are of one class
    auroc: Estimate | None = None
    average_precision: Estimate | None = None
    log_loss: Estimate  # mean of -ln p(true class), p not below 2.2e-16
    # mean squared error of the probabilities, summed over classes; of two classes that of one
    brier: Estimate | None = None
    # expected calibration error of the predicted class (top label): the mean over 15 bins of equal
    # mass, weighted by their series, of |accuracy - mean confidence|; never negative, therefore
    # resamples lie a little above the value
    calibration_error: Estimate
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]  # row: true class, column: predicted
    reliability: tuple[ReliabilityBin, ...]
    by_length: tuple[AccuracyBin, ...]
    by_missing: tuple[AccuracyBin, ...] = ()  # empty if it is unknown
    thresholds: tuple[ThresholdMetrics, ...] = ()  # of two classes
    notes: tuple[str, ...] = ()  # classes without series, and what follows for the metrics

    def compared_by(
        self, wanted: PrimaryMetric | Literal["auto"], train: Mapping[str, int]
    ) -> ClassificationMetrics:
        """The same with its primary metric; ``train``: number of training series of each class.

        Raises:
            ValueError: the metric that was asked for is undefined on these series.
        """
        name, reason = primary_metric(wanted, train)
        if getattr(self, name) is None:
            if wanted != "auto":
                raise ValueError(
                    f"primary_metric: {name} is undefined on the test split. {self.notes[0]} Choose "
                    f"primary_metric: accuracy, or a larger or stratified test split"
                )
            name, reason = "accuracy", "all test series are of one class"
        return self.model_copy(update={"primary_metric": name, "primary_reason": reason})


def evaluate(table: PredictionTable, n_bootstrap: int = N_BOOTSTRAP) -> ClassificationMetrics:
    """Metrics of a table of predicted classes; equal input gives equal output.

    Raises:
        ValueError: fewer than 100 resamples (``n_bootstrap``) are to be behind the intervals.
    """
    if n_bootstrap < 100:
        raise ValueError(f"n_bootstrap={n_bootstrap}: a 95 % interval needs at least 100 resamples")
    n, k = table.probabilities.shape
    confidence, correct = table.probabilities.max(axis=1), table.correct
    bins = equal_mass_bins(confidence, N_BINS)
    confusion = np.zeros((k, k), np.int64)
    np.add.at(confusion, (table.labels, table.predicted), 1)
    counts = [x.tolist() for x in (confusion.diagonal(), confusion.sum(1), confusion.sum(0))]
    samples = metric_samples(table, n_bootstrap)
    areas = {c: _areas(np.ones((1, n)), *one_vs_rest(table, c)) for c in ranked_classes(table)}
    return ClassificationMetrics(
        n_series=n,
        n_bootstrap=n_bootstrap,
        **{name: Estimate.of(values) for name, values in samples.items()},
        per_class=tuple(
            ClassMetrics(
                name=name,
                precision=hits / predicted if predicted else None,
                recall=hits / support if support else None,
                f1=2 * hits / (support + predicted) if support + predicted else None,
                recall_interval=wilson(hits, support) if support > 1 else None,
                auroc=float(areas[c][0][0]) if c in areas else None,
                average_precision=float(areas[c][1][0]) if c in areas else None,
                support=support,
                predicted=predicted,
            )
            for c, (name, hits, support, predicted) in enumerate(
                zip(table.classes, *counts, strict=True)
            )
        ),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        reliability=tuple(
            ReliabilityBin(
                confidence=float(confidence[inside].mean()),
                accuracy=float(correct[inside].mean()),
                count=int(inside.sum()),
            )
            for inside in bin_masks(bins)
        ),
        by_length=_accuracy_bins(correct, table.lengths.astype(np.float64)),
        by_missing=() if table.missing is None else _accuracy_bins(correct, table.missing),
        thresholds=_at_thresholds(table) if k == 2 and areas else (),
        notes=_notes(table),
    )


def metric_samples(
    table: PredictionTable, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0, *, ranks: bool = True
) -> dict[str, Floats]:
    """Headline metrics by name, each ``(1 + R,)``: of all series, then of each resample.

    Equal seeds resample equal series, so that differences between two tables of the same series in
    the same order are paired. AUROC and average precision are left out where all series are of one
    class, and NaN in such a resample; ``ranks=False`` saves their time.
    """
    n, k = table.probabilities.shape
    confidence, correct = table.probabilities.max(axis=1), table.correct
    is_label = np.eye(k)[table.labels]  # (N, K)
    is_predicted = np.eye(k)[table.predicted]  # (N, K)
    brier = ((table.probabilities - is_label) ** 2).sum(axis=1) / (2 if k == 2 else 1)
    bins = equal_mass_bins(confidence, N_BINS)
    gap = np.eye(N_BINS)[bins] * (correct - confidence)[:, None]  # (N, N_BINS)
    columns = [is_label * is_predicted, is_label, is_predicted, nll(table)[:, None], brier[:, None]]
    contributions = np.hstack([*columns, gap])
    ranked = [one_vs_rest(table, c) for c in ranked_classes(table)]
    ranked = (ranked[-1:] if k == 2 else ranked) if ranks else []
    sums, areas = [], []
    for counts in itertools.chain([np.ones((1, n))], resample_counts(n, n_bootstrap, seed)):
        sums.append(counts @ contributions)
        areas.append(np.array([_areas(counts, *one) for one in ranked]))  # (K, 2, r)
    found = _headline(np.concatenate(sums), k)
    if ranked:
        known = np.ma.masked_invalid(np.concatenate(areas, axis=2)).mean(axis=0)
        auroc, average_precision = known.filled(np.nan)
        found |= {"auroc": auroc, "average_precision": average_precision}
    return found


def chance(table: PredictionTable, name: str) -> float:
    """The largest expected metric of predictions that do not depend on the series."""
    n, counts = len(table.labels), np.bincount(table.labels, minlength=len(table.classes))
    present = counts[counts > 0]
    ranked = counts[1:] if len(counts) == 2 else present
    harmonic = (1 / np.arange(1, n + 1)).sum()  # of few series chance is above the fraction
    precision = (harmonic + (ranked - 1) / max(n - 1, 1) * (n - harmonic)) / n
    return {
        "accuracy": float(present.max() / n),
        "balanced_accuracy": 1 / len(present),
        # F1 is the harmonic mean of a class's fractions of the labels and of the predictions
        "macro_f1": 1 / len(present),
        "auroc": 0.5,
        "average_precision": float(precision.mean()),  # of series in random order
    }[name]


def ranked_classes(table: PredictionTable) -> list[int]:
    """Classes that have series, and others have, too: those with curves."""
    return [c for c in np.unique(table.labels).tolist() if (table.labels != c).any()]


def one_vs_rest(table: PredictionTable, c: int) -> tuple[Bools, Floats]:
    """``(N,)`` whether a series is of class ``c``, and the probability of it."""
    return table.labels == c, table.probabilities[:, c]


def _areas(counts: Floats, positive: Bools, scores: Floats) -> tuple[Floats, Floats]:
    """AUROC and average precision, ``(r,)`` each; NaN without series in or outside the class.

    Both are means over the series in the class, P of them: of the fraction of the others that have a
    smaller score, and of the precision at its own score. ``counts (r, N)``: how often each counts.
    """
    order = np.argsort(-scores, kind="stable")
    descending = -scores[order]
    inside = np.flatnonzero(positive[order])  # (P,) ranks, as all below
    own = descending[inside]
    total = np.cumsum(counts.take(order, axis=1), axis=1)  # (r, N)
    weight = counts[:, order[inside]]  # (r, P)
    true = np.cumsum(weight, axis=1)
    # of equal scores all are counted, or none of them
    at, before = (
        (
            np.pad(total, ((0, 0), (1, 0)))[:, np.searchsorted(descending, own, side)],
            np.pad(true, ((0, 0), (1, 0)))[:, np.searchsorted(own, own, side)],
        )
        for side in ("right", "left")
    )
    n_true = true[:, -1]
    n_false = total[:, -1] - n_true
    # others of a larger score; half of equal ones
    above = (at[0] - at[1] + before[0] - before[1]) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = 1 - (weight * above).sum(axis=1) / (n_true * n_false)
        precision = (weight * (at[1] / np.maximum(at[0], 1))).sum(axis=1) / n_true
    return auroc, np.where(n_false > 0, precision, np.nan)


def _at_thresholds(table: PredictionTable) -> tuple[ThresholdMetrics, ...]:
    """At fixed thresholds: one that is chosen on the test split would make its numbers too good."""
    positive, p = one_vs_rest(table, 1)
    n_positive, found = int(positive.sum()), []
    n_negative = len(positive) - n_positive
    for threshold in (0.05, *(k / 10 for k in range(1, 10)), 0.95):
        predicted = int((p >= threshold).sum())
        hits = int((positive & (p >= threshold)).sum())
        rejected = n_negative - (predicted - hits)
        found.append(
            ThresholdMetrics(
                threshold=threshold,
                predicted=predicted,
                sensitivity=hits / n_positive,
                sensitivity_interval=wilson(hits, n_positive),
                specificity=rejected / n_negative,
                specificity_interval=wilson(rejected, n_negative),
                precision=hits / predicted if predicted else None,
                f1=2 * hits / (n_positive + predicted),
            )
        )
    return tuple(found)


def _notes(table: PredictionTable) -> tuple[str, ...]:
    present = np.unique(table.labels)
    absent = [repr(name) for c, name in enumerate(table.classes) if c not in present]
    if not absent:
        return ()
    if len(present) == 1:
        return (
            f"All series are of class {table.classes[present[0]]!r}: AUROC, average precision and their "
            f"curves are undefined, and balanced accuracy is the accuracy.",
        )
    return (
        f"Without series in this split: {', '.join(absent)}. Balanced accuracy, AUROC and average "
        f"precision are means over the other classes; macro F1 also counts a class that was predicted.",
    )


def nll(table: PredictionTable) -> Floats:
    """``(N,)`` -ln p(true class), p not below 2.2e-16."""
    p = table.probabilities[np.arange(len(table.ids)), table.labels]
    return -np.log(p.clip(np.finfo(np.float64).eps))


def _headline(sums: Floats, k: int) -> dict[str, Floats]:
    """The metrics of sums, of every row of ``sums (1 + R, M)``, each ``(1 + R,)``."""
    parts = [k, 2 * k, 3 * k, 3 * k + 1, 3 * k + 2]
    hits, labels, predicted, nll, brier, gap = np.split(sums, parts, axis=1)
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
        "brier": brier[:, 0] / n,
        "calibration_error": np.abs(gap).sum(axis=1) / n,
    }


def _accuracy_bins(correct: Bools, x: Floats) -> tuple[AccuracyBin, ...]:
    return tuple(
        AccuracyBin(
            least=float(x[inside].min()),
            most=float(x[inside].max()),
            count=int(inside.sum()),
            accuracy=float(correct[inside].mean()),
            interval=wilson(int(correct[inside].sum()), int(inside.sum())),
        )
        for inside in bin_masks(equal_mass_bins(x, N_ACCURACY_BINS))
    )


def compare_predictions(
    candidate: PredictionTable, champion: PredictionTable
) -> tuple[Change, ...]:
    """Changes of the headline metrics and the recall of every class that has series.

    Raises:
        ValueError: the tables are not about the same series with the same labels.
    """
    if candidate.classes != champion.classes or candidate.ids != champion.ids:
        raise ValueError("the tables are about other series or classes and cannot be compared")
    if (candidate.labels != champion.labels).any():
        raise ValueError("the tables give the same series other labels")

    n = len(candidate.ids)
    ours, theirs = metric_samples(candidate), metric_samples(champion)
    changes = [
        Change.of(label, ours[name], theirs[name], n)
        for name, label in LABELS.items()
        if name in ours and name != "calibration_error"
    ]
    correct = np.stack([candidate.correct, champion.correct], axis=1).astype(np.float64)  # (N, 2)
    for c in np.unique(candidate.labels):
        inside = correct[candidate.labels == c]
        recall, before = sums_with_resamples(inside).T / len(inside)
        name = f"recall of {candidate.classes[c]}"
        changes.append(Change.of(name, recall, before, len(inside)))
    return tuple(changes)
