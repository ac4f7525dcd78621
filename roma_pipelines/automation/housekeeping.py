"""Jobs and Dagster runs that have lost one another: found by looking at both.

The default run launcher does not notice that a run's worker died, and a worker that died cannot end
its job. So, job by job: a run whose watcher is dead is failed, and Dagster's retry of it adopts the
job; a job that no run wants any more is cancelled.

Sensor: jobs and runs that lost one another are brought together again, or ended.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import dagster as dg

from roma_pipelines.launching.jobs import Job, all_jobs, cancel
from roma_pipelines.launching.launcher import Launcher, Unreachable
from roma_pipelines.launching.spec import AttemptRecord
from roma_pipelines.storage import instance_of


@dg.sensor(
    name="reconcile_jobs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose worker died, so that their retry adopts the job, and cancels jobs "
    "that no run wants any more.",
)
def reconcile_jobs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Looks at every job that is not over."""

    from roma_pipelines.launching.targets import launcher_of
    from roma_pipelines.storage import Storage

    storage = Storage.open()

    def end_mlflow_run(job: Job) -> None:
        from roma_pipelines.registry.runs import end_runs_of_job
        from roma_pipelines.registry.store import MlflowSettings, connect

        end_runs_of_job(connect(MlflowSettings(), storage.mlflow), job.key, "KILLED")

    done = reconcile(storage.jobs, instance_of(context), launcher_of(storage), end_mlflow_run)
    for line in done:
        context.log.warning(line)
    return dg.SkipReason("; ".join(done) or "every job that is not over is watched, or will be")


Fate = Literal["leave", "fail the run", "cancel the job"]

_STATUS = dg.DagsterRunStatus
_ALIVE = frozenset({_STATUS.STARTED, _STATUS.STARTING, _STATUS.CANCELING})
_TO_COME = frozenset({_STATUS.QUEUED, _STATUS.NOT_STARTED, _STATUS.MANAGED})


def fate_of(job: Job, instance: dg.DagsterInstance) -> tuple[Fate, str]:
    """What is to become of a job that is not over, and why."""
    run_id = job.watcher.get("dagster_run_id")
    if run_id is None:
        return "leave", "no Dagster run began it"
    if job.watched:
        return "leave", "it is watched"
    run = instance.get_run_by_id(run_id)
    if run is None:
        return "cancel the job", f"its run {run_id} was deleted"
    if run.status in _TO_COME:
        return "leave", f"its run {run_id} is to start"
    if run.status is _STATUS.CANCELING:
        return "cancel the job", f"its run {run_id} is being cancelled, and nobody watches it"
    if run.status in _ALIVE:
        return "fail the run", f"the worker of run {run_id} is gone"
    if run.status is _STATUS.FAILURE and (why := _adopter(run, instance)):
        return "leave", why
    return "cancel the job", f"its run {run_id} ended: {run.status.value}"


def _adopter(run: dg.DagsterRun, instance: dg.DagsterInstance) -> str:
    """Which run goes on with what a failed run left; empty if none does or will."""
    children = instance.get_runs(dg.RunsFilter(tags={"dagster/parent_run_id": run.run_id}))
    if going := [child for child in children if not child.is_finished]:
        return f"run {going[0].run_id} retries its run"
    if not children and run.tags.get("dagster/will_retry") == "true":
        return f"its run {run.run_id} will be retried"
    return next((why for child in children if (why := _adopter(child, instance))), "")


def reconcile(
    jobs_root: Path,
    instance: dg.DagsterInstance,
    launcher_of: Callable[[AttemptRecord], Launcher],
    on_cancelled: Callable[[Job], None] = lambda job: None,
) -> list[str]:
    """Repair what is broken; returns what was done, in words.

    Args:
        on_cancelled: called with every job that was cancelled, to end what else belongs to it.
    """
    done = []
    for job in all_jobs(jobs_root):
        if job.open_attempt is None:
            continue
        fate, why = fate_of(job, instance)
        if fate == "leave":
            continue
        if fate == "fail the run":
            run = instance.get_run_by_id(job.watcher["dagster_run_id"])
            if run is not None and run.status in _ALIVE:
                instance.report_run_failed(run, f"{why}; job {job.key} goes on, a retry adopts it")
        else:
            try:
                cancel(job, f"the reconcile sensor: {why}", launcher_of)
            except (Unreachable, RuntimeError, ValueError) as error:  # the next tick tries again
                done.append(f"job {job.key}: {why}; it could not be cancelled: {error}")
                continue
            on_cancelled(job)
        done.append(f"job {job.key}: {why}: {fate}")
    return done
