"""A job of an asset with its MLflow run: create or adopt both, supervise, end the run."""

from __future__ import annotations

import base64
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dagster as dg
from pydantic import BaseModel, Field
from pydantic_settings import SettingsConfigDict

from roma_core.files import digest_of, write_json
from roma_core.job import JobFolder, Result
from roma_core.settings import RomaSettings, without_credentials
from roma_core.trainer.trackers import MLFLOW_RUN_VARIABLE, forward_to_mlflow
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.jobs import usage
from roma_pipelines.launching.launcher import Rejected
from roma_pipelines.launching.outcome import attempts_table, events_table, read_records
from roma_pipelines.launching.pipes import key_for, run_job
from roma_pipelines.launching.spec import JobFailed, Outcome
from roma_pipelines.launching.targets import job_spec, launcher_for, roma_command
from roma_pipelines.registry.runs import code_version, end_run, end_runs_of_job, find_or_create_run
from roma_pipelines.registry.store import (
    MlflowSettings,
    StoreError,
    check_access,
    connect,
    is_server,
    tracking_uri,
)
from roma_pipelines.storage import PASSWORD_VARIABLES, Storage


@dataclass(frozen=True)
class TrackedJob:
    """A completed job and its MLflow run."""

    outcome: Outcome
    usage: dict[str, Any]
    folder: JobFolder
    result: Result
    run_id: str
    client: Any  # mlflow.MlflowClient; importing it for the type would cost every definition load

    def output(self, name: str) -> Path:
        """Path of an output of the job."""
        return self.folder.path / self.result.outputs[name]

    def metadata(self) -> dict[str, Any]:
        """Metadata of the materialisation, which downstream assets read."""
        facts = {k: v for k, v in self.result.facts.items() if isinstance(v, int | float | str)}
        shown = self.outcome.metadata() | self.usage | facts
        return {
            # rounded for display; result.json has all digits
            **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in shown.items()},
            **_attempts_metadata(self.outcome),
            "log": dg.MetadataValue.path(str(self.folder.attempt(self.result.attempt).log)),
            "mlflow_run_id": self.run_id,
            **job_links(self.folder.path.name, "report" in self.result.outputs),
            **mlflow_link(
                self.client.get_run(self.run_id).info.experiment_id,
                self.run_id,
                self.client.tracking_uri,
            ),
        }


def run_tracked_job(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    command: str,
    config: BaseModel,
    *,
    runner: Literal["torchrun", "plain"] = "plain",
    params: Mapping[str, Any],
) -> TrackedJob:
    """Run ``roma COMMAND`` as a job of the experiment; a retry of the Dagster run adopts both.

    Raises:
        dagster.Failure: the job failed or was cancelled, with the end of its log; or its target
            rejected it, with every reason.
    """
    storage = Storage.open()
    key = key_for(context)
    folder = JobFolder(storage.jobs / key)
    document = config.model_dump(mode="json")
    tags = {
        "roma.dagster_run_id": context.run_id,
        "roma.asset": context.asset_key.to_user_string(),
        "roma.git_sha": code_version(),
        "roma.config_digest": digest_of(document),
    }
    run = _MlflowRun(context, storage, folder, experiment.name, tags, params)
    try:
        check_access(run.settings)  # before anything is queued
    except StoreError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    resources = experiment.resources
    spec = job_spec(resources, key, roma_command(command, folder.path), digest_of(document), runner)
    launcher = launcher_for(resources.target, resources.profile, storage)
    try:
        outcome = run_job(
            context,
            launcher,
            folder,
            spec,
            document,
            environment=run.environment(resources.target),
            on_accepted=run.begin,
            max_attempts=resources.max_attempts,
        )
    except JobFailed as error:
        run.forward_metrics()
        run.end("KILLED" if error.outcome.status == "cancelled" else "FAILED")
        facts = _attempts_metadata(error.outcome) | usage(error.outcome, spec, launcher.profile)
        raise dg.Failure(description=str(error), metadata=facts, allow_retries=False) from error
    except Rejected as error:
        run.end("FAILED")
        raise dg.Failure(description=str(error), allow_retries=False) from error
    except BaseException:  # interrupted: a job that still runs keeps its MLflow run open
        records = read_records(folder)
        end = records[-1].end if records else None
        if end is not None and end.status == "cancelled":
            client = connect(run.settings, storage.mlflow)  # the interrupt may precede run.begin
            end_runs_of_job(client, key, "KILLED")
        raise
    assert outcome.result is not None, "a completed job has a result"
    run.forward_metrics()
    for file in (folder.config, folder.result):
        run.client.log_artifact(run.run_id, str(file))
    run.end("FINISHED")
    used = usage(outcome, spec, launcher.profile)
    return TrackedJob(outcome, used, folder, outcome.result, run.run_id, run.client)


