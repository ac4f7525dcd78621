"""What runs the steps of a Dagster run: the run's own process, or a Kubernetes Job each."""

from __future__ import annotations

from typing import Literal

import dagster as dg
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings


class DagsterSettings(RomaSettings):
    """How Dagster runs what is here."""

    model_config = SettingsConfigDict(env_prefix="ROMA_DAGSTER_")

    executor: Literal["in_process", "k8s_job"] = Field(
        "in_process",
        description="k8s_job, in a Dagster on Kubernetes: a pod a step, which outlives its run's.",
    )


def retry_policy() -> dg.RetryPolicy | None:
    """How often a step may be started again that ended for no failure of its job.

    Where steps have pods of their own, one that dies fails its step; the next one adopts the job. A
    failed training raises ``dagster.Failure`` with ``allow_retries=False`` and is not repeated.
    """
    apart = DagsterSettings().executor == "k8s_job"
    return dg.RetryPolicy(max_retries=3, delay=10) if apart else None


def executor() -> dg.ExecutorDefinition:
    """The executor that the settings name.

    In the run's process a step only waits for a job: a worker that is killed leaves a run that the
    reconcile sensor fails, Dagster retries it, and the retry adopts the job. On Kubernetes steps are
    Jobs of their own; a run worker that dies is resumed and finds its steps as they are.
    """
    if DagsterSettings().executor == "k8s_job":
        from dagster_k8s import k8s_job_executor  # it imports the cluster client: a second

        return k8s_job_executor
    return dg.in_process_executor
