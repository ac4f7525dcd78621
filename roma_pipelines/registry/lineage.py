"""Lineage of registered versions: trace, replay, and transfer to another registry.

version → MLflow run → Dagster run → jobs → data-set version → commit → lock
any of these identifiers, or a prefix of it → versions
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
from roma_core.serving.package import lock_hash
from roma_core.serving.registry_client import MANIFEST_TAG, ModelVersion, fetch, resolve
from roma_core.settings import without_credentials
from roma_pipelines.registry import versions
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.promotion import NO_CHAMPION, audit
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name, code_version, ensure_experiment
from roma_pipelines.registry.store import model_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

ORIGIN_TAG = "roma.copied_from"
_STAGES = {
    "pretrain": "roma.pretraining_job",
    "finetune": "roma.finetuning_job",
    "evaluate": "roma.evaluation_job",
}
_STARTED_FROM = "roma.started_from"
_IDENTIFIERS = {
    "MLflow run": versions.RUN_ID_TAG,
    "Dagster run": "roma.dagster_run_id",
    "evaluation job": _STAGES["evaluate"],
    "finetuning job": _STAGES["finetune"],
    "pretraining job": _STAGES["pretrain"],
    "started from the finetuning job": _STARTED_FROM,
    "data set": "roma.dataset_digest",
    "configuration": "roma.config_digest",
    "commit": "roma.git_sha",
    "lock": "roma.lock_hash",
    "package": MANIFEST_TAG,
}
_MIN_PREFIX = 6  # characters; shorter prefixes match by chance


@dataclass(frozen=True)
class Lineage:
    """Recorded origin of one version, and the decisions about it."""

    name: str
    version: str
    facts: dict[str, str]
    decisions: list[str]


def lineage_of(client: MlflowClient, uri: str) -> Lineage:
    """The origin of ``models:/NAME@ALIAS``, ``NAME@ALIAS`` or ``NAME/VERSION``, or FetchError."""
    found = resolve(client, uri if uri.startswith("models:/") else f"models:/{uri}")
    aliases = client.get_model_version(found.name, found.version).aliases
    tags = found.tags
    facts = {
        "aliases": ", ".join(sorted(aliases)) or "none",
        **{what: tags[tag] for what, tag in _IDENTIFIERS.items() if tag in tags},
        "gate": f"{tags.get(GATE_TAG, 'not run')}, against champion {tags.get(versions.COMPARED_TAG, '?')}",
    }
    if versions.RUN_CONFIG_TAG in tags:
        facts["run config"] = tags[versions.RUN_CONFIG_TAG]
    if versions.ENCODER_TAG in tags:
        facts["encoder"] = f"version {tags[versions.ENCODER_TAG]}"
    decisions = [
        f"{e.at} {e.action} by {e.actor}: {e.reason}"
        for e in audit(client, found.name)
        if found.version in (e.version, e.replaced)
    ]
    return Lineage(found.name, found.version, facts, decisions)


def versions_from(client: MlflowClient, identifier: str) -> list[tuple[str, str, str]]:
    """Name, version and matching identifier of all versions that have one with this prefix, the
    most recently updated first; ValueError if the prefix is too short.
    """
    if len(identifier) < _MIN_PREFIX:
        raise ValueError(
            f"{identifier!r}: at least {_MIN_PREFIX} characters of a job key, run id, data-set "
            f"version, commit or package are needed"
        )
    found = client.search_model_versions(order_by=["last_updated_timestamp DESC"])
    return [
        (v.name, str(v.version), what)
        for v in found
        for what, tag in _IDENTIFIERS.items()
        if v.tags.get(tag, "").startswith(identifier)
    ]


@dataclass(frozen=True)
class Replay:
    """Job folders that are ready to run, and what differs from the recorded trainings."""

    folders: dict[str, Path]
    commands: tuple[str, ...]
    differences: tuple[str, ...]


def plan_replay(
    client: MlflowClient, name: str, version: str, run_dir: Path, datasets: Path
) -> Replay:
    """Write the job folders of a version's trainings and evaluation to ``run_dir``; run nothing.

    ``datasets`` is the folder of data sets, ``NAME/VERSION/`` each. Raises FetchError without such
    a version; ValueError if it does not record its jobs, ``run_dir`` is not empty, or a run, data
    set or champion that it started from no longer exists.
    """
    from roma_core.evaluation.leakage import training_datasets

    tags = resolve(client, f"models:/{name}/{version}").tags
    stages = dict(_STAGES)
    if versions.ENCODER_TAG not in tags and stages["finetune"] not in tags:
        del stages["finetune"]  # an autoencoder has no encoder of its own
    elif stages["finetune"] in tags and stages["pretrain"] not in tags:
        del stages["pretrain"]  # it was trained from new weights
    if missing := [tag for tag in stages.values() if tag not in tags]:
        raise ValueError(f"version {version} of {name!r} has no {', '.join(missing)} to replay")
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ValueError(f"{run_dir} is not empty; give another folder with --run-dir")
    configs = {stage: _config_of(client, name, tags[tag]) for stage, tag in stages.items()}
    folders = {stage: (run_dir / stage).absolute() for stage in stages}
    for config in configs.values():  # encoder and classifier may be of different data
        recorded, digest = config["dataset"], config["dataset_digest"]
        for folder in (Path(recorded), *datasets.glob(f"*/{digest[:8]}*")):
            manifest = folder / MANIFEST
            if manifest.is_file() and read_json(manifest).get("digest") == digest:
                config["dataset"] = str(folder.absolute())
                break
        else:
            raise ValueError(
                f"the data set of version {digest[:16]} is neither in {recorded} nor under "
                f"{datasets}; build it again: equal input gives an equal version"
            )
    weights = {stage: str(folder / "outputs" / "model") for stage, folder in folders.items()}
    if "finetune" in stages and _STARTED_FROM not in tags:
        # else from the champion of that time, which is not trained again
        configs["finetune"]["weights"] = weights.get("pretrain")
    elif "finetune" in stages and not Path(start := configs["finetune"]["weights"]).exists():
        raise ValueError(
            f"the finetuning started from the champion of that time, whose weights are not in {start}; restore "
            f"that job there"
        )
    trainings = [stage for stage in stages if stage != "evaluate"]
    trained_on = [configs[stage]["dataset"] for stage in trainings]
    if _STARTED_FROM in tags:  # and on what that champion, and the one before it, had learned from
        trained_on += map(str, training_datasets(Path(configs["finetune"]["weights"])))
    names = {"pretrain": "pretraining", "finetune": "finetuning"}
    configs["evaluate"] |= {
        "classifier": weights.get("finetune"),
        "autoencoder": weights.get("pretrain"),
        "champion": None,
        "champion_version": None,
        "champion_problem": None,
        "trained_on": list(dict.fromkeys(trained_on)),
        "curves": {names[stage]: str(folders[stage] / "metrics.jsonl") for stage in trainings},
    }
    for stage, folder in folders.items():
        folder.mkdir(parents=True)
        write_json(folder / "config.json", configs[stage])
    commands = [f"roma {stage} --job {shlex.quote(str(f))}" for stage, f in folders.items()]
    differences = []  # what may lead to other numbers
    if (then := tags.get("roma.git_sha", "")) != (now := code_version()):
        differences.append(f"the code was {then}, here it is {now}")
    if then.endswith("-dirty"):
        differences.append("the code had uncommitted changes")
    if (lock := tags.get("roma.lock_hash", "")) != lock_hash():
        differences.append(f"packages had lock {lock[:12]}, here it is {lock_hash()[:12]}")
    return Replay(folders, tuple(commands), tuple(differences))


def _config_of(client: MlflowClient, name: str, job_key: str) -> dict[str, Any]:
    """``config.json`` of a job, from the artifacts of its run."""
    from mlflow.artifacts import load_text
    from mlflow.exceptions import MlflowException

    checked_name("job key", job_key)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{JOB_KEY_TAG}` = '{job_key}'")
    if not runs:
        raise ValueError(f"there is no MLflow run of job {job_key}, which made {name!r}")
    try:
        return json.loads(load_text(f"{runs[0].info.artifact_uri}/config.json"))
    except (MlflowException, OSError) as error:
        raise ValueError(f"run {runs[0].info.run_id} has no config.json: {error}") from error


def transfer(source: MlflowClient, target: MlflowClient, uri: str, experiment: str) -> str:
    """Copy a version to another registry as its candidate; return the version there.

    A version with the same manifest that is there already is not copied again. ``uri`` is of the
    source; ``experiment`` of the target holds the logged model. Raises FetchError if the source has
    no such version, or files differ from their checksums on either side.
    """
    version = resolve(source, uri)
    name = version.name
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetch(source, version, Path(scratch) / "from")
        copied = versions.find_tagged(target, name, MANIFEST_TAG, version.manifest_sha256)
        if copied is None:
            experiment_id = ensure_experiment(target, experiment).experiment_id
            model_id = target.create_logged_model(experiment_id, name=name).model_id
            target.log_model_artifacts(model_id, str(folder))  # longer than a lock may be held
            target.finalize_logged_model(model_id, "READY")
            with model_lock(target, name):
                copied = versions.find_tagged(target, name, MANIFEST_TAG, version.manifest_sha256)
                copied = copied or _copy(source, target, version, model_id)
        fetch(target, resolve(target, f"models:/{name}/{copied}"), Path(scratch) / "to")
        with model_lock(target, name) as lock:
            versions.set_candidate(lock, name, copied)
    return copied


def _copy(source: MlflowClient, target: MlflowClient, version: ModelVersion, model_id: str) -> str:
    name = version.name
    # the encoder is not copied, and its version number means nothing in the target
    tags = {k: v for k, v in version.tags.items() if k != versions.ENCODER_TAG}
    tags[ORIGIN_TAG] = f"{without_credentials(source.tracking_uri)} {version.uri}"
    compared = tags.get(versions.COMPARED_TAG, NO_CHAMPION)
    if compared != NO_CHAMPION:  # as the target numbers that version
        champion = resolve(source, f"models:/{name}/{compared}")
        number = versions.find_tagged(target, name, MANIFEST_TAG, champion.manifest_sha256)
        tags[versions.COMPARED_TAG] = (
            number or f"a version that is not here ({champion.uri} of the origin)"
        )
    description = source.get_model_version(name, version.version).description
    return versions.create_version(target, name, model_id, None, tags, description)
