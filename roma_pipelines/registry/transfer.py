"""From one registry to another, such as development to production, with checksums on both sides.

MLflow copies versions inside one registry only. Here the files are downloaded and verified, logged
as a model of the other server, registered there with all tags, and downloaded from there and
verified once more before the version is named to anybody.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from roma_core.credentials import without_credentials
from roma_core.serving.fetching import MANIFEST_TAG, ModelVersion, fetch, resolve
from roma_pipelines.registry.lock import model_lock
from roma_pipelines.registry.promotion import NO_CHAMPION
from roma_pipelines.registry.runs import ensure_experiment
from roma_pipelines.registry.versions import (
    CANDIDATE,
    COMPARED_TAG,
    ENCODER_TAG,
    create_model,
    version_at,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

ORIGIN_TAG = "roma.copied_from"


def transfer(source: MlflowClient, target: MlflowClient, uri: str, experiment: str) -> str:
    """Copy a version to another registry, as its candidate; the version there.

    A version that is there already, by the sha256 of its manifest, is not copied again.

    Args:
        uri: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS`` of the source.
        experiment: of the target; holds the logged model.

    Raises:
        FetchError: the version is not in the source, or files differ from their checksums on either
            side.
    """
    version = resolve(source, uri)
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(source, version, Path(scratch) / "from")
        with model_lock(target, version.name):
            there = _with_manifest(target, version.name, version.manifest_sha256)
            if there is None:
                there = _create(source, target, version, folder, experiment)
        copied = resolve(target, f"models:/{version.name}/{there}")
        fetch(target, copied, Path(scratch) / "to")
        with model_lock(target, version.name):
            newest = version_at(target, version.name, CANDIDATE)
            if newest is None or int(newest) < int(there):
                target.set_registered_model_alias(version.name, CANDIDATE, there)
    return there


def _create(
    source: MlflowClient,
    target: MlflowClient,
    version: ModelVersion,
    folder: Path,
    experiment: str,
) -> str:
    experiment_id = ensure_experiment(target, experiment).experiment_id
    logged = target.create_logged_model(experiment_id, name=version.name.replace("/", "-"))
    target.log_model_artifacts(logged.model_id, str(folder))
    target.finalize_logged_model(logged.model_id, "READY")
    create_model(target, version.name)
    described = source.get_model_version(version.name, version.version).description
    created = target.create_model_version(
        version.name,
        f"models:/{logged.model_id}",
        tags=_tags_there(source, target, version),
        description=described or None,
        model_id=logged.model_id,
    )
    return str(created.version)


def _tags_there(
    source: MlflowClient, target: MlflowClient, version: ModelVersion
) -> dict[str, str]:
    """The tags, with the champion it was compared with as the target counts its versions.

    The encoder stays behind; its version's number means nothing there.
    """
    tags = {k: v for k, v in version.tags.items() if k != ENCODER_TAG}
    tags[ORIGIN_TAG] = f"{without_credentials(source.tracking_uri)} {version.uri}"
    compared = tags.get(COMPARED_TAG, NO_CHAMPION)
    if compared != NO_CHAMPION:
        before = resolve(source, f"models:/{version.name}/{compared}")
        there = _with_manifest(target, version.name, before.manifest_sha256)
        tags[COMPARED_TAG] = there or f"a version that is not here ({before.uri} of the origin)"
    return tags


def _with_manifest(client: MlflowClient, name: str, manifest_sha256: str | None) -> str | None:
    found = client.search_model_versions(
        f"name = '{name}' AND tags.`{MANIFEST_TAG}` = '{manifest_sha256}'"
    )
    return min((str(v.version) for v in found), key=int, default=None)
