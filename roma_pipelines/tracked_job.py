"""One job with its MLflow run: find or make both, watch, bring the metrics home, end the run."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import BaseModel

from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder, Result
from roma_core.trainer.followers import forward_to_mlflow
from roma_pipelines.database import PASSWORD_VARIABLES
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.job import AttemptRecord, JobFailed, Outcome
from roma_pipelines.launching.launcher import Refused
from roma_pipelines.launching.pipes import key_for, run_job
from roma_pipelines.launching.usage import usage
from roma_pipelines.provenance import code_version
from roma_pipelines.registry.runs import end_run, find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect, is_server
from roma_pipelines.storage import Storage
from roma_pipelines.targets import job_spec, launcher_for, roma_command


@dataclass(frozen=True)
class TrackedJob:
    """A completed job and the run that shows it."""

    outcome: Outcome
    usage: dict[str, Any]
    folder: JobFolder
    result: Result
    run_id: str
    client: Any  # mlflow.MlflowClient; importing it for the type would cost every definition load

    def output(self, name: str) -> Path:
        """Path of one of the job's outputs."""
        return self.folder.path / self.result.outputs[name]

    def metadata(self) -> dict[str, Any]:
        """What the asset shows of it, and what downstream assets read."""
        facts = {k: v for k, v in self.result.facts.items() if isinstance(v, int | float | str)}
        shown = self.outcome.metadata() | self.usage | facts
        return {
            # numbers as people read them; result.json has all digits
            **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in shown.items()},
            "job_folder": dg.MetadataValue.path(str(self.folder.path)),
            "log": dg.MetadataValue.path(str(self.folder.attempt(self.result.attempt).log)),
            "decisions": dg.MetadataValue.path(str(self.folder.decisions)),
            "mlflow_run_id": self.run_id,
        }


def run_tracked_job(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    command: str,
    config: BaseModel,
    *,
    starter: Literal["torchrun", "plain"] = "plain",
    params: Mapping[str, Any],
) -> TrackedJob:
    """Run ``roma COMMAND`` as a job of the experiment.

    A retry of the same Dagster run finds the job and its MLflow run again.

    Args:
        config: the frozen configuration, which becomes ``config.json``.
        starter: torchrun for a training; plain for other work, which runs in one process.
        params: MLflow parameters.

    Raises:
        dagster.Failure: the job failed or was cancelled, and the text has the end of its log; or its
            target refused it, and the text has every reason.
    """
    storage = Storage.open()
    key = key_for(context)
    folder = JobFolder(storage.jobs / key)
    document = config.model_dump(mode="json")
    client = connect(MlflowSettings(), storage.mlflow)
    noun = context.asset_key.path[-1]
    run_id = find_or_create_run(
        client,
        f"{MlflowSettings().experiment_prefix}/{experiment.name}",
        key,
        f"{noun} {context.run_id[:8]}",
        {
            "roma.dagster_run_id": context.run_id,
            "roma.asset": context.asset_key.to_user_string(),
            "roma.git_sha": code_version(),
            "roma.config_digest": digest_of(document),
        },
        params,
    )
    resources = experiment.resources
    spec = job_spec(
        resources, key, roma_command(command, folder.path), digest_of(document), starter
    )
    launcher = launcher_for(resources.target, resources.profile, storage)
    try:
        outcome = run_job(
            context,
            launcher,
            folder,
            spec,
            document,
            environment=_where_metrics_go(client, run_id, resources.target),
            max_attempts=resources.max_attempts,
        )
    except JobFailed as error:
        _bring_home(client, folder, run_id)
        end_run(client, run_id, "KILLED" if error.outcome.status == "cancelled" else "FAILED")
        raise dg.Failure(
            description=str(error), metadata={"job_folder": str(folder.path)}, allow_retries=False
        ) from error
    except Refused as error:
        end_run(client, run_id, "FAILED")
        raise dg.Failure(description=str(error), allow_retries=False) from error
    except BaseException:  # interrupted: a job that was left running keeps its run open
        if _was_cancelled(folder):
            end_run(client, run_id, "KILLED")
        raise
    assert outcome.result is not None, "a completed job has a result"
    _bring_home(client, folder, run_id)
    for file in (folder.config, folder.result):
        client.log_artifact(run_id, str(file))
    end_run(client, run_id, "FINISHED")
    used = usage(outcome, spec, launcher.price)
    return TrackedJob(outcome, used, folder, outcome.result, run_id, client)


def _where_metrics_go(client: Any, run_id: str, target: str) -> dict[str, str]:
    """Variables by which the job's own follower finds its MLflow run.

    Our own store is a SQLite file, which two computers must not share, or a database whose password
    stays here: jobs of a cluster are not told of it, and their metrics come home at the outcome.
    Progress is on the asset's page.
    """
    if is_server(client.tracking_uri):
        passwords = {}
    elif target != "local":
        return {}
    else:
        passwords = {name: os.environ[name] for name in PASSWORD_VARIABLES if name in os.environ}
    return {**passwords, "MLFLOW_TRACKING_URI": client.tracking_uri, "MLFLOW_RUN_ID": run_id}


def _was_cancelled(folder: JobFolder) -> bool:
    numbers = folder.attempt_numbers()
    if not numbers:
        return False
    document = read_json(folder.attempt_record(numbers[-1]), schema_version=1)
    record = AttemptRecord.model_validate(document)
    return record.end is not None and record.end.how == "cancelled"


def _bring_home(client: Any, folder: JobFolder, run_id: str) -> None:
    """Send what the job's own follower could not: an MLflow that was down misses nothing."""
    forward_to_mlflow(folder.metrics, client.tracking_uri, run_id)


def picture(png: bytes, alt: str) -> dg.MetadataValue:
    """A PNG shown on the asset's page."""
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})")
