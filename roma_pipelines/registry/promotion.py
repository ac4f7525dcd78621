"""From candidate to champion, and back.

``gate`` judges two tables of predictions and touches nothing. ``promote`` and ``rollback`` move
aliases; each first writes who, why and on what evidence, so no move is without its record.

    champion    the version that consumers load
    previous    the champion before it; ``rollback`` puts it back
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from roma_core.evaluation.metrics import Metrics, evaluate, resample_sums
from roma_core.evaluation.predictions import PredictionTable
from roma_pipelines.registry.runs import checked_name
from roma_pipelines.registry.store import one_at_a_time
from roma_pipelines.registry.versions import version_at

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, PREVIOUS = "champion", "previous"
AUDIT_TAG = "roma.audit."


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GateThresholds(_Document):
    """What a candidate must reach; None leaves a check out."""

    min_accuracy: float | None = Field(None, ge=0, le=1, description="Accuracy, on its own.")
    max_loss_to_champion: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="ε: with the stated confidence, the accuracy may not be lower than the "
        "champion's by this much.",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Of the one-sided comparison.")
    min_class_recall: float | None = Field(
        None, ge=0, le=1, description="Recall of the worst class that has series."
    )
    max_calibration_error: float | None = Field(None, ge=0, le=1)
    n_bootstrap: int = Field(2000, ge=100)
    seed: int = 0


class GateCheck(_Document):
    """One condition. ``value`` and ``threshold`` are None where no number says it."""

    name: str
    passed: bool
    value: float | None
    threshold: float | None
    explanation: str


class GateDecision(_Document):
    """All checks; the candidate passes if every one does."""

    schema_version: Literal[1] = 1
    checks: tuple[GateCheck, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def gate(
    candidate: PredictionTable, champion: PredictionTable | None, thresholds: GateThresholds
) -> GateDecision:
    """Judge a candidate, beside the champion on the same series if there is one."""
    metrics = evaluate(candidate, n_bootstrap=100)
    checks = [] if champion is None else _against(candidate, champion, thresholds)
    return GateDecision(checks=(*checks, *_alone(metrics, thresholds)))


def _alone(metrics: Metrics, thresholds: GateThresholds) -> list[GateCheck]:
    checks = []
    if (floor := thresholds.min_accuracy) is not None:
        value = metrics.accuracy.value
        checks.append(
            GateCheck(
                name="accuracy",
                passed=value >= floor,
                value=value,
                threshold=floor,
                explanation=f"accuracy {value:.4f} on {metrics.n_series} series; at least {floor}",
            )
        )
    if (floor := thresholds.min_class_recall) is not None:
        recalls = [(c.recall, c.name) for c in metrics.per_class if c.recall is not None]
        value, name = min(recalls)
        checks.append(
            GateCheck(
                name="class_recall",
                passed=value >= floor,
                value=value,
                threshold=floor,
                explanation=f"the worst class is {name!r}, recall {value:.4f}; at least {floor}",
            )
        )
    if (ceiling := thresholds.max_calibration_error) is not None:
        value = metrics.calibration_error.value
        checks.append(
            GateCheck(
                name="calibration",
                passed=value <= ceiling,
                value=value,
                threshold=ceiling,
                explanation=f"calibration error {value:.4f}; at most {ceiling}",
            )
        )
    return checks


def _against(
    candidate: PredictionTable, champion: PredictionTable, thresholds: GateThresholds
) -> list[GateCheck]:
    rows = {one: row for row, one in enumerate(champion.ids)}
    if candidate.classes != champion.classes or set(candidate.ids) != set(rows):
        difference = (
            f"classes {candidate.classes} against {champion.classes}"
            if candidate.classes != champion.classes
            else f"{len(set(candidate.ids) ^ set(rows))} ids are in one table only"
        )
        return [_same_series(False, f"the tables cannot be compared: {difference}")]
    order = np.array([rows[one] for one in candidate.ids])
    n_relabelled = int((candidate.labels != champion.labels[order]).sum())
    if n_relabelled:
        return [_same_series(False, f"{n_relabelled} series have another label in either table")]
    n = len(order)
    gain = candidate.correct.astype(np.float64) - champion.correct[order]  # (N,) -1, 0 or 1
    sums = resample_sums(gain[:, None], thresholds.n_bootstrap, thresholds.seed)  # (R, 1)
    low = float(np.quantile(sums[:, 0] / n, 1 - thresholds.confidence))
    limit = -thresholds.max_loss_to_champion
    return [
        _same_series(True, f"both were evaluated on the same {n} series with the same labels"),
        GateCheck(
            name="not_worse_than_champion",
            passed=low >= limit,
            value=low,
            threshold=limit,
            explanation=f"accuracy minus the champion's is {gain.mean():+.4f}; with "
            f"{thresholds.confidence:.0%} confidence it is at least {low:+.4f}, and must be at "
            f"least {limit:+.4f} (paired bootstrap over {n} series)",
        ),
    ]


def _same_series(passed: bool, explanation: str) -> GateCheck:
    return GateCheck(
        name="same_series", passed=passed, value=None, threshold=None, explanation=explanation
    )


class AuditEvent(_Document):
    """One move of the alias ``champion``."""

    schema_version: Literal[1] = 1
    at: str = Field(description="UTC, ISO 8601.")
    action: Literal["promote", "rollback"]
    version: str = Field(description="The champion from now on.")
    replaced: str | None = Field(description="The champion until now.")
    who: str
    why: str
    evidence: dict[str, Any] = {}


def promote(
    client: MlflowClient,
    name: str,
    version: str,
    why: str,
    who: str,
    evidence: Mapping[str, Any],
) -> None:
    """Make a version the champion, and the present champion ``previous``.

    The record is written before the aliases move; asked again after a crash, the move is finished.
    Promoting the present champion changes nothing.

    Args:
        evidence: plain JSON, such as the gate's decision and the run that asked.

    Raises:
        ValueError: no such version, or nothing is said of who or why.
    """
    _require(who, why)
    with one_at_a_time(client):
        _require_version(client, name, version)
        replaced = version_at(client, name, CHAMPION)
        if replaced == version:
            return
        _record(client, name, "promote", version, replaced, who, why, evidence)
        if replaced is not None:
            client.set_registered_model_alias(name, PREVIOUS, replaced)
        client.set_registered_model_alias(name, CHAMPION, version)


def rollback(client: MlflowClient, name: str, who: str, why: str) -> str:
    """Put ``previous`` back as champion; return its version.

    ``previous`` then is the champion before that one, as the audit tells, so a second rollback goes
    one further back instead of returning to what was just left.

    Raises:
        ValueError: there is no previous champion, or nothing is said of who or why.
    """
    _require(who, why)
    checked_name("model", name)
    with one_at_a_time(client):
        champion = version_at(client, name, CHAMPION)
        version = version_at(client, name, PREVIOUS)
        if champion is None or version is None:
            raise ValueError(f"model {name!r} has no previous champion to go back to")
        if version != champion:  # equal if a crash came before the last step below
            _record(client, name, "rollback", version, champion, who, why, {})
            client.set_registered_model_alias(name, CHAMPION, version)
        before = _predecessor(audit(client, name), version)
        if before is None:
            client.delete_registered_model_alias(name, PREVIOUS)
        else:
            client.set_registered_model_alias(name, PREVIOUS, before)
    return version


def audit(client: MlflowClient, name: str) -> list[AuditEvent]:
    """All moves of a model's champion, the oldest first."""
    tags = client.get_registered_model(name).tags
    keys = sorted(key for key in tags if key.startswith(AUDIT_TAG))
    return [AuditEvent.model_validate_json(tags[key]) for key in keys]


