"""The gate before ``champion``: thresholds of an experiment, checks of a candidate, the decision.

``gate`` is a pure function of prediction tables and measurements. It returns every check of the
task, because each is shown as an asset check; a check without a threshold passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from roma_core.evaluation.classification_metrics import (
    ClassificationMetrics,
    chance,
    evaluate,
    metric_samples,
)
from roma_core.evaluation.config import ServingChecks
from roma_core.evaluation.metrics import (
    LABELS,
    MeasuredBaseline,
    r2_samples,
    regression_samples,
    resample_sums,
)
from roma_core.evaluation.predictions import PredictionTable, ReconstructionTable, RegressionTable
from roma_core.files import read_json, write_json
from roma_core.job import JobFolder
from roma_core.settings import Frozen
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

GATE_TAG = "roma.gate"
SPLIT_TAG = "roma.test_split"
MAX_SERVING_DIFFERENCE = 1e-5
"""Largest difference of a probability between the trained model and the served package, or of a target
in its standard deviations."""

CHECKS = {
    "comparable": "The champion loads, and both models were evaluated on the same series.",
    "not_worse_than_champion": "Paired bootstrap of the primary metric on the same series.",
    "class_floor": "Recall of every class, absolute and compared with the champion's.",
    "better_than_guessing": "The primary metric is above that of predictions that do not depend on the "
    "series, or the log loss below that of the class fractions.",
    "beats_baseline": "Paired difference of the primary metric to the best baseline of the same run.",
    "primary_metric": "Primary metric against its threshold.",
    "calibration": "Expected calibration error against its threshold.",
    "golden_rows": "The package reproduces its golden rows in a process without this project.",
    "serving_parity": "The package returns the predictions of the report.",
    "latency": "Time of a single series, absolute and compared with the champion's.",
    "size": "Size of the package.",
    "no_leak": "No test series is, or was at training time, in train or validation.",
}
"""Name -> description, in the order of the report."""
_OF_CLASSES = ("class_floor", "calibration")
CLASS_THRESHOLDS = ("min_class_recall", "max_recall_drop", "max_calibration_error")
"""Fields of :class:`GateThresholds` that other tasks than classification do not have."""


def checks_of(task: str) -> dict[str, str]:
    """Those of ``CHECKS`` that a task has."""
    return {n: t for n, t in CHECKS.items() if task == "classification" or n not in _OF_CLASSES}


class GateThresholds(Frozen):
    """Section ``gate`` of an experiment; None disables a condition."""

    mode: Literal["automatic", "needs_approval"] = "automatic"
    """After a pass, the candidate becomes champion, or it waits for `roma-pipeline promote NAME
    VERSION --reason …`."""
    min_primary: float | None = Field(None, ge=0, le=1)
    """Smallest value of the primary metric."""
    max_primary_drop: float = Field(0.01, ge=0, lt=1)
    """Largest drop of the primary metric below the champion's that the lower confidence bound of
    the paired difference may show."""
    min_baseline_gain: float | None = Field(None, gt=-1, lt=1)
    """Smallest difference of the primary metric to the best baseline of the same run that the lower
    end of its paired 95 % interval may show."""
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Level of one-sided bounds.")
    min_class_recall: float | None = Field(None, ge=0, le=1)
    """Smallest recall of any class that has series."""
    max_recall_drop: float | None = Field(None, ge=0, le=1)
    """Largest drop of any class's recall below the champion's that is certain at the level
    `confidence`."""
    max_calibration_error: float | None = Field(None, ge=0, le=1)
    """Largest expected calibration error."""
    max_latency_ms: float | None = Field(None, gt=0)
    """Largest median time of a single series."""
    max_latency_ratio: float | None = Field(3.0, gt=0)
    """Largest latency relative to the champion's, measured side by side."""
    max_size_mb: float | None = Field(None, gt=0, description="Largest size of the package.")
    n_bootstrap: int = Field(2000, ge=100, description="Resamples of a bootstrap.")
    seed: int = Field(0, description="Seed of the bootstrap.")


class GateCheck(Frozen):
    """One condition; ``value`` and ``threshold`` are None where there is no number."""

    name: str
    passed: bool
    value: float | None = None
    threshold: float | None = None
    explanation: str


