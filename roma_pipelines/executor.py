"""The Dagster executor: steps run in the run's process, or each in a Kubernetes Job."""

from __future__ import annotations

from typing import Literal

import dagster as dg
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings


class DagsterSettings(RomaSettings):
    """How Dagster runs the assets."""

    model_config = SettingsConfigDict(env_prefix="ROMA_DAGSTER_")

    executor: Literal["in_process", "k8s_job"] = "in_process"
    """k8s_job, for Dagster on Kubernetes: each step in a pod that outlives the run's pod."""


def retry_policy() -> dg.RetryPolicy | None:
    """Retries of a step whose pod died; the retry adopts the job.

    A failed training raises ``dagster.Failure`` with ``allow_retries=False`` and is not repeated.
    """
    if DagsterSettings().executor == "in_process":
        return None
    return dg.RetryPolicy(max_retries=3, delay=10)


def executor() -> dg.ExecutorDefinition:
    """The executor chosen by ``ROMA_DAGSTER_EXECUTOR``.

    In process, a step only waits for a job: the reconcile sensor fails the run of a killed worker,
    and its retry adopts the job. On Kubernetes a new run worker finds its steps running.
    """
    if DagsterSettings().executor == "k8s_job":
        from dagster_k8s import k8s_job_executor  # imports the cluster client: one second

        return k8s_job_executor
    return dg.in_process_executor
