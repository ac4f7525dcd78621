"""MLflow runs of jobs: one per job, found by the tag ``roma.job_key``, ended explicitly.

MLflow's own hooks mark crashed and preempted runs as finished and cannot find a run again.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from roma_core.settings import without_credentials
from roma_core.trainer.trackers import WandbConfig, import_tracker, wandb_settings
from roma_pipelines.registry.store import artifacts_root, write_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

JOB_KEY_TAG = "roma.job_key"
WANDB_TAG = "roma.weights_and_biases"
"""Tag of a version that was linked at W&B; its value is what ``link_wandb`` returned."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]
_PARAMS_PER_BATCH = 100  # MLflow's limit
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


def code_version() -> str:
    """The git commit, with ``-dirty`` if files differ from it.

    An installed package names the one it was built from; without it and without git: the release.
    """
    package = Path(__file__).parents[1]
    if (baked := package / "COMMIT").exists():
        return baked.read_text(encoding="utf-8").strip()
    # beside an installed package, git would describe the repository that its environment is in
    if (package.parent / "pyproject.toml").exists() and shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        described = subprocess.run(command, cwd=package, capture_output=True, text=True)
        if described.returncode == 0 and described.stdout.strip():
            return described.stdout.strip()
    return f"release {importlib.metadata.version('roma-pipeline')}"


def find_or_create_run(
    client: MlflowClient,
    experiment: str,
    job_key: str,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> str:
    """Id of the job's run, set to RUNNING: the one with its key, or else a new one.

    Parameters cannot change in MLflow. An existing run keeps its own; missing ones are added, and
    those that differ are listed in a warning. ``experiment`` is created if missing.

    Raises:
        ValueError: an experiment or key that MLflow's filters cannot express.
        RuntimeError: the experiment was deleted.
    """
    from mlflow.entities import Param

    checked_name("job key", job_key)
    with write_lock(client):
        experiment_id = ensure_experiment(client, experiment).experiment_id
        runs = client.search_runs(
            [experiment_id], f"tags.`{JOB_KEY_TAG}` = '{job_key}'", order_by=["start_time ASC"]
        )
        run = (
            runs[0]
            if runs
            else client.create_run(
                experiment_id, run_name=name, tags={**tags, JOB_KEY_TAG: job_key}
            )
        )
        run_id = run.info.run_id
        wanted = {k: str(v) for k, v in params.items()}
        present = run.data.params
        if changed := {k: (present[k], v) for k, v in wanted.items() if present.get(k, v) != v}:
            _log.warning("run %s keeps its first parameters; these differ now: %s", run_id, changed)
        missing = [Param(k, v) for k, v in wanted.items() if k not in present]
        for start in range(0, len(missing), _PARAMS_PER_BATCH):
            client.log_batch(run_id, params=missing[start : start + _PARAMS_PER_BATCH])
        if run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
    return run_id


def end_run(client: MlflowClient, run_id: str, status: FinalStatus) -> None:
    """Set the final status of a run."""
    client.set_terminated(run_id, status)


def end_runs_of_job(client: MlflowClient, job_key: str, status: FinalStatus) -> None:
    """Set the final status of a job's runs that are still RUNNING."""
    checked_name("job key", job_key)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    running = f"tags.`{JOB_KEY_TAG}` = '{job_key}' and attributes.status = 'RUNNING'"
    for run in client.search_runs(experiments, running):
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
        # without a location, MLflow would store artifacts under the present working directory
        location = None if root is None else (root / name.replace("/", "__")).as_uri()
        return client.get_experiment(client.create_experiment(name, location))
    if found.lifecycle_stage == "deleted":
        raise RuntimeError(
            f"the MLflow experiment {name!r} was deleted; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or use another name"
        )
    return found


def link_wandb(
    client: MlflowClient,
    config: WandbConfig,
    trainer: Mapping[str, Any],
    name: str,
    version: str,
    facts: Mapping[str, Any],
    folder: Path,
) -> str:
    """Link a registered version at W&B, in the project of its training, unless done before.

    ``trainer`` are the settings of the training, ``facts`` the artifact's metadata (plain JSON), and
    ``folder`` holds W&B's own files. Returns ``off``, ``linked``, ``left for sync`` (offline), or
    ``failed: …``: an error of W&B ends nothing, and the next call tries again.
    """
    if (done := client.get_model_version(name, version).tags.get(WANDB_TAG)) is not None:
        return done
    mode = config.effective_mode
    if mode == "disabled":
        return "off"
    facts = {"mlflow_tracking_uri": without_credentials(client.tracking_uri), **facts}
    try:
        import_tracker("wandb")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        with wandb.init(
            mode=mode,
            project=trainer["project_name"],
            entity=trainer["entity_name"],
            job_type="register",
            name=f"{name} version {version}",
            dir=str(folder),
            settings=wandb_settings(config),
        ) as run:
            artifact = wandb.Artifact(name, type="model", metadata=dict(facts))
            # W&B shows the reference and does not follow it
            artifact.add_reference(f"models:/{name}/{version}", name="model", checksum=False)
            aliases = [f"v{version}"] if mode == "offline" else None
            logged = run.log_artifact(artifact, aliases=aliases)
            if mode == "online":
                logged.wait()
                collection = f"wandb-registry-model/{name}"
                run.link_artifact(logged, collection, aliases=[f"mlflow-{version}"])
    except Exception as error:  # whatever W&B raises
        _log.warning("%s version %s was not linked at W&B: %s", name, version, error)
        return f"failed: {error}"
    done = "linked" if mode == "online" else "left for sync"
    client.set_model_version_tag(name, version, WANDB_TAG, done)
    return done
