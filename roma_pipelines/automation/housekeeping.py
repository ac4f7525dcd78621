"""Reconciliation of jobs and Dagster runs that lost each other.

The default run launcher does not notice that a run's worker died, and a dead worker cannot end its
job. So, for each job: a run whose supervisor is dead is failed, and Dagster's retry adopts the job;
a job whose run has ended is cancelled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import dagster as dg

from roma_pipelines._compat import shared_instance
from roma_pipelines.automation.alerts import deliver_pending
from roma_pipelines.launching.jobs import Job, all_jobs, cancel
from roma_pipelines.launching.launcher import Launcher, Unreachable
from roma_pipelines.launching.spec import AttemptRecord
from roma_pipelines.launching.targets import launcher_of_attempt
from roma_pipelines.registry.runs import end_runs_of_job
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage


@dg.sensor(
    name="reconcile_jobs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose worker died, so that their retry adopts the job, cancels jobs "
    "whose run ended, and delivers pending alerts.",
)
def reconcile_jobs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    storage = Storage.open()

    def end_mlflow_run(job: Job) -> None:
        end_runs_of_job(connect(MlflowSettings(), storage.mlflow), job.key, "KILLED")

    done = reconcile(
        storage.jobs, shared_instance(context), launcher_of_attempt(storage), end_mlflow_run
    )
    if n := deliver_pending(storage):
        done.append(f"delivered {n} pending alerts")
    for line in done:
        context.log.warning(line)
    return dg.SkipReason("; ".join(done) or "every unfinished job is supervised or will be")


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
    on_cancelled: Callable[[Job], None] = lambda job: None,
) -> list[str]:
    """Fail runs and cancel jobs as :func:`action_for` says; returns one line per action."""
    done = []
    for job in all_jobs(jobs_root):
        if job.open_attempt is None:
            continue
        action, reason = action_for(job, instance)
        if action == "none":
            continue
        if action == "fail the run":
            run = instance.get_run_by_id(job.lease["dagster_run_id"])
            if run is not None and run.status in _ALIVE:
                instance.report_run_failed(run, f"{reason}; a retry adopts job {job.key}")
        else:
            try:
                cancel(job, f"the reconcile sensor: {reason}", launcher_of_attempt)
            except (Unreachable, RuntimeError, ValueError) as error:  # the next tick tries again
                done.append(f"job {job.key}: {reason}; cancelling failed: {error}")
                continue
            on_cancelled(job)
        done.append(f"job {job.key}: {reason}: {action}")
    return done
