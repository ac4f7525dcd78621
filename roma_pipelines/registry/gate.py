"""The gate before ``champion``: what an experiment demands, and what came of it.

``gate`` judges tables of predictions and measured facts, and touches nothing. Every check is always
there, so that it can be shown as a check of the asset; one without a threshold passes and says so.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.measured import Measured
from roma_core.evaluation.predictions import PredictionTable

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
    max_loss_to_champion: float = Field(
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
    max_class_loss: float | None = Field(
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
    measured: Measured,
    thresholds: GateThresholds,
) -> GateDecision:
    """Judge a candidate, beside the champion on the same series if there is one.

    Args:
        champion: None without a champion, or if it could not be evaluated, which ``measured`` says.
    """
    from roma_pipelines.registry.gate_package import package_checks
    from roma_pipelines.registry.gate_predictions import prediction_checks

    found = [
        *prediction_checks(candidate, champion, measured.champion_problem, thresholds),
        *package_checks(measured, thresholds),
    ]
    by_name = {check.name: check for check in found}
    return GateDecision(checks=tuple(by_name[name] for name in CHECKS))


def unset(name: str, what: str) -> GateCheck:
    """A check for which the experiment sets no threshold."""
    return GateCheck(name=name, passed=True, explanation=f"{what}; no threshold is set")
