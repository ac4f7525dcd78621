"""Registered versions: a package folder becomes one logged model and one version, once per job."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from roma_core.files import read_json, sha256_of
from roma_core.serving.registry_client import CODE_TAG, MANIFEST_TAG
from roma_core.serving.schema import locked, requirements
from roma_pipelines.registry.lock import model_lock
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name
from roma_pipelines.registry.store import one_at_a_time

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CARD = "MODEL_CARD.md"
RUN_ID_TAG = "roma.run_id"
COMPARED_TAG = "roma.compared_with"
ENCODER_TAG = "roma.encoder_version"
EVIDENCE_TAGS = (
    "roma.dataset_digest",
    "roma.config_digest",
    "roma.git_sha",
    "roma.dagster_run_id",
)
"""What every version must say of itself, beside its run, its job and its manifest."""


def register(
    client: MlflowClient,
    package_folder: Path,
    name: str,
    job_key: str,
    run_id: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> str:
    """Log the package as a model, register it, and call it ``candidate``.

    Asked again for the same job, it returns the version that is there. A crash in between leaves
    at most a logged model, which the next call takes up. The package's model card becomes the
    version's description.

    Args:
        package_folder: written by ``roma_core.serving.package``; verified by who built it.
        tags: evidence, all of ``EVIDENCE_TAGS`` and any others.
        metrics: of the evaluation; they stand at the run and at the logged model.

    Returns:
        The version, a number as text.

    Raises:
        ValueError: evidence is missing, or a name cannot be used.
    """
    checked_name("job key", job_key)
    checked_name("model", name)
    if missing := [tag for tag in EVIDENCE_TAGS if tag not in tags]:
        raise ValueError(f"version tags lack {missing}; every version says where it comes from")
    evidence = {
        **tags,
        JOB_KEY_TAG: job_key,
        RUN_ID_TAG: run_id,
        MANIFEST_TAG: sha256_of(package_folder / "MANIFEST.json"),
        CODE_TAG: sha256_of(logged_file()),
    }
    with one_at_a_time(client):  # an upload takes too long to hold the lock of the model
        model_id = _find_logged_model(client, run_id, job_key, name)
        if model_id is None:
            model_id = _log_model(client, package_folder, name, job_key, run_id, metrics)
    with model_lock(client, name):
        version = _find_version(client, name, job_key)
        if version is None:
            version = _create_version(client, name, model_id, run_id, evidence)
            card = package_folder / CARD
            if card.is_file():
                client.update_model_version(name, version, card.read_text(encoding="utf-8"))
        newest = version_at(client, name, CANDIDATE)
        if newest is None or int(newest) < int(version):
            client.set_registered_model_alias(name, CANDIDATE, version)
    return version


def encoder_name(name: str) -> str:
    """Registered name of the encoder that goes with a classifier."""
    return f"{name}_encoder"


def version_at(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias points to, None if the model or the alias does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def logged_file() -> Path:
    """The one file of code that travels with a model."""
    import roma_core.serving

    return Path(roma_core.serving.__path__[0]) / "logged_model.py"


def _find_version(client: MlflowClient, name: str, job_key: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' AND tags.`{JOB_KEY_TAG}` = '{job_key}'")
    return min((str(v.version) for v in found), key=int, default=None)


def _find_logged_model(client: MlflowClient, run_id: str, job_key: str, name: str) -> str | None:
    experiment_id = client.get_run(run_id).info.experiment_id
    wanted = f"tags.`{JOB_KEY_TAG}` = '{job_key}' AND name = '{_flat(name)}'"
    found = client.search_logged_models([experiment_id], wanted)
    return next((m.model_id for m in found if m.status == "READY"), None)


def _flat(name: str) -> str:
    return name.replace("/", "-")  # a logged model's name is no path


def _log_model(
    client: MlflowClient,
    package_folder: Path,
    name: str,
    job_key: str,
    run_id: str,
    metrics: Mapping[str, float],
) -> str:
    import mlflow
    from mlflow.entities import LoggedModelOutput

    mlflow.set_tracking_uri(client.tracking_uri)
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=_flat(name),
        source_run_id=run_id,
        tags={JOB_KEY_TAG: job_key},
    )
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    mlflow.log_metrics(dict(metrics), run_id=run_id, model_id=logged.model_id)
    kind = read_json(package_folder / "package.json").get("kind", "classifier")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(locked()) + "\n")
        package = Path(folder) / "package"  # a model's files lie under the name of their folder
        shutil.copytree(package_folder, package)
        mlflow.pyfunc.log_model(
            name=logged.name,
            model_id=logged.model_id,
            python_model=str(logged_file()),
            model_config={"kind": kind},
            artifacts={"package": str(package)},
            pip_requirements=[*requirements(), f"-c {constraints}"],
        )
    return logged.model_id


def create_model(client: MlflowClient, name: str) -> None:
    """Make the registered model, if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _create_version(
    client: MlflowClient, name: str, model_id: str, run_id: str, tags: Mapping[str, str]
) -> str:
    create_model(client, name)
    source = f"models:/{model_id}"
    created = client.create_model_version(name, source, run_id, dict(tags), model_id=model_id)
    return str(created.version)
