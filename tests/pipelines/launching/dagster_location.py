"""A code location of one asset, whose job is the script that TEST_SCRIPT names, on TEST_TARGET."""

import os

import dagster as dg

from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.launching.pipes import key_for, run_job
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.targets import launcher_for
from roma_pipelines.storage import Storage


@dg.asset
def encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    storage = Storage.open()
    key = key_for(context)
    spec = JobSpec(
        key=key,
        command=(os.environ["TEST_SCRIPT"],),
        config_digest=digest_of({}),
        runner="plain",
    )
    launcher = launcher_for(os.environ["TEST_TARGET"], None, storage)
    outcome = run_job(context, launcher, JobFolder(storage.jobs / key), spec, {})
    return dg.MaterializeResult(metadata=outcome.metadata())


defs = dg.Definitions(assets=[encoder], executor=dg.in_process_executor, sensors=[reconcile_jobs])
