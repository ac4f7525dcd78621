"""A job of an asset with its MLflow run: create or adopt both, supervise, end the run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
from pydantic import BaseModel
from pydantic_settings import SettingsConfigDict

from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_core.settings import RomaSettings, without_credentials
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.launcher import Rejected
from roma_pipelines.launching.pipes import job_folder
from roma_pipelines.launching.targets import roma_command
from roma_pipelines.registry import runs, store, versions
from roma_pipelines.resources import CompletedJob, JobClient
from roma_pipelines.run_config import STAGES, Resources, overrides
from roma_pipelines.storage import Storage

_SERVER_RETRIES, _SERVER_RETRY_S = 10, 60.0  # of a step that needs a server which is away


@dataclass(frozen=True)
class TrackedJob(CompletedJob):
    """A completed job and its MLflow run."""

    run: runs.JobRun
    run_config: dict[str, Any]  # of the asset: what this run changed

    def metadata(self) -> dict[str, Any]:
        known = runs.known_run(self.folder)
        uri = store.tracking_uri(self.run.settings, self.run.storage.mlflow)
        return {
            **super().metadata(),
            **({"run_config": dg.MetadataValue.json(self.run_config)} if self.run_config else {}),
            "mlflow_run_id": known.get("run_id", "pending: MLflow did not answer"),
            **page_links(self.folder.path.name, "report" in self.result.outputs, known, uri),
        }


def run_tracked_job(
    context: dg.AssetExecutionContext,
    experiment: Experiment,
    command: str,
    config: BaseModel,
    resources: Resources,
    *,
    params: Mapping[str, Any],
) -> TrackedJob:
    """Run ``roma COMMAND`` as a job of the experiment; a retry of the Dagster run adopts both.

    ``resources`` are those of its stage, as ``Resources.of`` returns them.
    Raises dagster.Failure if the job failed (with the end of its log) or was rejected (why).
    """
    folder = job_folder(context)
    document = config.model_dump(mode="json")
    changes = _run_config(context, experiment).get(context.asset_key.path[-1], {})
    if (adopted := runs.read_record(folder)) is not None:  # its job keeps its first config
        changes = json.loads(adopted.tags.get(versions.RUN_CONFIG_TAG, "{}"))
    tags = {versions.RUN_CONFIG_TAG: json.dumps(changes, sort_keys=True)} if changes else {}
    tags |= {
        "roma.dagster_run_id": context.run_id,
        "roma.asset": context.asset_key.to_user_string(),
        "roma.git_sha": runs.code_version(),
        "roma.config_digest": digest_of(document),
    }
    settings = store.MlflowSettings()
    record = runs.RunRecord(
        experiment=f"{settings.experiment_prefix}/{experiment.name}",
        name=f"{context.asset_key.path[-1]} {context.run_id[:8]}",
        tags=tags,
        params={name: str(value) for name, value in params.items()},
    )
    run = runs.JobRun(Storage.open(), folder, record, settings, context.log.warning)
    try:
        store.check_access(settings)  # before anything is queued
    except store.StoreError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    client: JobClient = getattr(context.resources, resources.target)
    try:
        job = client.complete(
            context,
            folder,
            roma_command(command, folder.path),
            document,
            resources,
            profile=resources.profile,
            environment=run.environment(resources.target),
            on_accepted=lambda: run.update(lambda _: record),  # importing MLflow takes longer
            max_attempts=resources.max_attempts,
        )
    except BaseException as error:
        if isinstance(error.__cause__, Rejected):
            run.update(lambda _: record.model_copy(update={"status": "FAILED"}))
        elif isinstance(error, dg.Failure) or folder.mlflow_record.exists():
            run.end()  # of one that still runs, after an interrupt, the MLflow run stays open
        raise
    run.end()
    return TrackedJob(**vars(job), run=run, run_config=changes)


def _run_config(context: dg.AssetExecutionContext, experiment: Experiment) -> dict[str, Any]:
    """What this run changes, by the names of the experiment's assets."""
    found: dict[str, Any] = {}
    ops: Any = context.run.run_config.get("ops", {})
    for name in experiment.own_assets:
        config = ops.get(experiment.key(name).to_python_identifier(), {}).get("config", {})
        for field in config.keys() - {"model", "trainer"}:  # Dagster offers {env: NAME} for a value
            if isinstance(value := config[field], dict) and "env" in value:
                config = {**config, field: dg.EnvVar(value["env"]).get_value()}
        if given := overrides(config):
            found[name] = given
    return found


