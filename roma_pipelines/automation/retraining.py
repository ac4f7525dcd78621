"""Schedule: retraining by the clock, of what has changed.

Sensors: new files are built into a data set; a data set with other content is trained on.
Sensor: predictions are made anew when another version becomes champion.
"""

from __future__ import annotations

import time

import dagster as dg

from roma_core.data.config import source_fingerprint
from roma_pipelines.automation.settings import NewData
from roma_pipelines.automation.state import (
    EXPERIMENT_TAG,
    TRIGGER_TAG,
    Automated,
    Decision,
    newest_data,
    newest_trained,
    next_step,
)
from roma_pipelines.storage import Storage, instance_of


def new_data_sensor(automated: Automated, settings: NewData) -> dg.SensorDefinition:
    """``NAME_new_data``; starts switched off."""

    @dg.sensor(
        name=f"{automated.name}_new_data",
        asset_selection=[automated.experiment.key("dataset")],
        minimum_interval_seconds=round(settings.every_min * 60),
        description=f"Builds the data set of {automated.name} when files of its source changed.",
    )
    def new_data(context: dg.SensorEvaluationContext) -> Decision:
        return look_at_source(automated, settings, instance_of(context), time.time())

    return new_data


def training_sensor(automated: Automated) -> dg.SensorDefinition:
    """``NAME_train_on_new_data``; it is on, but acts only on what a schedule or sensor built."""

    @dg.sensor(
        name=f"{automated.name}_train_on_new_data",
        target=dg.AssetSelection.groups(automated.name),
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Trains {automated.name} when its schedule or a sensor built a data set that "
        "is another one than that of the present model.",
    )
    def train_on_new_data(context: dg.SensorEvaluationContext) -> Decision:
        return look_at_dataset(automated, instance_of(context))

    return train_on_new_data


def look_at_source(
    automated: Automated, settings: NewData, instance: dg.DagsterInstance, now: float
) -> Decision:
    """Ask for the data set if files changed and have all arrived."""
    found = source_fingerprint(automated.experiment.dataset)
    data = newest_data(instance, automated.experiment)
    if found.digest == data.fingerprint:
        return dg.SkipReason(f"none of {found.n_files} files changed since run {data.run}")
    age_s = now - found.newest
    if 0 <= age_s < settings.settle_s:
        return dg.SkipReason(
            f"the newest of {found.n_files} files is {age_s:.0f} s old; waiting until it is "
            f"{settings.settle_s:g} s, for it may still be written to"
        )
    step = next_step(automated.state(instance), found.digest)
    if step.do != "build":
        return dg.SkipReason(step.why)
    return automated.build("new data", step, step.key)


def look_at_dataset(
    automated: Automated, instance: dg.DagsterInstance, now: float | None = None
) -> Decision:
    """Ask for a training if automation built a data set that the model was not trained on."""
    data = newest_data(instance, automated.experiment)
    if data.version is None:
        return dg.SkipReason("no data set was built yet")
    trained = newest_trained(instance, automated.experiment)
    if trained.on is not None and trained.on[0] == data.version:
        return dg.SkipReason(
            f"the newest data set, {data.version[:12]}, is the one that was trained on"
        )
    state = automated.state(instance)
    run = instance.get_run_by_id(state.data_run)
    trigger = run.tags.get(TRIGGER_TAG) if run is not None else None
    if trigger not in ("schedule", "new data", "drift"):
        return dg.SkipReason(f"run {state.data_run} built the data set by hand; train by hand, too")
    # the source may have changed again; what is built is trained on, the rest is the next look's
    step = next_step(state, state.fingerprint or "")
    if step.do != "train":
        return dg.SkipReason(step.why)
    return automated.train(trigger, step, step.key, now)  # type: ignore[arg-type]


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
