"""Where a version comes from, and what came of a piece of data, a commit or a job.

Forwards: version → MLflow run → Dagster run → jobs → data-set version → commit → lock. Backwards:
any of these identifiers, or its beginning, → versions.

Plan the training of a registered version again, from what the registry and its runs recorded.
From one registry to another, such as development to production, with checksums on both sides.
"""

from __future__ import annotations

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roma_core.data.manifest import MANIFEST
from roma_core.files import read_json, write_json
from roma_core.serving.registry_client import MANIFEST_TAG, ModelVersion, fetch, resolve
from roma_core.serving.schema import lock_hash
from roma_core.settings import without_credentials
from roma_pipelines.provenance import code_version
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.lock import model_lock
from roma_pipelines.registry.promotion import NO_CHAMPION, audit
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name, ensure_experiment
from roma_pipelines.registry.versions import (
    CANDIDATE,
    COMPARED_TAG,
    ENCODER_TAG,
    RUN_ID_TAG,
    create_model,
    version_at,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_IDENTIFIERS = {
    "MLflow run": RUN_ID_TAG,
    "Dagster run": "roma.dagster_run_id",
    "evaluation job": "roma.evaluation_job",
    "finetuning job": "roma.finetuning_job",
    "pretraining job": "roma.pretraining_job",
    "data set": "roma.dataset_digest",
    "configuration": "roma.config_digest",
    "commit": "roma.git_sha",
    "lock": "roma.lock_hash",
    "package": MANIFEST_TAG,
}
_SHORTEST = 6  # characters of an identifier; less would match by accident


@dataclass(frozen=True)
class Lineage:
    """Everything that is known of one version's origin."""

    name: str
    version: str
    facts: dict[str, str]
    decisions: list[str]

    @property
    def is_dirty(self) -> bool:
        """Whether files differed from the commit."""
        return self.facts.get("commit", "").endswith("-dirty")


def lineage_of(client: MlflowClient, uri: str) -> Lineage:
    """The origin of ``models:/NAME@ALIAS``, ``NAME@ALIAS`` or ``NAME/VERSION``.

    Raises:
        FetchError: there is no such model, alias or version.
    """
    found = resolve(client, uri if uri.startswith("models:/") else f"models:/{uri}")
    version = client.get_model_version(found.name, found.version)
    facts = {what: found.tags[tag] for what, tag in _IDENTIFIERS.items() if tag in found.tags}
    aliases = ", ".join(sorted(version.aliases)) or "none"
    facts = {"aliases": aliases, **facts, "gate": _gate(found.tags)}
    if ENCODER_TAG in found.tags:
        facts["encoder"] = f"version {found.tags[ENCODER_TAG]}"
    decisions = [
        f"{e.at} {e.action} by {e.who}: {e.why}"
        for e in audit(client, found.name)
        if found.version in (e.version, e.replaced)
    ]
    return Lineage(found.name, found.version, facts, decisions)


def _gate(tags: Any) -> str:
    return f"{tags.get(GATE_TAG, 'not asked')}, against champion {tags.get(COMPARED_TAG, '?')}"


def versions_from(client: MlflowClient, identifier: str) -> list[tuple[str, str, str]]:
    """Versions of any model whose origin has an identifier that begins like this.

    Returns:
        Name, version and what the identifier is to it, the newest first.

    Raises:
        ValueError: the identifier is too short to mean one thing.
    """
    if len(identifier) < _SHORTEST:
        raise ValueError(
            f"{identifier!r}: at least {_SHORTEST} characters of a job key, run id, data-set "
            f"version, commit or package are needed"
        )
    versions = client.search_model_versions(order_by=["last_updated_timestamp DESC"])
    return [
        (v.name, str(v.version), what)
        for v in versions
        for what, tag in _IDENTIFIERS.items()
        if v.tags.get(tag, "").startswith(identifier)
    ]


_STAGES = {
    "pretrain": "roma.pretraining_job",
    "finetune": "roma.finetuning_job",
    "evaluate": "roma.evaluation_job",
}


@dataclass(frozen=True)
class Replay:
    """A plan: job folders that are ready to run, and what is different from the first time."""

    name: str
    version: str
    folders: dict[str, Path]
    commands: tuple[str, ...]
    differences: tuple[str, ...]


def plan_replay(client: MlflowClient, name: str, version: str, out: Path, datasets: Path) -> Replay:
    """Write the job folders of a version's trainings to ``out``; nothing is run.

    Args:
        datasets: where data sets are kept here: NAME/VERSION/.

    Raises:
        FetchError: there is no such version.
        ValueError: the version does not say what made it, ``out`` is in use, or a data set is gone.
    """
    tags = resolve(client, f"models:/{name}/{version}").tags
    if missing := [tag for tag in _STAGES.values() if tag not in tags]:
        raise ValueError(f"version {version} of {name!r} has no {', '.join(missing)} to replay")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give another folder with --out")
    configs = {stage: _config_of(client, name, tags[tag]) for stage, tag in _STAGES.items()}
    folders = {stage: (out / stage).absolute() for stage in _STAGES}
    for config in configs.values():  # an encoder may be of other data than its classifier
        data = _dataset(Path(config["dataset"]), config["dataset_digest"], datasets)
        config["dataset"] = str(data)
    configs["finetune"]["weights"] = str(folders["pretrain"] / "outputs" / "model")
    configs["evaluate"] |= {
        "classifier": str(folders["finetune"] / "outputs" / "model"),
        "autoencoder": str(folders["pretrain"] / "outputs" / "model"),
        "champion": None,
        "champion_version": None,
        "champion_problem": None,
        "trained_on": [configs[stage]["dataset"] for stage in ("pretrain", "finetune")],
        "curves": {
            "pretraining": str(folders["pretrain"] / "metrics.jsonl"),
            "finetuning": str(folders["finetune"] / "metrics.jsonl"),
        },
    }
    for stage, folder in folders.items():
        folder.mkdir(parents=True)
        write_json(folder / "config.json", configs[stage])
    commands = [f"roma {stage} --job {shlex.quote(str(f))}" for stage, f in folders.items()]
    return Replay(name, version, folders, tuple(commands), tuple(_differences(tags)))


def _config_of(client: MlflowClient, name: str, job_key: str) -> dict[str, Any]:
    """``config.json`` of a job, from the artifacts of its run."""
    from mlflow.artifacts import load_text
    from mlflow.exceptions import MlflowException

    checked_name("job key", job_key)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{JOB_KEY_TAG}` = '{job_key}'")
    if not runs:
        raise ValueError(f"no MLflow run is left of job {job_key}, which made {name!r}")
    try:
        return json.loads(load_text(f"{runs[0].info.artifact_uri}/config.json"))
    except (MlflowException, OSError) as error:
        raise ValueError(f"run {runs[0].info.run_id} has no config.json: {error}") from error


def _dataset(recorded: Path, digest: str, datasets: Path) -> Path:
    """The folder of a version of the data, where it was or where data sets are kept here."""
    for folder in (recorded, *datasets.glob(f"*/{digest[:8]}*")):
        manifest = folder / MANIFEST
        if manifest.is_file() and read_json(manifest).get("digest") == digest:
            return folder.absolute()
    raise ValueError(
        f"the data set of version {digest[:16]} is neither in {recorded} nor under {datasets}; build "
        f"it again: equal input gives an equal version"
    )


def _differences(tags: Any) -> list[str]:
    """What stands in the way of equal numbers."""
    found = []
    if (then := tags.get("roma.git_sha", "")) != (now := code_version()):
        found.append(f"the code was {then}, here it is {now}")
    if then.endswith("-dirty"):
        found.append("the code had changes that no commit has")
    if (lock := tags.get("roma.lock_hash", "")) != lock_hash():
        found.append(f"packages had lock {lock[:12]}, here it is {lock_hash()[:12]}")
    return found


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
