"""Retraining schedule, and the sensors on new data, on new data sets and on promotions."""

from __future__ import annotations

import time

import dagster as dg

from roma_core.data.config import source_fingerprint
from roma_pipelines._compat import shared_instance
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
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import Storage


def new_data_sensor(automated: Automated, settings: NewData) -> dg.SensorDefinition:
    """``NAME_new_data``; starts stopped."""

    @dg.sensor(
        name=f"{automated.name}_new_data",
        asset_selection=[automated.experiment.key("dataset")],
        minimum_interval_seconds=round(settings.every_min * 60),
        description=f"Builds the data set of {automated.name} when files of its source changed.",
    )
    def new_data(context: dg.SensorEvaluationContext) -> Decision:
        return check_source(automated, settings, shared_instance(context), time.time())

    return new_data


def training_sensor(automated: Automated) -> dg.SensorDefinition:
    """``NAME_train_on_new_data``; runs, but acts only on data sets that automation built."""

    @dg.sensor(
        name=f"{automated.name}_train_on_new_data",
        target=dg.AssetSelection.groups(automated.name),
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Trains {automated.name} when its schedule or a sensor built a data set that "
        "differs from the one of the current model.",
    )
    def train_on_new_data(context: dg.SensorEvaluationContext) -> Decision:
        return check_dataset(automated, shared_instance(context))

    return train_on_new_data


def check_source(
    automated: Automated, settings: NewData, instance: dg.DagsterInstance, now: float
) -> Decision:
    """Request the data set if files changed and delivery is complete."""
    found = source_fingerprint(automated.experiment.dataset)
    data = newest_data(instance, automated.experiment)
    if found.digest == data.fingerprint:
        return dg.SkipReason(f"none of {found.n_files} files changed since run {data.run}")
    age_s = now - found.newest
    if 0 <= age_s < settings.settle_s:
        return dg.SkipReason(
            f"the newest of {found.n_files} files is {age_s:.0f} s old; waiting until "
            f"{settings.settle_s:g} s because it may be incomplete"
        )
    step = next_step(automated.state(instance), found.digest)
    if step.do != "build":
        return dg.SkipReason(step.why)
    return automated.build("new data", step, step.key)


def check_dataset(
    automated: Automated, instance: dg.DagsterInstance, now: float | None = None
) -> Decision:
    """Request a training if automation built a data set that the model was not trained on."""
    data = newest_data(instance, automated.experiment)
    if data.version is None:
        return dg.SkipReason("no data set was built yet")
    trained = newest_trained(instance, automated.experiment)
    if trained.on is not None and trained.on[0] == data.version:
        return dg.SkipReason(f"the newest data set, {data.version[:12]}, was trained on already")
    state = automated.state(instance)
    run = instance.get_run_by_id(data.run)
    trigger = run.tags.get(TRIGGER_TAG) if run is not None else None
    if trigger not in ("schedule", "new data", "drift"):
        return dg.SkipReason(f"run {data.run} built the data set manually, so train manually")
    # the source may have changed again: train on what is built, the next tick handles the rest
    step = next_step(state, state.data.fingerprint or "")
    if step.do != "train":
        return dg.SkipReason(step.why)
    return automated.train(trigger, step, step.key, now)  # type: ignore[arg-type]


def promotion_sensor(automated: Automated) -> dg.SensorDefinition:
    """``NAME_predict_on_promotion``; starts stopped. Reacts to the alias, not to our commands."""

    @dg.sensor(
        name=f"{automated.name}_predict_on_promotion",
        asset_selection=[automated.experiment.key("batch_predictions")],
        minimum_interval_seconds=60,
        description=f"Materialises batch_predictions with the new champion of {automated.name}.",
    )
    def predict_on_promotion(context: dg.SensorEvaluationContext) -> Decision:
        decision, cursor = check_champion(automated, context.cursor)
        context.update_cursor(cursor)
        return decision

    return predict_on_promotion


def check_champion(automated: Automated, cursor: str | None) -> tuple[Decision, str]:
    """Request predictions if the champion changed since ``cursor``, ``MOVES:VERSION``."""
    version = version_at(connect(MlflowSettings(), Storage.open().mlflow), automated.name, CHAMPION)
    moves, _, before = (cursor or "0:").partition(":")
    if version is None:
        return dg.SkipReason(f"{automated.name} has no champion yet"), f"{moves}:"
    if version == before:
        return dg.SkipReason(f"version {version} is still the champion"), f"{moves}:{version}"
    number = int(moves) + 1  # a rollback to an old version is a new move
    request = dg.RunRequest(
        run_key=f"champion:{number}:{version}",
        asset_selection=[automated.experiment.key("batch_predictions")],
        tags={EXPERIMENT_TAG: automated.name, TRIGGER_TAG: "promotion"},
    )
    return request, f"{number}:{version}"


def retraining_schedule(automated: Automated, cron: str) -> dg.ScheduleDefinition:
    """``NAME_retraining``; starts stopped."""

    @dg.schedule(
        name=f"{automated.name}_retraining",
        cron_schedule=cron,
        target=dg.AssetSelection.groups(automated.name),
        description=f"Retrains {automated.name} if its data or settings changed; the gate decides "
        "on promotion. Otherwise the tick is skipped with the reason.",
    )
    def retraining(context: dg.ScheduleEvaluationContext) -> Decision:
        return scheduled_run(automated, shared_instance(context))

    return retraining


def scheduled_run(
    automated: Automated, instance: dg.DagsterInstance, now: float | None = None
) -> Decision:
    """The request of one tick. A failed training is requested again at the next tick."""
    step = automated.step(instance)
    if step.do == "build":
        return automated.build("schedule", step, None)
    if step.do == "train":
        return automated.train("schedule", step, None, now)
    return dg.SkipReason(step.why)
