"""Sensors and the schedule of an experiment, and the sensor that reconciles jobs and Dagster runs.

The default run launcher does not notice that a run's worker died, and a dead worker cannot end its
job. So, for each job: a run whose supervisor is dead is failed, and Dagster's retry adopts the job;
a job whose run has ended is cancelled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

import dagster as dg

from roma_core.data.config import source_fingerprint
from roma_pipelines._compat import shared_instance
from roma_pipelines.automation import state
from roma_pipelines.automation.alerts import deliver_pending
from roma_pipelines.automation.drift import check_inputs
from roma_pipelines.automation.settings import NewData
from roma_pipelines.automation.state import Decision
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.jobs import Job, SettledJobs, all_jobs, cancel
from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.spec import AttemptRecord
from roma_pipelines.launching.targets import launcher_of_attempt
from roma_pipelines.registry.promotion import CHAMPION
from roma_pipelines.registry.runs import SHORT_S, limit_requests, no_answer, send_pending
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import version_at
from roma_pipelines.storage import Storage

Check = Callable[[dg.DagsterInstance, str | None, float], tuple[Decision, str | None]]


def sensors_of(experiment: Experiment) -> list[dg.SensorDefinition]:
    """The sensors of an experiment; all but ``NAME_train_on_new_data`` start stopped."""
    section, name = experiment.automation, experiment.name
    status, found = dg.DefaultSensorStatus, []

    def add(kind: str, asset: str | None, every_s: float, description: str, check: Check) -> None:
        """``check`` gets instance, cursor and time, and returns its decision and the next cursor."""

        def tick(context: dg.SensorEvaluationContext) -> Decision:
            decision, cursor = check(shared_instance(context), context.cursor, time.time())
            context.update_cursor(cursor)
            return decision

        selection = dg.AssetSelection
        sensor = dg.sensor(
            name=f"{name}_{kind}",
            target=selection.assets(experiment.key(asset)) if asset else selection.groups(name),
            minimum_interval_seconds=round(every_s),
            default_status=status.RUNNING if kind == "train_on_new_data" else status.STOPPED,
            description=description,
        )
        found.append(sensor(tick))

    if (new := section.new_data) is not None:
        text = f"Builds the data set of {name} when files of its source changed."
        add(
            "new_data",
            "dataset",
            new.every_min * 60,
            text,
            lambda instance, cursor, now: (check_source(experiment, new, instance, now), cursor),
        )
    if (drift := section.drift) is not None:
        text = f"Materialises recent_inputs of {name} when there are new files; sends an alert on "
        text += "drift and retrains within the budget."
        add("drift", None, 30, text, lambda *tick: check_inputs(experiment, drift, *tick))
    if found or experiment.schedule is not None:  # acts only on data sets that automation built
        text = f"Trains {name} when its schedule or a sensor built a data set that differs from "
        text += "the one of the current model."
        add(
            "train_on_new_data",
            None,
            30,
            text,
            lambda instance, cursor, now: (check_dataset(experiment, instance, now), cursor),
        )
    if section.predict_on_promotion:  # reacts to the alias, not to our commands
        text = f"Materialises batch_predictions with the new champion of {name}."
        add(
            "predict_on_promotion",
            "batch_predictions",
            60,
            text,
            lambda _, cursor, __: check_champion(experiment, cursor),
        )
    return found


def retraining_schedule(experiment: Experiment, cron: str) -> dg.ScheduleDefinition:
    """``NAME_retraining``; starts stopped."""

    @dg.schedule(
        name=f"{experiment.name}_retraining",
        cron_schedule=cron,
        target=dg.AssetSelection.groups(experiment.name),
        description=f"Retrains {experiment.name} if its data or settings changed; the gate decides "
        "on promotion. Otherwise the tick is skipped with the reason.",
    )
    def retraining(context: dg.ScheduleEvaluationContext) -> Decision:
        return scheduled_run(experiment, shared_instance(context))

    return retraining


def check_source(
    experiment: Experiment, settings: NewData, instance: dg.DagsterInstance, now: float
) -> Decision:
    """Request the data set if files changed and delivery is complete."""
    found = source_fingerprint(experiment.dataset)
    data = state.newest_data(instance, experiment)
    if found.digest == data.fingerprint:
        return dg.SkipReason(f"none of {found.n_files} files changed since run {data.run}")
    age_s = now - found.newest
    if 0 <= age_s < settings.settle_s:
        return dg.SkipReason(
            f"the newest of {found.n_files} files is {age_s:.0f} s old; waiting until "
            f"{settings.settle_s:g} s because it may be incomplete"
        )
    step = state.next_step(state.state_of(experiment, instance), found.digest)
    if step.do != "build":
        return dg.SkipReason(step.why)
    return state.request(experiment, instance, "new data", step, now)


def check_dataset(
    experiment: Experiment, instance: dg.DagsterInstance, now: float | None = None
) -> Decision:
    """Request a training if automation built a data set that the model was not trained on."""
    data = state.newest_data(instance, experiment)
    if data.version is None:
        return dg.SkipReason("no data set was built yet")
    trained = state.newest_trained(instance, experiment)
    if trained.on is not None and trained.on[0] == data.version:
        return dg.SkipReason(f"the newest data set, {data.version[:12]}, was trained on already")
    facts = state.state_of(experiment, instance)
    run = instance.get_run_by_id(data.run)
    trigger = run.tags.get(state.TRIGGER_TAG) if run is not None else None
    if trigger not in ("schedule", "new data", "drift"):
        return dg.SkipReason(f"run {data.run} built the data set manually, so train manually")
    # the source may have changed again: train on what is built, the next tick handles the rest
    step = state.next_step(facts, facts.data.fingerprint or "")
    if step.do != "train":
        return dg.SkipReason(step.why)
    return state.request(experiment, instance, trigger, step, now)  # type: ignore[arg-type]


def check_champion(experiment: Experiment, cursor: str | None) -> tuple[Decision, str]:
    """Request predictions if the champion changed since ``cursor``, ``MOVES:VERSION``."""
    limit_requests(SHORT_S)
    try:
        client = connect(MlflowSettings(), Storage.open().mlflow)
        version = version_at(client, experiment.name, CHAMPION)
    except Exception as error:
        if not (away := no_answer(error)):
            raise
        return dg.SkipReason(f"{away}; asked again at the next tick"), cursor or "0:"
    moves, _, before = (cursor or "0:").partition(":")
    if version is None:
        return dg.SkipReason(f"{experiment.name} has no champion yet"), f"{moves}:"
    if version == before:
        return dg.SkipReason(f"version {version} is still the champion"), f"{moves}:{version}"
    number = int(moves) + 1  # a rollback to an old version is a new move
    request = dg.RunRequest(
        run_key=f"champion:{number}:{version}",
        asset_selection=[experiment.key("batch_predictions")],
        run_config=experiment.run_config(("batch_predictions",)),
        tags={state.EXPERIMENT_TAG: experiment.name, state.TRIGGER_TAG: "promotion"},
    )
    return request, f"{number}:{version}"


def scheduled_run(
    experiment: Experiment, instance: dg.DagsterInstance, now: float | None = None
) -> Decision:
    """The request of one tick. A failed training is requested again at the next tick."""
    step = state.step_of(experiment, instance)
    if step.do in ("build", "train"):
        return state.request(experiment, instance, "schedule", step, now, once=False)
    return dg.SkipReason(step.why)


# -- reconciliation -----------------------------------------------------------------------------


@dg.sensor(
    name="reconcile_jobs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose worker died, so that their retry adopts the job, cancels jobs "
    "whose run ended, and delivers pending alerts and what MLflow has not received.",
)
def reconcile_jobs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    storage = Storage.open()
    done = reconcile(storage.jobs, shared_instance(context), launcher_of_attempt(storage))
    sent, failed = send_pending(storage)
    if sent:
        done.append(f"sent MLflow what it lacked of {len(sent)} jobs")
    done += failed
    if n := deliver_pending(storage):
        done.append(f"delivered {n} pending alerts")
    for line in done:
        context.log.warning(line)
    return dg.SkipReason("; ".join(done) or "every unfinished job is supervised or will be")


# Dagster gives a tick of a sensor a minute
_CANCEL_WITHIN_S, _REPORT_WITHIN_S = 30.0, 15.0
_pool = ThreadPoolExecutor(64, "cancel")
_settled = SettledJobs()
_cancelling: dict[str, Future[str]] = {}  # by the job's key
_STATUS = dg.DagsterRunStatus
_ALIVE = (_STATUS.STARTED, _STATUS.STARTING, _STATUS.CANCELING)


def action_for(
    job: Job, instance: dg.DagsterInstance
) -> tuple[Literal["none", "fail the run", "cancel the job"], str]:
    """What to do about a job that has not ended, and the reason."""
    run_id = job.lease.get("dagster_run_id")
    if run_id is None:
        return "none", "it was not started by a Dagster run"
    if job.supervised:
        return "none", "it is supervised"
    run = instance.get_run_by_id(run_id)
    if run is None:
        return "cancel the job", f"its run {run_id} was deleted"
    if run.status in (_STATUS.QUEUED, _STATUS.NOT_STARTED, _STATUS.MANAGED):
        return "none", f"its run {run_id} is about to start"
    if run.status is _STATUS.CANCELING:
        return "cancel the job", f"its run {run_id} is being cancelled without a supervisor"
    if run.status in _ALIVE:
        return "fail the run", f"the worker of run {run_id} is gone"
    if run.status is _STATUS.FAILURE and (reason := _adopter(run, instance)):
        return "none", reason
    return "cancel the job", f"its run {run_id} ended: {run.status.value}"


def _adopter(run: dg.DagsterRun, instance: dg.DagsterInstance) -> str:
    """Which run adopts the jobs of a failed run; empty if none does or will."""
    children = instance.get_runs(dg.RunsFilter(tags={"dagster/parent_run_id": run.run_id}))
    if active := [child for child in children if not child.is_finished]:
        return f"run {active[0].run_id} retries its run"
    if not children and run.tags.get("dagster/will_retry") == "true":
        return f"its run {run.run_id} will be retried"
    return next((reason for child in children if (reason := _adopter(child, instance))), "")


def reconcile(
    jobs_root: Path,
    instance: dg.DagsterInstance,
    launcher_of_attempt: Callable[[AttemptRecord], Launcher],
) -> list[str]:
    """Fail runs and cancel jobs as :func:`action_for` says; returns one line per action.

    Jobs are cancelled at the same time, so that a cluster that does not answer delays no other one.
    What takes long continues beside the next ticks, which report it.
    """

    def cancelled(job: Job, reason: str) -> str:
        try:
            cancel(job, f"the reconcile sensor: {reason}", launcher_of_attempt, _CANCEL_WITHIN_S)
        except Exception as error:  # of a cluster or its client; the next tick tries again
            return f"job {job.key}: {reason}; cancelling failed: {error}"
        return f"job {job.key}: {reason}: cancel the job"

    done = []
    for job in all_jobs(jobs_root, _settled):
        action, reason = ("none", "") if job.open_attempt is None else action_for(job, instance)
        if action == "fail the run":
            run = instance.get_run_by_id(job.lease["dagster_run_id"])
            if run is not None and run.status in _ALIVE:
                instance.report_run_failed(run, f"{reason}; a retry adopts job {job.key}")
            done.append(f"job {job.key}: {reason}: {action}")
        elif action == "cancel the job" and job.key not in _cancelling:
            _cancelling[job.key] = _pool.submit(cancelled, job, reason)
    wait(_cancelling.values(), _REPORT_WITHIN_S)
    for key in [key for key, future in _cancelling.items() if future.done()]:
        done.append(_cancelling.pop(key).result())
    return done + [f"job {key}: still being cancelled" for key in _cancelling]
