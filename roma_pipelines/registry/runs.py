"""MLflow runs of jobs: one per job, however often the orchestrator asks, ended explicitly.

MLflow's own hooks mark crashed and preempted runs as finished and cannot find a run again; so runs
are made through the client, found by the tag ``roma.job_key``, and ended by who knows the outcome.

A registered version at Weights & Biases: a reference, where W&B is in use. MLflow keeps the model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from roma_core.settings import without_credentials
from roma_core.trainer.trackers import WandbConfig, import_tracker
from roma_pipelines.registry.store import artifacts_root, one_at_a_time

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

JOB_KEY_TAG = "roma.job_key"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_PARAMS_AT_ONCE = 100  # MLflow takes no more
_log = logging.getLogger(__name__)


def checked_name(kind: str, name: str) -> str:
    """The name, if it is safe in paths and in MLflow's filter strings.

    Raises:
        ValueError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind} {name!r}: expected letters, digits, '_', '-' and '.', in parts divided by '/'"
        )
    return name


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    job_key: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> str:
    """The id of the job's run, RUNNING: the one that has its key, or else a new one.

    Parameters cannot change in MLflow. Those of a found run stay; ones that it lacks are added, and
    ones that differ are named in a warning.

    Args:
        experiment: created if missing, with the embedded store's folder for its artifacts.
        name: shown in the UI; free text.

    Raises:
        ValueError: an experiment or key that MLflow's filters cannot express.
        RuntimeError: the experiment was deleted.
    """
    checked_name("job key", job_key)
    with one_at_a_time(client):
        experiment_id = ensure_experiment(client, experiment).experiment_id
        runs = client.search_runs(
            [experiment_id], f"tags.`{JOB_KEY_TAG}` = '{job_key}'", order_by=["start_time ASC"]
        )
        run = runs[0] if runs else client.create_run(
            experiment_id, run_name=name, tags={**tags, JOB_KEY_TAG: job_key}
        )  # fmt: skip
        run_id = run.info.run_id
        _add_params(client, run_id, run.data.params, {k: str(v) for k, v in params.items()})
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
    return run_id


def end_run(
    client: MlflowClient, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]
) -> None:
    """Say how the job ended. Nothing else does."""
    client.set_terminated(run_id, status)


def end_runs_of_job(
    client: MlflowClient, job_key: str, status: Literal["FINISHED", "FAILED", "KILLED"]
) -> None:
    """Say how a job ended whose run nobody holds any more; runs that ended already stay as they are."""
    checked_name("job key", job_key)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"tags.`{JOB_KEY_TAG}` = '{job_key}' and attributes.status = 'RUNNING'"
    for run in client.search_runs(experiments, wanted):
        end_run(client, run.info.run_id, status)


def ensure_experiment(client: MlflowClient, name: str) -> Experiment:
    """The experiment of that name, created if missing.

    Raises:
        ValueError: the name cannot be used.
        RuntimeError: it was deleted.
    """
    checked_name("experiment", name)
    found = client.get_experiment_by_name(name)
    if found is None:
        root = artifacts_root(client.tracking_uri)
        # without a location, MLflow would record the present working directory for ever
        location = None if root is None else (root / name.replace("/", "__")).as_uri()
        return client.get_experiment(client.create_experiment(name, location))
    if found.lifecycle_stage == "deleted":
        raise RuntimeError(
            f"the MLflow experiment {name!r} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or use another name"
        )
    return found


def _add_params(
    client: MlflowClient, run_id: str, present: Mapping[str, str], wanted: Mapping[str, str]
) -> None:
    from mlflow.entities import Param

    if changed := {k: (present[k], v) for k, v in wanted.items() if present.get(k, v) != v}:
        _log.warning("run %s keeps its first parameters; these differ now: %s", run_id, changed)
    missing = [Param(k, v) for k, v in wanted.items() if k not in present]
    for start in range(0, len(missing), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=missing[start : start + _PARAMS_AT_ONCE])


WANDB_TAG = "roma.weights_and_biases"
"""Of a version that W&B was told of: what was done."""

_OFF, _FAILED = "off", "failed"
log = logging.getLogger(__name__)
_COLLECTION = "wandb-registry-model"


def link_once(
    client: MlflowClient,
    config: WandbConfig,
    trainer: Mapping[str, Any],
    name: str,
    version: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Tell W&B of a registered version where its training was logged, unless that was done before.

    Args:
        trainer: settings of the training; its project and entity are taken.

    Returns:
        As ``link_version``, perhaps of an earlier call.
    """
    if (done := client.get_model_version(name, version).tags.get(WANDB_TAG)) is not None:
        return done
    done = link_version(
        config,
        trainer["project_name"],
        trainer["entity_name"],
        name,
        version,
        f"models:/{name}/{version}",
        {"mlflow_tracking_uri": without_credentials(client.tracking_uri), **facts},
        folder,
    )
    if not done.startswith((_OFF, _FAILED)):
        client.set_model_version_tag(name, version, WANDB_TAG, done)
    return done


def link_version(
    config: WandbConfig,
    project: str,
    entity: str | None,
    name: str,
    version: str,
    reference: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Tell W&B of a version, if it is in use.

    Args:
        project: of the trainings, and ``entity``; None is the key's own.
        reference: ``models:/NAME/VERSION``, which W&B shows and does not follow.
        facts: metadata of the artifact; plain JSON.
        folder: for W&B's own files.

    Returns:
        What was done, in a word or two: ``off``, ``linked``, ``left for sync``, or why it failed.
    """
    mode = config.effective_mode
    if mode == "disabled":
        return _OFF
    try:
        return _link(config, mode, project, entity, name, version, reference, facts, folder)
    except Exception as error:  # W&B is a guest here
        log.warning("Weights & Biases was not told of %s version %s: %s", name, version, error)
        return f"{_FAILED}: {error}"


def _link(
    config: WandbConfig,
    mode: str,
    project: str,
    entity: str | None,
    name: str,
    version: str,
    reference: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    import_tracker("wandb")
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    key = config.api_key
    settings = wandb.Settings(
        api_key=None if key is None else key.get_secret_value(),
        init_timeout=config.init_timeout_s,
        login_timeout=config.init_timeout_s,
        finish_timeout=config.finish_timeout_s,
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
    )
    flat = re.sub(r"[^\w.-]", "-", name)
    with wandb.init(
        mode=mode,  # type: ignore[arg-type]
        project=project,
        entity=entity,
        job_type="register",
        name=f"{flat} version {version}",
        dir=str(folder),
        settings=settings,
    ) as run:
        artifact = wandb.Artifact(flat, type="model", metadata=dict(facts))
        artifact.add_reference(reference, name="model", checksum=False)
        logged = run.log_artifact(artifact, aliases=[f"v{version}"] if mode == "offline" else None)
        if mode == "offline":
            return "left for sync"
        logged.wait()
        run.link_artifact(logged, f"{_COLLECTION}/{flat}", aliases=[f"mlflow-{version}"])
    return "linked"
