"""Dagster definitions of an experiment: assets, schedule, sensors and freshness policies."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import dagster as dg

from roma_pipelines.automation.drift import drift_sensor
from roma_pipelines.automation.retraining import (
    new_data_sensor,
    promotion_sensor,
    retraining_schedule,
    training_sensor,
)
from roma_pipelines.automation.state import Automated
from roma_pipelines.experiment import Experiment


def automated_definitions(
    experiment: Experiment, assets: Sequence[dg.AssetsDefinition]
) -> dg.Definitions:
    """The assets with the schedule and the sensors of the experiment.

    Raises:
        ValueError: the section ``automation`` names an asset that the experiment does not have.
    """
    names = {key.path[-1] for asset in assets for key in asset.keys}
    automation = experiment.automation
    if unknown := sorted(set(automation.freshness_h) - names):
        raise ValueError(
            f"experiment {experiment.name}: automation.freshness_h.{unknown[0]}: no such asset; "
            f"expected one of {', '.join(sorted(names))}"
        )
    if automation.predict_on_promotion and "batch_predictions" not in names:
        raise ValueError(
            f"experiment {experiment.name}: automation.predict_on_promotion: the experiment has no "
            f"batch_predictions; add `predictions`"
        )
    automated, schedule, sensors = automated_of(experiment, assets), experiment.schedule, []
    if automation.new_data is not None:
        sensors.append(new_data_sensor(automated, automation.new_data))
    if automation.drift is not None:
        sensors.append(drift_sensor(automated, automation.drift))
    if sensors or schedule is not None:
        sensors.append(training_sensor(automated))
    if automation.predict_on_promotion:
        sensors.append(promotion_sensor(automated))
    return dg.Definitions(
        assets=[_with_freshness(asset, automation.freshness_h) for asset in assets],
        sensors=sensors,
        schedules=[] if schedule is None else [retraining_schedule(automated, schedule)],
    )


def automated_of(experiment: Experiment, assets: Sequence[dg.AssetsDefinition]) -> Automated:
    """The experiment with the code versions of its assets."""
    specs = [spec for asset in assets for spec in asset.specs]
    return Automated(experiment, {spec.key.path[-1]: str(spec.code_version) for spec in specs})


def _with_freshness(asset: dg.AssetsDefinition, hours: dict[str, float]) -> dg.AssetsDefinition:
    def with_policy(spec: dg.AssetSpec) -> dg.AssetSpec:
        if (limit := hours.get(spec.key.path[-1])) is None:
            return spec
        policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(hours=limit))
        return spec.replace_attributes(freshness_policy=policy)

    return asset.map_asset_specs(with_policy)
