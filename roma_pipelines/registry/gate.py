"""The gate before ``champion``: what an experiment demands, and what came of it.

``gate`` judges tables of predictions and measured facts, and touches nothing. Every check is always
there, so that it can be shown as a check of the asset; one without a threshold passes and says so.

The part of the gate that reads what was measured of the package and of the data.
The part of the gate that reads predictions: the candidate alone, and beside the champion.
The gate's decisions where they are kept: in the folder of the evaluation, and as tags of its run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.config import ServingChecks
from roma_core.evaluation.metrics import Metrics, evaluate, resample_sums
from roma_core.evaluation.predictions import PredictionTable
from roma_core.files import read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name

if TYPE_CHECKING:
    from mlflow import MlflowClient


def package_checks(measured: ServingChecks, thresholds: GateThresholds) -> list[GateCheck]:
    """The checks ``golden_rows`` to ``no_leak``."""
    return [
        _golden_rows(measured),
        _serving_parity(measured),
        _latency(measured, thresholds),
        _size(measured, thresholds),
        _no_leak(measured),
    ]


def _golden_rows(measured: ServingChecks) -> GateCheck:
    trial = measured.trial
    if trial is None:
        text = f"the package failed in a fresh process: {measured.trial_problem}"
        return GateCheck(name="golden_rows", passed=False, explanation=text)
    return GateCheck(
        name="golden_rows",
        passed=True,
        value=trial.golden_difference,
        explanation=f"golden rows differ by at most {trial.golden_difference:.1e} in a fresh process",
    )


def _serving_parity(measured: ServingChecks) -> GateCheck:
    value = measured.serving_difference
    return GateCheck(
        name="serving_parity",
        passed=value <= MAX_SERVING_DIFFERENCE,
        value=value,
        threshold=MAX_SERVING_DIFFERENCE,
        explanation=f"trained model and package differ by at most {value:.1e}; at most "
        f"{MAX_SERVING_DIFFERENCE} is allowed",
    )


def _latency(measured: ServingChecks, thresholds: GateThresholds) -> GateCheck:
    if measured.trial is None:
        return GateCheck(name="latency", passed=False, explanation="not measured: it does not run")
    value, most = measured.trial.latency_ms, thresholds.max_latency_ms
    passed, said = True, f"{value:.2f} ms a series"
    if most is not None:
        passed = value <= most
        said += f"; at most {most:g}"
    champion, ratio = measured.champion_trial, thresholds.max_latency_ratio
    if champion is not None and ratio is not None:
        times = value / champion.latency_ms
        passed = passed and times <= ratio
        said += (
            f"; {times:.2f} times the champion's {champion.latency_ms:.2f} ms, at most {ratio:g}"
        )
    elif most is None:
        return unset("latency", said)
    return GateCheck(name="latency", passed=passed, value=value, threshold=most, explanation=said)


def _size(measured: ServingChecks, thresholds: GateThresholds) -> GateCheck:
    value, most = measured.size_mb, thresholds.max_size_mb
    said = f"the package has {value:.2f} MB"
    if most is None:
        return unset("size", said)
    return GateCheck(
        name="size",
        passed=value <= most,
        value=value,
        threshold=most,
        explanation=f"{said}; at most {most:g}",
    )


def _no_leak(measured: ServingChecks) -> GateCheck:
    n = len(measured.leaks)
    return GateCheck(
        name="no_leak",
        passed=n == 0,
        value=float(n),
        threshold=0.0,
        explanation="; ".join(measured.leaks[:3]) + (f"; and {n - 3} more" if n > 3 else "")
        if n
        else "no group, object or equal content is in test and in what was trained on",
    )


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
    name, limit = "not_worse_than_champion", -thresholds.max_accuracy_drop
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
    floor, allowed = thresholds.min_class_recall, thresholds.max_recall_drop
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


MAX_SERVING_DIFFERENCE = 1e-5
"""Largest difference of a probability between the trained model and the package that is served."""

CHECKS = {
    "comparable": "The champion loads and both models were evaluated on the same series.",
    "not_worse_than_champion": "Paired bootstrap of accuracy on the same series.",
    "class_floor": "Recall of every class, on its own and beside the champion's.",
    "better_than_guessing": "Accuracy is above the share of the most frequent class.",
    "accuracy": "Accuracy on its own.",
    "calibration": "Confidence can be taken at its word.",
    "golden_rows": "The package computes its golden rows in a process without this project.",
    "serving_parity": "The package gives the probabilities of the report.",
    "latency": "Time of a single series, on its own and beside the champion's.",
    "size": "Size of the package.",
    "no_leak": "No test series is in train or validation, nor was it when this model was trained.",
}
"""Name -> what it says; the order is that of the report."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GateThresholds(_Document):
    """Section ``gate`` of an experiment; None leaves a condition out."""

    mode: Literal["automatic", "needs_approval"] = Field(
        "automatic",
        description="What follows a pass: the candidate becomes champion, or it waits for "
        "`roma-pipeline promote NAME VERSION --why …`.",
    )
    min_accuracy: float | None = Field(None, ge=0, le=1, description="Accuracy, on its own.")
    max_accuracy_drop: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="ε: with the stated confidence, the accuracy may not be lower than the "
        "champion's by this much.",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of one-sided comparisons.")
    min_class_recall: float | None = Field(
        None, ge=0, le=1, description="Recall of the worst class that has series."
    )
    max_recall_drop: float | None = Field(
        None,
        ge=0,
        le=1,
        description="No class may, with the stated confidence, have lost more recall than this "
        "against the champion.",
    )
    max_calibration_error: float | None = Field(None, ge=0, le=1)
    max_latency_ms: float | None = Field(None, gt=0, description="Median of a single series.")
    max_latency_ratio: float | None = Field(
        3.0, gt=0, description="Latency against the champion's, measured side by side."
    )
    max_size_mb: float | None = Field(None, gt=0, description="All files of the package.")
    n_bootstrap: int = Field(2000, ge=100)
    seed: int = 0