def _predecessor(events: list[AuditEvent], version: str) -> str | None:
    """Whom a version replaced when it was last promoted."""
    found = (e for e in reversed(events) if e.action == "promote" and e.version == version)
    return next((event.replaced for event in found), None)


def _record(
    client: MlflowClient,
    name: str,
    action: Literal["promote", "rollback"],
    version: str,
    replaced: str | None,
    who: str,
    why: str,
    evidence: Mapping[str, Any],
) -> None:
    event = AuditEvent(
        at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        action=action,
        version=version,
        replaced=replaced,
        who=who,
        why=why,
        evidence=json.loads(json.dumps(evidence, allow_nan=False)),
    )
    number = len(audit(client, name)) + 1
    client.set_registered_model_tag(name, f"{AUDIT_TAG}{number:06d}", event.model_dump_json())


def _require(who: str, why: str) -> None:
    for field, text in (("who", who), ("why", why)):
        if not text.strip():
            raise ValueError(f"{field} is empty; the audit needs to know it")


def _require_version(client: MlflowClient, name: str, version: str) -> None:
    from mlflow.exceptions import MlflowException

    checked_name("model", name)
    try:
        client.get_model_version(name, version)
    except MlflowException as error:
        raise ValueError(f"model {name!r} has no version {version!r}: {error.message}") from error