def of_this_run(context: dg.AssetExecutionContext, experiment: Experiment) -> Experiment:
    """The experiment as this run's config changes it.

    The config of all its assets is validated, also of those that come later in the run, and so are
    the profiles of clusters. Raises dagster.Failure with the sentences of the file.
    """
    try:
        changes = _run_config(context, experiment)
        if changes:
            experiment = experiment.with_run_config(changes)
            of_jobs = STAGES.keys() - (set() if experiment.resources.dataset else {"dataset"})
            for name in of_jobs & set(experiment.own_assets):
                key, stage = experiment.key(name), experiment.resources.of(STAGES[name])
                if key in context.job_def.asset_layer.executable_asset_keys:
                    getattr(context.resources, stage.target).launcher(stage.profile)
        return experiment
    except ValueError as error:
        raise dg.Failure(f"run config: {error}", allow_retries=False) from error


@contextlib.contextmanager
def registry(context: dg.AssetExecutionContext, *upstream: dict[str, Any]) -> Iterator[Any]:
    """A client of the registry, in a step that cannot do without it.

    MLflow first receives what it lacks of the ``upstream`` jobs, and their metadata the id of their
    runs. While the server is away, the step is tried again every minute, and fails after ten.
    """
    storage, settings = Storage.open(), store.MlflowSettings()
    try:
        if not store.answers(settings):
            raise ConnectionError("no answer")
        runs.limit_requests(120)  # long enough for the upload of a package
        client = store.connect(settings, storage.mlflow)
        for job in upstream:
            folder = JobFolder(str(job["job_folder"]))
            # another sender ends: its requests have limits
            runs.send_record(client, folder, wait_s=-1)
            job["mlflow_run_id"] = runs.known_run(folder).get("run_id", job["mlflow_run_id"])
        yield client
    except Exception as error:
        if not (away := runs.no_answer(error)):
            raise
        sentence = (
            f"{away}, and {context.asset_key.to_user_string()} needs it; start it, and this step "
            f"continues or can be run again: nothing is lost"
        )
        context.log.warning(sentence)
        raise dg.RetryRequested(_SERVER_RETRIES, _SERVER_RETRY_S) from dg.Failure(sentence)


class PageSettings(RomaSettings):
    """Addresses of the pages in users' browsers; ``roma-pipeline up`` sets them for its processes."""

    model_config = SettingsConfigDict(env_prefix="ROMA_PAGE_")

    overview_url: str | None = None
    """Address of the overview; null: no links."""
    mlflow_url: str | None = None
    """Address of the MLflow page; null takes the tracking server's, if there is one."""


def page_links(
    key: str, has_report: bool, run: Mapping[str, str], tracking_uri: str
) -> dict[str, dg.MetadataValue[Any]]:
    """Links to a job's log, report and MLflow run on the pages that are known."""
    pages, links = PageSettings(), {}
    if pages.overview_url is not None:  # a browser opens no file from a page
        for name in ("log", "report") if has_report else ("log",):
            links[f"open_{name}"] = f"{pages.overview_url}/jobs/{key}/{name}"
    server = without_credentials(tracking_uri) if store.is_server(tracking_uri) else None
    if (mlflow := pages.mlflow_url or server) is not None and "experiment_id" in run:
        path = f"experiments/{run['experiment_id']}/runs/{run['run_id']}"
        links["open_mlflow_run"] = f"{mlflow.rstrip('/')}/#/{path}"
    return {name: dg.MetadataValue.url(link) for name, link in links.items()}


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
