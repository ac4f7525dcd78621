"""Registered versions: a package folder becomes one logged model and one version, once per job."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from roma_core.files import sha256_of
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name
from roma_pipelines.registry.store import one_at_a_time

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
RUN_ID_TAG = "roma.run_id"
MANIFEST_TAG = "roma.manifest_sha256"
EVIDENCE_TAGS = (
    "roma.dataset_digest",
    "roma.config_digest",
    "roma.git_sha",
    "roma.dagster_run_id",
)
"""What every version must say of itself, beside its run, its job and its manifest."""

_REQUIREMENTS = ("mlflow", "numpy", "pydantic", "torch")


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
    at most a logged model, which the next call takes up.

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
    }
    with one_at_a_time(client):
        version = _find_version(client, name, job_key)
        if version is None:
            model_id = _find_logged_model(client, run_id, job_key)
            if model_id is None:
                model_id = _log_model(client, package_folder, name, job_key, run_id, metrics)
            version = _create_version(client, name, model_id, run_id, evidence)
        newest = version_at(client, name, CANDIDATE)
        if newest is None or int(newest) < int(version):
            client.set_registered_model_alias(name, CANDIDATE, version)
    return version


def version_at(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias points to, None if the model or the alias does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def requirements() -> list[str]:
    """What the logged model needs, pinned to what is installed here, without build suffixes."""
    versions = {name: importlib.metadata.version(name) for name in _REQUIREMENTS}
    return [f"{name}=={version.partition('+')[0]}" for name, version in versions.items()]


def _find_version(client: MlflowClient, name: str, job_key: str) -> str | None:
    found = client.search_model_versions(f"name = '{name}' AND tags.`{JOB_KEY_TAG}` = '{job_key}'")
    return min((str(v.version) for v in found), key=int, default=None)


def _find_logged_model(client: MlflowClient, run_id: str, job_key: str) -> str | None:
    experiment_id = client.get_run(run_id).info.experiment_id
    found = client.search_logged_models([experiment_id], f"tags.`{JOB_KEY_TAG}` = '{job_key}'")
    return next((m.model_id for m in found if m.status == "READY"), None)


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

    import roma_core.serving

    mlflow.set_tracking_uri(client.tracking_uri)
    logged = client.create_logged_model(
        client.get_run(run_id).info.experiment_id,
        name=name.replace("/", "-"),  # MLflow takes no path here
        source_run_id=run_id,
        tags={JOB_KEY_TAG: job_key},
    )
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    mlflow.log_metrics(dict(metrics), run_id=run_id, model_id=logged.model_id)
    mlflow.pyfunc.log_model(
        name=logged.name,
        model_id=logged.model_id,
        python_model=str(Path(roma_core.serving.__path__[0]) / "logged_model.py"),
        artifacts={"package": str(package_folder)},
        pip_requirements=requirements(),
    )
    return logged.model_id


def _create_version(
    client: MlflowClient, name: str, model_id: str, run_id: str, tags: Mapping[str, str]
) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"models:/{model_id}"
    created = client.create_model_version(name, source, run_id, dict(tags), model_id=model_id)
    return str(created.version)
