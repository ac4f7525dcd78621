"""Sensor: jobs and runs that lost one another are brought together again, or ended."""

from __future__ import annotations

import dagster as dg

from roma_pipelines.automation.shared_instance import instance_of


@dg.sensor(
    name="reconcile_jobs",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Fails runs whose worker died, so that their retry adopts the job, and cancels jobs "
    "that no run wants any more.",
)
def reconcile_jobs(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Looks at every job that is not over."""
    from roma_pipelines.launching.jobs import Job
    from roma_pipelines.launching.reconcile import reconcile
    from roma_pipelines.storage import Storage
    from roma_pipelines.targets import launcher_of

    storage = Storage.open()

    def end_mlflow_run(job: Job) -> None:
        from roma_pipelines.registry.runs import end_runs_of_job
        from roma_pipelines.registry.store import MlflowSettings, connect

        end_runs_of_job(connect(MlflowSettings(), storage.mlflow), job.key, "KILLED")

    done = reconcile(storage.jobs, instance_of(context), launcher_of(storage), end_mlflow_run)
    for line in done:
        context.log.warning(line)
    return dg.SkipReason("; ".join(done) or "every job that is not over is watched, or will be")
