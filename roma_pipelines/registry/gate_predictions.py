"""The part of the gate that reads predictions: the candidate alone, and beside the champion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from roma_core.evaluation.metrics import Metrics, evaluate, resample_sums
from roma_core.evaluation.predictions import PredictionTable
from roma_pipelines.registry.gate import GateCheck, GateThresholds, unset

Rows = NDArray[np.int64]
_SURE = 0.999  # that a model knows anything at all: shuffled labels must never get through


def prediction_checks(
    candidate: PredictionTable,
    champion: PredictionTable | None,
    champion_problem: str | None,
    thresholds: GateThresholds,
) -> list[GateCheck]:
    """The checks ``comparable`` to ``calibration``.

    Args:
        champion_problem: why there is a champion but no table of it.
    """
    metrics = evaluate(candidate, n_bootstrap=100)
    problem, rows = champion_problem, None
    if champion is not None and problem is None:
        problem, rows = _same_series(candidate, champion)
    return [
        _comparable(problem, candidate, champion),
        _not_worse(candidate, champion, rows, problem, thresholds),
        _class_floor(metrics, candidate, champion, rows, thresholds),
        _better_than_guessing(candidate, thresholds),
        _accuracy(metrics, thresholds),
        _calibration(metrics, thresholds),
    ]


def _same_series(
    candidate: PredictionTable, champion: PredictionTable
) -> tuple[str | None, Rows | None]:
    """What forbids a comparison, or else the champion's row of every row of the candidate."""
    if candidate.classes != champion.classes:
        return f"classes {candidate.classes} against the champion's {champion.classes}", None
    place = {one: row for row, one in enumerate(champion.ids)}
    if n_apart := len(set(candidate.ids) ^ set(place)):
        return f"{n_apart} ids are in one table only", None
    rows = np.array([place[one] for one in candidate.ids])
    if n_relabelled := int((candidate.labels != champion.labels[rows]).sum()):
        return f"{n_relabelled} series have another label in either table", None
    return None, rows


def _comparable(
    problem: str | None, candidate: PredictionTable, champion: PredictionTable | None
) -> GateCheck:
    if problem is not None:
        text = (
            f"the candidate cannot be compared with the champion: {problem}. If the champion is "
            f"damaged, go back with `roma-pipeline rollback`; if the data have another schema now, "
            f"give the experiment another name: consumers of this one rely on the old schema"
        )
    elif champion is None:
        text = "there is no champion yet"
    else:
        text = f"both were evaluated on the same {len(candidate.ids)} series with the same labels"
    return GateCheck(name="comparable", passed=problem is None, explanation=text)


def _not_worse(
    candidate: PredictionTable,
    champion: PredictionTable | None,
    rows: Rows | None,
    problem: str | None,
    thresholds: GateThresholds,
) -> GateCheck:
    name, limit = "not_worse_than_champion", -thresholds.max_loss_to_champion
    if champion is None or rows is None:
        said = "there is no champion yet" if problem is None else "not compared with the champion"
        return GateCheck(name=name, passed=problem is None, explanation=said)
    n = len(rows)
    gain = candidate.correct.astype(np.float64) - champion.correct[rows]  # (N,) -1, 0 or 1
    sums = resample_sums(gain[:, None], thresholds.n_bootstrap, thresholds.seed)  # (R, 1)
    low = float(np.quantile(sums[:, 0] / n, 1 - thresholds.confidence))
    return GateCheck(
        name=name,
        passed=low >= limit,
        value=low,
        threshold=limit,
        explanation=f"accuracy minus the champion's is {gain.mean():+.4f}; with "
        f"{thresholds.confidence:.0%} confidence it is at least {low:+.4f}, and must be at least "
        f"{limit:+.4f} (paired bootstrap over {n} series)",
    )


def _class_floor(
    metrics: Metrics,
    candidate: PredictionTable,
    champion: PredictionTable | None,
    rows: Rows | None,
    thresholds: GateThresholds,
) -> GateCheck:
    worst, of_class = min((c.recall, c.name) for c in metrics.per_class if c.recall is not None)
    floor, allowed = thresholds.min_class_recall, thresholds.max_class_loss
    said = f"the worst class is {of_class!r}, recall {worst:.4f}"
    if floor is None and allowed is None:
        return unset("class_floor", said)
    passed = True
    if floor is not None:
        passed = worst >= floor
        said += f"; at least {floor}"
    if allowed is not None and champion is not None and rows is not None:
        loss, lost_class = _largest_class_loss(candidate, champion, rows, thresholds)
        passed = passed and loss <= allowed
        said += (
            f"; the largest loss against the champion that is sure with {thresholds.confidence:.0%} "
            f"confidence is {loss:.4f} ({lost_class!r}); at most {allowed}"
        )
    return GateCheck(
        name="class_floor", passed=passed, value=worst, threshold=floor, explanation=said
    )


def _largest_class_loss(
    candidate: PredictionTable, champion: PredictionTable, rows: Rows, thresholds: GateThresholds
) -> tuple[float, str]:
    """The largest recall that a class has lost for sure, at least 0, and the class.

    A class of few series has wide bounds, and each counts one series more, about which both models
    agree, so that one unlucky series does not decide.
    """
    gain = candidate.correct.astype(np.float64) - champion.correct[rows]
    losses = []
    for k, name in enumerate(candidate.classes):
        inside = gain[candidate.labels == k]
        if len(inside):
            inside = np.append(inside, 0.0)
            sums = resample_sums(inside[:, None], thresholds.n_bootstrap, thresholds.seed)
            best = float(np.quantile(sums[:, 0] / len(inside), thresholds.confidence))
            losses.append((max(0.0, -best), name))
    return max(losses)


def _better_than_guessing(candidate: PredictionTable, thresholds: GateThresholds) -> GateCheck:
    """What refuses a model of shuffled labels where there is no champion and no threshold."""
    correct = candidate.correct.astype(np.float64)
    sums = resample_sums(correct[:, None], thresholds.n_bootstrap, thresholds.seed)
    low = float(np.quantile(sums[:, 0] / len(correct), 1 - _SURE))
    guessing = float(np.bincount(candidate.labels).max() / len(correct))
    return GateCheck(
        name="better_than_guessing",
        passed=low > guessing,
        value=low,
        threshold=guessing,
        explanation=f"accuracy is at least {low:.4f} with {_SURE:.1%} confidence; "
        f"always naming the most frequent class gives {guessing:.4f}",
    )


def _accuracy(metrics: Metrics, thresholds: GateThresholds) -> GateCheck:
    value, floor = metrics.accuracy.value, thresholds.min_accuracy
    said = f"accuracy {value:.4f} on {metrics.n_series} series"
    if floor is None:
        return unset("accuracy", said)
    return GateCheck(
        name="accuracy",
        passed=value >= floor,
        value=value,
        threshold=floor,
        explanation=f"{said}; at least {floor}",
    )


def _calibration(metrics: Metrics, thresholds: GateThresholds) -> GateCheck:
    value, ceiling = metrics.calibration_error.value, thresholds.max_calibration_error
    said = f"calibration error {value:.4f}"
    if ceiling is None:
        return unset("calibration", said)
    return GateCheck(
        name="calibration",
        passed=value <= ceiling,
        value=value,
        threshold=ceiling,
        explanation=f"{said}; at most {ceiling}",
    )
