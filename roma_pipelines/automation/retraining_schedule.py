"""Schedule: retraining by the clock, of what has changed."""

from __future__ import annotations

import dagster as dg

from roma_pipelines.automation.automated import Automated, Decision
from roma_pipelines.automation.shared_instance import instance_of


def retraining_schedule(automated: Automated, cron: str) -> dg.ScheduleDefinition:
    """``NAME_retraining``; starts switched off."""

    @dg.schedule(
        name=f"{automated.name}_retraining",
        cron_schedule=cron,
        target=dg.AssetSelection.groups(automated.name),
        description=f"Trains {automated.name} anew if its data or settings changed, and lets the "
        "gate decide; else it says what is unchanged.",
    )
    def retraining(context: dg.ScheduleEvaluationContext) -> Decision:
        return scheduled(automated, instance_of(context))

    return retraining


def scheduled(
    automated: Automated, instance: dg.DagsterInstance, now: float | None = None
) -> Decision:
    """What a tick asks for. A training that failed is tried again at the next tick."""
    step = automated.step(instance)
    if step.do == "build":
        return automated.build("schedule", step, None)
    if step.do == "train":
        return automated.train("schedule", step, None, now)
    return dg.SkipReason(step.why)