class GateDecision(Frozen):
    """All checks; the candidate passes if all of them do."""

    schema_version: Literal[1] = 1
    checks: tuple[GateCheck, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def reasons(self) -> str:
        """Explanations of the failed checks, or of the measured ones if all passed."""
        failed = [c for c in self.checks if not c.passed]
        shown = failed or [c for c in self.checks if c.value is not None]
        return "; ".join(c.explanation for c in shown)


Table = PredictionTable | RegressionTable | ReconstructionTable
"""Predictions of a task."""


def gate(
    candidate: Table,
    champion: Table | None,
    measured: ServingChecks,
    thresholds: GateThresholds,
    primary: str = "accuracy",
    baselines: Sequence[MeasuredBaseline] = (),
) -> GateDecision:
    """Check a candidate, and compare it with the champion on the same series if there is one.

    ``champion`` is also None if ``measured.champion_problem`` says why it could not be evaluated;
    ``primary`` is defined on these series.
    """
    samples = _samples(candidate, primary, thresholds)
    value_text = f"{LABELS[primary]} {samples[0]:.4f} on {len(candidate.ids)} series"
    difference, size_mb = measured.serving_difference, measured.size_mb
    parity_text = f"trained model and package differ by {difference:.1e}"
    size_text = f"the package has {size_mb:.2f} MB"
    problem, gains = measured.champion_problem, None
    if champion is not None and problem is None:
        problem, champion = _in_order_of(candidate, champion)
        if champion is not None:
            gains = samples - _samples(champion, primary, thresholds)
    golden_rows, latency = _smoke_test(measured, thresholds)
    more = [f"and {len(measured.leaks) - 3} more"] if len(measured.leaks) > 3 else []
    no_leak = "no leakage was found that the data set's `leakage` refuses"
    leaks = "; ".join([*measured.leaks[:3], *more]) or no_leak
    checks = [
        *_compare(problem, gains, f"{len(candidate.ids)} series", primary, thresholds),
        _better_than_guessing(candidate, samples, primary, thresholds),
        _beats_baseline(baselines, thresholds),
        _limited("primary_metric", samples[0], value_text, at_least=thresholds.min_primary),
        golden_rows,
        _limited("serving_parity", difference, parity_text, at_most=MAX_SERVING_DIFFERENCE),
        latency,
        _limited("size", size_mb, size_text, at_most=thresholds.max_size_mb),
        _check("no_leak", not measured.leaks, leaks, value=len(measured.leaks), threshold=0),
    ]
    if isinstance(candidate, PredictionTable):
        metrics = evaluate(candidate, n_bootstrap=100)
        ece = metrics.calibration_error.value
        ece_text = f"expected calibration error {ece:.4f}"
        checks += [
            _class_floor(metrics, candidate, champion, thresholds),
            _limited("calibration", ece, ece_text, at_most=thresholds.max_calibration_error),
        ]
    order = list(CHECKS)
    return GateDecision(checks=tuple(sorted(checks, key=lambda check: order.index(check.name))))


def _check(name: str, passed: bool, explanation: str, **numbers: float) -> GateCheck:
    return GateCheck(name=name, passed=passed, explanation=explanation, **numbers)


def _limited(
    name: str,
    value: float,
    text: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> GateCheck:
    """A number against one threshold; NaN fails, no threshold passes."""
    if at_least is not None:
        passed, threshold, text = value >= at_least, at_least, f"{text}; at least {at_least:g}"
    elif at_most is not None:
        passed, threshold, text = value <= at_most, at_most, f"{text}; at most {at_most:g}"
    else:
        return _check(name, True, f"{text}; no threshold is set")
    return _check(name, passed, text, value=value, threshold=threshold)


def _samples(table: Table, primary: str, thresholds: GateThresholds) -> NDArray[np.float64]:
    """The primary metric of all series, then of each resample; equal series for every table."""
    how = (thresholds.n_bootstrap, thresholds.seed)
    if isinstance(table, RegressionTable):
        return regression_samples(table, *how).r2
    if isinstance(table, ReconstructionTable):
        return r2_samples(table, *how)
    return metric_samples(table, *how, ranks=primary in ("auroc", "average_precision"))[primary]


def _in_order_of(candidate: Table, champion: Table) -> tuple[str | None, Table | None]:
    """Why the two cannot be compared, or the champion's table in the candidate's order."""
    if type(candidate) is not type(champion):
        return "they are of different tasks", None
    if not isinstance(candidate, PredictionTable) or not isinstance(champion, PredictionTable):
        problem = candidate.differs_from(champion)  # type: ignore[arg-type, union-attr]
        return problem, None if problem else champion
    if candidate.classes != champion.classes:
        return f"classes {candidate.classes} against the champion's {champion.classes}", None
    row_of = {one: row for row, one in enumerate(champion.ids)}
    if n_different := len(set(candidate.ids) ^ set(row_of)):
        return f"{n_different} ids are in one table only", None
    rows = np.array([row_of[one] for one in candidate.ids])
    if n_relabelled := int((candidate.labels != champion.labels[rows]).sum()):
        return f"{n_relabelled} series have another label in either table", None
    return None, replace(candidate, probabilities=champion.probabilities[rows])


def _bootstrap_bound(
    values: NDArray[np.float64], quantile: float, thresholds: GateThresholds
) -> float:
    """A quantile of the bootstrapped mean of ``(N,)`` values."""
    sums = resample_sums(values[:, None], thresholds.n_bootstrap, thresholds.seed)  # (R, 1)
    return float(np.quantile(sums[:, 0] / len(values), quantile))


def _compare(
    problem: str | None,
    gains: NDArray[np.float64] | None,
    series: str,
    primary: str,
    thresholds: GateThresholds,
) -> tuple[GateCheck, GateCheck]:
    """The checks ``comparable`` and ``not_worse_than_champion``."""
    first, second = "comparable", "not_worse_than_champion"
    if problem is not None:
        text = (
            f"the candidate cannot be compared with the champion: {problem}. If the champion is "
            f"damaged, run `roma-pipeline rollback`; if the data have another schema now, give the "
            f"experiment another name: consumers of this one rely on the old schema"
        )
        return _check(first, False, text), _check(second, False, "not compared with the champion")
    if gains is None:
        text = "there is no champion yet"
        return _check(first, True, text), _check(second, True, text)
    text = f"both were evaluated on the same {series} with the same labels"
    threshold = -thresholds.max_primary_drop
    low = float(np.nanquantile(gains[1:], 1 - thresholds.confidence))
    gained = (
        f"{LABELS[primary]} minus the champion's is {gains[0]:+.4f}; with {thresholds.confidence:.0%} "
        f"confidence it is at least {low:+.4f}, and must be at least {threshold:+.4f} (paired "
        f"bootstrap over {series})"
    )
    compared = _check(second, low >= threshold, gained, value=low, threshold=threshold)
    return _check(first, True, text), compared


def _class_floor(
    metrics: ClassificationMetrics,
    candidate: PredictionTable,
    champion: Table | None,
    thresholds: GateThresholds,
) -> GateCheck:
    worst, of_class = min((c.recall, c.name) for c in metrics.per_class if c.recall is not None)
    text = f"the worst class is {of_class!r}, recall {worst:.4f}"
    allowed = thresholds.max_recall_drop
    if thresholds.min_class_recall is None and allowed is not None:
        check = _check("class_floor", True, text, value=worst)
    else:
        check = _limited("class_floor", worst, text, at_least=thresholds.min_class_recall)
    if allowed is None or not isinstance(champion, PredictionTable):
        return check
    drops, gain = [], candidate.correct.astype(np.float64) - champion.correct
    for k, name in enumerate(candidate.classes):
        in_class = gain[candidate.labels == k]
        if len(in_class):
            # one more series with no gain: a single unlucky series of a rare class does not decide
            high = _bootstrap_bound(np.append(in_class, 0.0), thresholds.confidence, thresholds)
            drops.append((max(0.0, -high), name))
    drop, dropped_class = max(drops)
    text = (
        f"{check.explanation}; the largest drop of recall that is certain with "
        f"{thresholds.confidence:.0%} confidence is {drop:.4f} ({dropped_class!r}); at most {allowed}"
    )
    passed = check.passed and drop <= allowed
    return check.model_copy(update={"passed": passed, "explanation": text})


def _better_than_guessing(
    candidate: Table, samples: NDArray[np.float64], primary: str, thresholds: GateThresholds
) -> GateCheck:
    """Rejects a model of shuffled labels even without a champion and without thresholds.

    A useful model of a rare class may be right no more often than one that never predicts it; its
    probabilities still have a lower log loss than the fractions of the classes, or at least rank the
    series. A constant prediction of targets, be it their mean, has an R² of at most 0.
    """
    name, confidence = "better_than_guessing", 0.999
    low = float(np.nanquantile(samples[1:], 1 - confidence))
    if not isinstance(candidate, PredictionTable):
        text = (
            f"{LABELS[primary]} is at least {low:+.4f} with {confidence:.1%} confidence, and must be above "
            f"0, that of always predicting the mean"
        )
        return _check(name, low > 0, text, value=low, threshold=0.0)
    n = len(candidate.labels)
    fractions = np.bincount(candidate.labels, minlength=len(candidate.classes)) / n
    predicted = candidate.probabilities[np.arange(n), candidate.labels]
    # the smallest probability that float32 tells from 0 bounds the loss of a single series
    loss = np.log(fractions[candidate.labels]) - np.log(np.maximum(predicted, 1e-7))
    high = _bootstrap_bound(loss, confidence, thresholds)
    guessed = chance(candidate, primary)
    text = (
        f"log loss minus that of always predicting the fractions of the classes is at most "
        f"{high:+.4f} with {confidence:.1%} confidence, and must be below 0, unless {LABELS[primary]} (at "
        f"least {low:.4f}) is above that of predictions that do not depend on the series ({guessed:.4f})"
    )
    passed = high < 0 or low > guessed
    return _check(name, passed, text, value=high, threshold=0.0)


def _beats_baseline(baselines: Sequence[MeasuredBaseline], thresholds: GateThresholds) -> GateCheck:
    name, least = "beats_baseline", thresholds.min_baseline_gain
    if not baselines:
        text = "no baseline was measured"
        if least is not None:
            text += f", and gate.min_baseline_gain {least:g} needs one; remove it for these data"
        return _check(name, least is None, text)
    best = max(baselines, key=lambda one: one.value.value)
    found = best.difference
    text = (
        f"{LABELS[best.metric]} minus that of {best.name} ({best.value.value:.4f}) is {found.value:+.4f}, "
        f"with 95 % confidence {found.low:+.4f} to {found.high:+.4f}"
    )
    return _limited(name, found.low, text, at_least=least)


def _smoke_test(measured: ServingChecks, thresholds: GateThresholds) -> tuple[GateCheck, GateCheck]:
    """The checks ``golden_rows`` and ``latency``."""
    first, second, test = "golden_rows", "latency", measured.smoke_test
    if test is None:
        text = f"the package failed in a new process: {measured.smoke_test_problem}"
        return _check(first, False, text), _check(second, False, "not measured: it does not run")
    value, difference = test.latency_ms, test.golden_difference
    text = f"golden rows differ by at most {difference:.1e} in a new process"
    golden_rows = _check(first, True, text, value=difference)
    text = f"{value:.2f} ms per series"
    latency = _limited(second, value, text, at_most=thresholds.max_latency_ms)
    champion, allowed = measured.champion_smoke_test, thresholds.max_latency_ratio
    if champion is None or allowed is None:
        return golden_rows, latency
    ratio = value / champion.latency_ms
    if latency.threshold is not None:
        text = latency.explanation
    text += f"; {ratio:.2f} times the champion's {champion.latency_ms:.2f} ms, at most {allowed:g}"
    passed = latency.passed and ratio <= allowed
    changed = {"passed": passed, "value": value, "explanation": text}
    return golden_rows, latency.model_copy(update=changed)


def decide(folder: JobFolder, thresholds: GateThresholds) -> GateDecision:
    """Apply the gate to a finished evaluation and write ``outputs/gate.json``.

    Raises:
        ValueError: the evaluation has no result.
    """
    result = folder.read_result()
    if result is None:
        raise ValueError(f"the evaluation in {folder.path} has no result; materialise it again")
    metrics = read_json(folder.path / result.outputs["metrics"])
    classes = {"regression": RegressionTable, "interpolation": ReconstructionTable}
    table_class: Any = classes.get(metrics.get("task"), PredictionTable)
    tables = {
        name: table_class.load(folder.path / result.outputs[name])
        for name in ("predictions", "champion_predictions")
        if name in result.outputs
    }
    measured = ServingChecks.load(folder.path / result.outputs["serving_checks"])
    pair = tables["predictions"], tables.get("champion_predictions")
    primary = metrics.get("primary_metric", "accuracy")
    path = result.outputs.get("baselines")  # an older evaluation measured none
    found = [] if path is None else read_json(folder.path / path)
    baselines = [MeasuredBaseline.model_validate(one) for one in found]
    decision = gate(*pair, measured, thresholds, primary, baselines)
    write_json(folder.outputs / "gate.json", decision.model_dump(mode="json"))
    return decision


def read_decision(job_folder: Path) -> GateDecision:
    """The decision that ``decide`` wrote for an evaluation."""
    return GateDecision.model_validate(read_json(job_folder / "outputs" / "gate.json"))


def has_passed(job_folder: Path) -> bool:
    """Whether a finished evaluation passed; blocking checks block only their own Dagster run."""
    return JobFolder(job_folder).read_result() is not None and read_decision(job_folder).passed


def decided_before(client: MlflowClient, experiment: str, split: str, job_key: str) -> int:
    """Number of other evaluations that used a test split, by the runs of the experiment."""
    checked_name("job key", job_key)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return 0
    runs = client.search_runs(
        [found.experiment_id], f"tags.`{SPLIT_TAG}` = '{split}'", max_results=50_000
    )
    return sum(run.data.tags.get(JOB_KEY_TAG) != job_key for run in runs)