@dataclass
class _MlflowRun:
    """The MLflow run of a job; created after submission, since importing MLflow takes longer."""

    context: dg.AssetExecutionContext
    storage: Storage
    folder: JobFolder
    experiment: str
    tags: Mapping[str, str]
    params: Mapping[str, Any]
    settings: MlflowSettings = field(default_factory=MlflowSettings)

    def environment(self, target: str) -> dict[str, str]:
        """Variables with which the job itself forwards metrics to its MLflow run.

        The embedded store is a SQLite file, which two computers must not share, or a database whose
        password stays here: cluster jobs get neither, and their metrics are forwarded at the outcome.
        """
        uri = tracking_uri(self.settings, self.storage.mlflow)
        passwords: dict[str, str] = {}
        if not is_server(uri):
            if target != "local":
                return {}
            passwords = {
                name: os.environ[name] for name in PASSWORD_VARIABLES if name in os.environ
            }
        run = str(self.folder.mlflow_run.absolute())
        return {**passwords, "MLFLOW_TRACKING_URI": uri, MLFLOW_RUN_VARIABLE: run}

    def begin(self) -> None:
        """Create or find the run and record it for the job; a recorded run needs no server now."""
        try:
            _ = self._found
        except Exception as error:
            if not self.folder.mlflow_run.exists():
                raise
            self.context.log.warning(
                f"MLflow: {error}; the job continues; its metrics are kept in {self.folder.metrics}"
            )

    @property
    def client(self) -> Any:
        return self._found[0]

    @property
    def run_id(self) -> str:
        return self._found[1]

    def forward_metrics(self) -> None:
        """Forward the metrics that the job itself could not."""
        forward_to_mlflow(self.folder.metrics, self.client.tracking_uri, self.run_id)

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        end_run(self.client, self.run_id, status)

    @functools.cached_property
    def _found(self) -> tuple[Any, str]:
        client = connect(self.settings, self.storage.mlflow)
        run_id = find_or_create_run(
            client,
            f"{self.settings.experiment_prefix}/{self.experiment}",
            self.folder.path.name,
            f"{self.context.asset_key.path[-1]} {self.context.run_id[:8]}",
            self.tags,
            self.params,
        )
        if self.folder.path.exists():  # a rejected job has none
            write_json(self.folder.mlflow_run, {"schema_version": 1, "run_id": run_id})
        return client, run_id


class PageSettings(RomaSettings):
    """Addresses of the pages in users' browsers; ``roma-pipeline up`` sets them for its processes."""

    model_config = SettingsConfigDict(env_prefix="ROMA_PAGE_")

    overview_url: str | None = Field(None, description="Address of the overview; null: no links.")
    mlflow_url: str | None = Field(
        None,
        description="Address of the MLflow page; null takes the tracking server's, if there is one.",
    )


def job_links(key: str, has_report: bool) -> dict[str, dg.MetadataValue[Any]]:
    """Links to a job's log and report on the overview; a browser opens no file from a page."""
    overview = PageSettings().overview_url
    if overview is None:
        return {}
    names = ["log", "report"] if has_report else ["log"]
    return {f"open_{name}": dg.MetadataValue.url(f"{overview}/jobs/{key}/{name}") for name in names}


def mlflow_link(
    experiment_id: str, run_id: str, tracking_uri: str
) -> dict[str, dg.MetadataValue[Any]]:
    """Link to a run on the MLflow page; none if no page is known."""
    server = without_credentials(tracking_uri) if is_server(tracking_uri) else None
    mlflow = PageSettings().mlflow_url or server
    if mlflow is None:
        return {}
    address = f"{mlflow.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    return {"open_mlflow_run": dg.MetadataValue.url(address)}


def _attempts_metadata(outcome: Outcome) -> dict[str, Any]:
    folder = JobFolder(outcome.folder)
    return {
        "job_folder": dg.MetadataValue.path(str(folder.path)),
        "attempts_made": dg.MetadataValue.md(attempts_table(outcome.attempts)),
        "events": dg.MetadataValue.md(events_table(folder)),
    }


def picture(png: bytes, alt: str) -> dg.MetadataValue:
    """Metadata value that shows a PNG."""
    return dg.MetadataValue.md(f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode()})")


def upstream_metadata(
    context: dg.AssetExecutionContext, experiment: Experiment, *names: str
) -> list[dict[str, Any]]:
    """Metadata of each asset's newest materialisation, or that of this run; Failure if there is none."""
    in_run = context.instance.get_records_for_run(
        context.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION
    ).records
    made = [found for r in in_run if (found := r.event_log_entry.asset_materialization)]
    of_run = {materialization.asset_key: materialization for materialization in made}
    upstream = []
    for key in map(experiment.key, names):
        newest = of_run.get(key) or newest_materialization(context.instance, key)
        if newest is None:
            raise dg.Failure(
                f"{key.to_user_string()} was never materialised; materialise it first, or select it too"
            )
        upstream.append({name: value.value for name, value in newest.metadata.items()})
    return upstream


def newest_materialization(
    instance: dg.DagsterInstance, key: dg.AssetKey
) -> dg.AssetMaterialization | None:
    event = instance.get_latest_materialization_event(key)
    return None if event is None else event.asset_materialization