class GateCheck(_Document):
    """One condition. ``value`` and ``threshold`` are None where no number says it."""

    name: str
    passed: bool
    value: float | None = None
    threshold: float | None = None
    explanation: str


class GateDecision(_Document):
    """All checks; the candidate passes if every one does."""

    schema_version: Literal[1] = 1
    checks: tuple[GateCheck, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def reasons(self) -> str:
        """Why it failed, or what it was measured by if it passed."""
        telling = [c for c in self.checks if not c.passed] or [
            c for c in self.checks if c.value is not None
        ]
        return "; ".join(c.explanation for c in telling)


def gate(
    candidate: PredictionTable,
    champion: PredictionTable | None,
    measured: ServingChecks,
    thresholds: GateThresholds,
) -> GateDecision:
    """Judge a candidate, beside the champion on the same series if there is one.

    Args:
        champion: None without a champion, or if it could not be evaluated, which ``measured`` says.
    """

    found = [
        *prediction_checks(candidate, champion, measured.champion_problem, thresholds),
        *package_checks(measured, thresholds),
    ]
    by_name = {check.name: check for check in found}
    return GateDecision(checks=tuple(by_name[name] for name in CHECKS))


def unset(name: str, what: str) -> GateCheck:
    """A check for which the experiment sets no threshold."""
    return GateCheck(name=name, passed=True, explanation=f"{what}; no threshold is set")


GATE_TAG = "roma.gate"
SPLIT_TAG = "roma.test_split"


def decide(folder: JobFolder, thresholds: GateThresholds) -> GateDecision:
    """Judge a finished evaluation, and write ``outputs/gate.json``.

    Raises:
        ValueError: the evaluation has no result.
    """
    from roma_core.evaluation.predictions import PredictionTable

    result = folder.read_result()
    if result is None:
        raise ValueError(f"the evaluation in {folder.path} has no result; materialise it again")
    tables = {
        name: PredictionTable.load(folder.path / result.outputs[name])
        for name in ("predictions", "champion_predictions")
        if name in result.outputs
    }
    measured = ServingChecks.load(folder.path / result.outputs["measured"])
    decision = gate(tables["predictions"], tables.get("champion_predictions"), measured, thresholds)
    write_json(folder.outputs / "gate.json", decision.model_dump(mode="json"))
    return decision


def read_decision(job_folder: Path) -> GateDecision:
    """The gate's decision about an evaluation."""
    return GateDecision.model_validate(read_json(job_folder / "outputs" / "gate.json"))


def has_passed(job_folder: Path) -> bool:
    """Whether an evaluation passed its gate.

    Blocking checks block inside their own run only; whoever comes later asks here.
    """
    if JobFolder(job_folder).read_result() is None:
        return False
    return read_decision(job_folder).passed


def decided_before(client: MlflowClient, experiment: str, split: str, job_key: str) -> int:
    """How many other evaluations a test split has decided, as the runs of the experiment tell."""
    checked_name("job key", job_key)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return 0
    runs = client.search_runs(
        [found.experiment_id], f"tags.`{SPLIT_TAG}` = '{split}'", max_results=50_000
    )
    return sum(run.data.tags.get(JOB_KEY_TAG) != job_key for run in runs)


def tag_decision(client: MlflowClient, run_id: str, decision: GateDecision, split: str) -> None:
    """Say at the run of an evaluation which split decided, and how."""
    client.set_tag(run_id, SPLIT_TAG, split)
    client.set_tag(run_id, GATE_TAG, "passed" if decision.passed else "failed")
