"""One cell of the results: data set → pretraining → finetuning → evaluation → a record.

The three jobs go through the launching layer, so a cell that was interrupted goes on where it was,
on this computer or on a cluster. Nothing of it enters the registry. A job's key is a hash of the cell
and the job's configuration: what is done already under the same settings is found again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.building import build_dataset
from roma_core.data.columns import read_manifest
from roma_core.data.schema import Manifest
from roma_core.evaluation.job_config import EvaluationJobConfig
from roma_core.files import digest_of, read_json, write_json
from roma_core.job import JobFolder, Result
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job_config import TrainingJobConfig
from roma_core.trainer.sizing import TOKENS_PER_S
from roma_pipelines.experiment import Experiment, Resources, Stage
from roma_pipelines.launching.job import JobState, job_key
from roma_pipelines.launching.supervisor import supervise
from roma_pipelines.provenance import code_version
from roma_pipelines.results.rows import Cell
from roma_pipelines.storage import Storage
from roma_pipelines.targets import job_spec, launcher_for, roma_command


class Record(BaseModel):
    """What a cell came to; ``results/<row>/<share>/<seed>.json`` under the storage root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    cell: Cell
    metrics: dict[str, float] = Field(description="On the test split.")
    n_test: int
    seconds: dict[str, float] = Field(description="Training time by job.")
    device: str
    dataset_digest: str
    settings_digest: str = Field(description="Of everything that decides the cell.")
    code: str
    finished_at: float


Told = Callable[[str], None]


def record_path(storage: Storage, cell: Cell) -> Path:
    return storage.root / "results" / cell.row / f"{cell.drop_rate:g}" / f"{cell.seed}.json"


def read_record(storage: Storage, cell: Cell) -> Record | None:
    """What was found for this cell, under whatever settings; None if it was never run."""
    path = record_path(storage, cell)
    return Record.model_validate(read_json(path)) if path.exists() else None


def settings_digest(experiment: Experiment, cell: Cell) -> str:
    """A cell with another one is out of date."""
    decide = experiment.model_dump(mode="json", include={"dataset", "pretraining", "finetuning"})
    return digest_of([decide, cell.drop_rate, cell.seed])[:16]


def expected_s(experiment: Experiment, cell: Cell, storage: Storage) -> float:
    """About how long a cell takes: as another seed did, else by the data it shows the model.

    The data set is built for it if need be.

    Raises:
        DataError: that fails.
    """
    for path in sorted(record_path(storage, cell).parent.glob("*.json")):
        return sum(Record.model_validate(read_json(path)).seconds.values())
    counts = read_manifest(_built(experiment, cell, storage)).counts["train"]
    stages = (experiment.pretraining, experiment.finetuning)
    epochs = sum(_trainer(stage, cell).epochs for stage in stages)
    return epochs * counts.n_observations / TOKENS_PER_S


def run_cell(
    experiment: Experiment, cell: Cell, resources: Resources, storage: Storage, told: Told
) -> Record:
    """Run what is missing of a cell and write its record.

    Raises:
        JobFailed: a job failed; the text has the end of its log.
        Refused: the target will not run one.
        DataError: the data set cannot be built.
    """
    data = _built(experiment, cell, storage)
    manifest = read_manifest(data)

    def run(command: str, config: BaseModel, starter: Literal["torchrun", "plain"]) -> _Done:
        return _run_job(cell, command, config, starter, resources, storage, told)

    pretrained = run("pretrain", _pretraining(experiment, cell, data, manifest), "torchrun")
    weights = pretrained.output("model")
    finetuned = run(
        "finetune",
        TrainingJobConfig.finetuning(
            data,
            manifest,
            weights,
            experiment.finetuning.model,
            _trainer(experiment.finetuning, cell),
        ),
        "torchrun",
    )
    evaluation = EvaluationJobConfig(
        name=experiment.name,
        dataset=str(data),
        dataset_digest=manifest.digest,
        classifier=str(finetuned.output("model")),
        autoencoder=str(weights),
    )
    judged = run("evaluate", evaluation, "plain")
    metrics = read_json(judged.output("metrics"))
    record = Record(
        cell=cell,
        metrics={k: v["value"] for k, v in metrics.items() if isinstance(v, dict) and "value" in v},
        n_test=metrics["n_series"],
        seconds={
            name: float(done.result.facts.get("training_s", 0))
            for name, done in (("pretraining", pretrained), ("finetuning", finetuned))
        },
        device=str(finetuned.result.facts.get("device", "?")),
        dataset_digest=manifest.digest,
        settings_digest=settings_digest(experiment, cell),
        code=code_version(),
        finished_at=time.time(),
    )
    path = record_path(storage, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record.model_dump(mode="json"))
    return record


class _Done:
    """A completed job."""

    def __init__(self, folder: JobFolder, result: Result) -> None:
        self.folder, self.result = folder, result

    def output(self, name: str) -> Path:
        return self.folder.path / self.result.outputs[name]


def _run_job(
    cell: Cell,
    command: str,
    config: BaseModel,
    starter: Literal["torchrun", "plain"],
    resources: Resources,
    storage: Storage,
    told: Told,
) -> _Done:
    document = config.model_dump(mode="json")
    key = job_key(f"results/{cell.name}/{command}", digest_of(document))
    folder = JobFolder(storage.jobs / key)
    spec = job_spec(
        resources, key, roma_command(command, folder.path), digest_of(document), starter
    )
    told(f"{cell.name} {command}: job {key}")
    outcome = supervise(
        launcher_for(resources.target, resources.profile, storage),
        folder,
        spec,
        document,
        watcher={"asset_key": f"results/{cell.name} {command}"},
        on_poll=_Progress(folder, f"{cell.name} {command}", told),
        max_attempts=resources.max_attempts,
    )
    assert outcome.result is not None, "a completed job has a result"
    return _Done(folder, outcome.result)


class _Progress:
    """Says every half minute how far a training is."""

    def __init__(self, folder: JobFolder, what: str, told: Told) -> None:
        self.folder, self.what, self.told = folder, what, told
        self._said_at = time.monotonic()

    def __call__(self, state: JobState) -> None:
        if state.ended or time.monotonic() - self._said_at < 30:
            return
        self._said_at = time.monotonic()
        last = _last_record(self.folder.metrics)
        where = f"step {last['step']}" if last else str(state)
        self.told(f"{self.what}: {where}")


def _last_record(path: Path) -> dict[str, Any] | None:
    from roma_core.trainer.metrics_log import read_records

    records = [record for _, record in read_records(path)] if path.exists() else []
    return records[-1] if records else None


def _built(experiment: Experiment, cell: Cell, storage: Storage) -> Path:
    changes = {"drop_rate": cell.drop_rate, "drop_seed": cell.seed if cell.drop_rate else 0}
    config = experiment.dataset.model_copy(update=changes)
    return build_dataset(config, storage.datasets, storage.cache, progress=False)


def _pretraining(
    experiment: Experiment, cell: Cell, data: Path, manifest: Manifest
) -> TrainingJobConfig:
    stage = experiment.pretraining
    return TrainingJobConfig.pretraining(data, manifest, stage.model, _trainer(stage, cell))


def _trainer(stage: Stage, cell: Cell) -> TrainerConfig:
    return TrainerConfig.from_values({**stage.trainer, "random_seed": cell.seed})
