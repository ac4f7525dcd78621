"""Sensor: predictions are made anew when another version becomes champion."""

from __future__ import annotations

import dagster as dg

from roma_pipelines.automation.automated import TRIGGER_TAG, Automated, Decision
from roma_pipelines.automation.training_state import EXPERIMENT_TAG
from roma_pipelines.storage import Storage


def promotion_sensor(automated: Automated) -> dg.SensorDefinition:
    """``NAME_predict_on_promotion``; starts switched off. The alias counts, whoever moved it."""
    key = automated.experiment.key("batch_predictions")

    @dg.sensor(
        name=f"{automated.name}_predict_on_promotion",
        asset_selection=[key],
        minimum_interval_seconds=60,
        description=f"Makes predictions with the new champion of {automated.name}.",
    )
    def predict_on_promotion(context: dg.SensorEvaluationContext) -> Decision:
        decision, cursor = look_at_champion(automated, context.cursor)
        context.update_cursor(cursor)
        return decision

    return predict_on_promotion


def look_at_champion(automated: Automated, cursor: str | None) -> tuple[Decision, str]:
    """Ask for predictions if the champion is another one than at the last look.

    Args:
        cursor: ``MOVES:VERSION`` of the look before; None at first.
    """
    from roma_pipelines.registry.promotion import CHAMPION
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.registry.versions import version_at

    version = version_at(connect(MlflowSettings(), Storage.open().mlflow), automated.name, CHAMPION)
    moves, _, before = (cursor or "0:").partition(":")
    if version is None:
        return dg.SkipReason(f"{automated.name} has no champion yet"), f"{moves}:"
    if version == before:
        return dg.SkipReason(f"version {version} still is the champion"), f"{moves}:{version}"
    number = int(moves) + 1  # a rollback makes an old version champion again: that is a new move
    request = dg.RunRequest(
        run_key=f"champion:{number}:{version}",
        asset_selection=[automated.experiment.key("batch_predictions")],
        tags={EXPERIMENT_TAG: automated.name, TRIGGER_TAG: "promotion"},
    )
    return request, f"{number}:{version}"
