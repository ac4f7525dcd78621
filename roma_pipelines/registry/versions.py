"""Registered versions: a package folder becomes one logged model and one version, once per job."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roma_core.files import read_json, sha256_of
from roma_core.serving.package import MODEL_CODE, locked, requirements
from roma_core.serving.registry_client import CODE_TAG, MANIFEST_TAG
from roma_core.settings import without_credentials
from roma_pipelines.registry import store
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name
from roma_pipelines.storage import connection

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CANDIDATE = "candidate"
RUN_ID_TAG = "roma.run_id"
COMPARED_TAG = "roma.compared_with"
ENCODER_TAG = "roma.encoder_version"
RUN_CONFIG_TAG = "roma.run_config"
"""Of a run and of a version, JSON: what the Dagster run changed in the experiment."""
EVIDENCE_TAGS = ("roma.dataset_digest", "roma.config_digest", "roma.git_sha", "roma.dagster_run_id")
"""Tags that every version must have, beside its run, its job and its checksums."""
_SEARCH = "/api/2.0/mlflow/registered-models/search?max_results=1000"
_ALIASES = "SELECT name, alias, version FROM registered_model_aliases"  # of MLflow's schema
_NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def register(
    client: MlflowClient,
    package_folder: Path,
    name: str,
    job_key: str,
    run_id: str,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> str:
    """Log the package as a model, register it, and set the alias ``candidate``.

    Repeated for the same job, it returns the existing version; after a crash it continues with the
    logged model that is there. The model card becomes the version's description; ``metrics`` are
    logged to the run and to the logged model; ``tags`` hold all of ``EVIDENCE_TAGS``, or ValueError
    is raised, and any others.
    """
    checked_name("job key", job_key)
    checked_name("model", name)
    if missing := [tag for tag in EVIDENCE_TAGS if tag not in tags]:
        raise ValueError(f"version tags lack {missing}, which record the origin of every version")
    all_tags = {
        **tags,
        JOB_KEY_TAG: job_key,
        RUN_ID_TAG: run_id,
        MANIFEST_TAG: sha256_of(package_folder / "MANIFEST.json"),
        CODE_TAG: sha256_of(MODEL_CODE),
    }
    # not the model's lock: an upload takes longer than that may be held
    with store.write_lock(client):
        experiment_id = client.get_run(run_id).info.experiment_id
        wanted = f"tags.`{JOB_KEY_TAG}` = '{job_key}' AND name = '{name}'"
        found = client.search_logged_models([experiment_id], wanted)
        model_id = next((m.model_id for m in found if m.status == "READY"), None)
        if model_id is None:
            model_id = _log_model(client, package_folder, name, job_key, run_id, metrics)
    with store.model_lock(client, name) as lock:
        version = find_tagged(client, name, JOB_KEY_TAG, job_key)
        if version is None:
            card = (package_folder / "MODEL_CARD.md").read_text(encoding="utf-8")
            version = create_version(client, name, model_id, run_id, all_tags, card)
        set_candidate(lock, name, version)
    return version


def set_candidate(lock: store.ModelLock, name: str, version: str) -> None:
    """Move the alias ``candidate`` to a version, unless a newer one has it."""
    newest = version_at(lock.client, name, CANDIDATE)
    if newest is None or int(newest) < int(version):
        lock.set_alias(name, CANDIDATE, version)


def encoder_name(name: str) -> str:
    """Registered name of the encoder that belongs to a finetuned model."""
    return f"{name}_encoder"


def version_at(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that an alias points to; None if the model or the alias does not exist."""
    found = aliased_version(client, name, alias)
    return None if found is None else str(found.version)


def aliased_version(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """As ``version_at``, with all that the registry knows of the version."""
    return _unless_missing(client.get_model_version_by_alias, name, alias)


def aliases_without_mlflow(settings: store.MlflowSettings, root: Path) -> dict[str, dict[str, str]]:
    """Model -> alias -> version, from the server's REST API or the own store's table.

    MLflow's client takes two seconds to import. Empty if the own store does not exist yet. Raises
    StoreError or StorageError if the registry cannot be read.
    """
    uri = settings.registry_uri or store.tracking_uri(settings, root)
    rows: list[tuple[str, str, Any]] = []
    if store.is_server(uri):
        store.export_credentials(settings)
        answer = store.ask(uri.rstrip("/"), _SEARCH, timeout_s=2.0)
        found_type = "" if answer is None else answer.headers.get("Content-Type", "")
        if answer is None or not answer.ok or "json" not in found_type:  # a page of a proxy
            shown = without_credentials(uri)
            raise store.StoreError(f"MLflow does not answer at {shown}; check that it runs")
        for model in answer.json().get("registered_models", []):
            rows += [(model["name"], a["alias"], a["version"]) for a in model.get("aliases", [])]
    elif (folder := store.embedded_root(uri)) is None:
        with connection(uri) as session, session.cursor() as cursor:
            cursor.execute(_ALIASES)
            rows = cursor.fetchall()
    elif (database := folder / store.DATABASE).exists():
        try:
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as file:
                rows = file.execute(_ALIASES).fetchall()
        except sqlite3.Error as error:
            text = f"{database}: {error}; `roma-pipeline health` says more"
            raise store.StoreError(text) from error
    found: dict[str, dict[str, str]] = {}
    for name, alias, version in rows:
        found.setdefault(name, {})[alias] = str(version)
    return found


def find_version(client: MlflowClient, name: str, version: str) -> ModelVersion | None:
    """The registered version; None if there is none."""
    return _unless_missing(client.get_model_version, name, version)


def _unless_missing(get: Callable[[str, str], ModelVersion], *key: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return get(*key)
    except MlflowException as error:
        if error.error_code in _NOT_FOUND:
            return None
        raise


def get_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """The registered version; ValueError if there is none."""
    found = find_version(client, name, version)
    if found is None:
        known = client.search_model_versions(f"name = '{name}'")
        there = ", ".join(str(one.version) for one in known) or "none"
        raise ValueError(f"model {name!r} has no version {version!r}; there are: {there}")
    return found


def find_tagged(client: MlflowClient, name: str, tag: str, value: str | None) -> str | None:
    """The first version of a model with a tag of that value."""
    found = client.search_model_versions(f"name = '{name}' AND tags.`{tag}` = '{value}'")
    return min((str(v.version) for v in found), key=int, default=None)


def create_version(
    client: MlflowClient,
    name: str,
    model_id: str,
    run_id: str | None,
    tags: Mapping[str, str],
    description: str | None,
) -> str:
    """Register a logged model; the registered model is created if missing."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    created = client.create_model_version(
        name,
        f"models:/{model_id}",
        run_id,
        dict(tags),
        description=description or None,
        model_id=model_id,
    )
    return str(created.version)


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
        name=name,
        source_run_id=run_id,
        tags={JOB_KEY_TAG: job_key},
    )
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    mlflow.log_metrics(dict(metrics), run_id=run_id, model_id=logged.model_id)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(locked()) + "\n")
        package = Path(folder) / "package"  # MLflow stores an artifact under its folder's name
        shutil.copytree(package_folder, package)
        about = read_json(package / "package.json")
        mlflow.pyfunc.log_model(
            name=logged.name,
            model_id=logged.model_id,
            python_model=str(MODEL_CODE),
            model_config={
                "kind": about["kind"],
                "per_observation": about.get("per_observation", False),
            },
            artifacts={"package": str(package)},
            pip_requirements=[*requirements(), f"-c {constraints}"],
        )
    return logged.model_id
