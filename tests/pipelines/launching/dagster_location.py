"""A code location of one asset, whose job is the module that TEST_SCRIPT names, on TEST_TARGET."""

import os
from pathlib import Path

import dagster as dg

from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.resources import JOB_CLIENTS, JobClient

SCRIPT = Path(os.environ["TEST_SCRIPT"])


@dg.asset
def encoder(context: dg.AssetExecutionContext, jobs: JobClient) -> dg.MaterializeResult:
    return jobs.run(context=context, command=SCRIPT.stem, runner="plain")


defs = dg.Definitions(
    assets=[encoder],
    executor=dg.in_process_executor,
    sensors=[reconcile_jobs],
    resources={"jobs": type(JOB_CLIENTS[os.environ["TEST_TARGET"]])(cwd=str(SCRIPT.parent))},
)
