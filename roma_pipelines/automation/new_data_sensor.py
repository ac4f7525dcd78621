"""Sensors: new files are built into a data set; a data set with other content is trained on.

The first looks at names, sizes and times of the source's files only, and so may ask for a data set
that turns out to be the same. The second compares contents. Neither asks twice for the same thing.
"""

from __future__ import annotations

import time

import dagster as dg

from roma_core.data.fingerprint import source_fingerprint
from roma_pipelines.automation.automated import TRIGGER_TAG, Automated, Decision
from roma_pipelines.automation.settings import NewData
from roma_pipelines.automation.shared_instance import instance_of
from roma_pipelines.automation.training_state import newest_data, newest_trained, next_step


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
