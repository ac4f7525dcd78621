"""Plan the training of a registered version again, from what the registry and its runs recorded.

The configurations of pretraining, finetuning and the evaluation come from the MLflow runs of the
version, so neither the job folders nor the experiment's file of that time are needed. They are
written as job folders; the commands run them in order.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roma_core.data.columns import MANIFEST
from roma_core.files import read_json, write_json
from roma_core.serving.fetching import resolve
from roma_core.serving.requirements import lock_hash
from roma_pipelines.provenance import code_version
from roma_pipelines.registry.runs import JOB_KEY_TAG, checked_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
