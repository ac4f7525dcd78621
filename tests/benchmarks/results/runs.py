"""One run of the results: data set → pretraining → finetuning → evaluation → a record.

The jobs go through the launching layer, so a run that was interrupted goes on where it was, on this
computer or on a cluster. Nothing of it enters the registry. A job's key is a hash of its configuration:
what is done already under the same settings is found again, by this run or by another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.build import build_dataset
from roma_core.data.config import DatasetConfig
from roma_core.data.manifest import Manifest, read_manifest
from roma_core.evaluation.config import EvaluationJobConfig
from roma_core.files import digest_of, read_json, write_json
from roma_core.job import JobFolder, Result
from roma_core.model.config import SHAPE, RoMAForPreTrainingConfig
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import DatasetSize, cost_s
from roma_core.trainer.job import TrainingJobConfig, data_fields
from roma_pipelines.experiment import Experiment, Stage
from roma_pipelines.launching.spec import JobState, job_key
from roma_pipelines.launching.supervisor import supervise
from roma_pipelines.launching.targets import job_spec, launcher_for, roma_command
from roma_pipelines.registry.runs import code_version
from roma_pipelines.run_config import Resources, StageName
from roma_pipelines.storage import Storage
from tests.benchmarks.results.benchmarks import Run, Training


class Record(BaseModel):
    """What a run came to; ``results/<benchmark>/<case>/<seed>.json`` under the storage root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[2] = 2
    run: Run
    metrics: dict[str, float] = Field(description="On the split that the benchmark is judged on.")
    n_series: int = Field(description="Of that split.")
    seconds: dict[str, float] = Field(
        description="Training time by job, without the pretraining of another seed."
    )
    device: str
    dataset_digest: str
    settings_digest: str = Field(description="Of everything that decides the run.")
    code: str
    finished_at: float


class StillRunning(KeyboardInterrupt):
    """Somebody stopped watching a job, which runs on without them."""

    def __init__(self, key: str, what: str) -> None:
        super().__init__(f"{what}: job {key} goes on")
        self.key, self.what = key, what


Log = Callable[[str], None]
_STAGES: dict[str, StageName]
_STAGES = {"pretrain": "pretraining", "finetune": "finetuning", "evaluate": "evaluation"}
_CODE = "code.json"


@dataclass(frozen=True)
class Plan:
    """A run with everything that decides it.

    Attributes:
        experiment: with the case's changes.
        trainings: which of the two are done.
        evaluated_on: ``test`` or ``validation``.
        encoder_seed: of the pretraining, if seeds share it.
        n_observed: how many observations are left where reconstructions are judged, besides the model's own.
    """

    run: Run
    experiment: Experiment
    trainings: tuple[Training, ...]
    evaluated_on: Literal["test", "validation"]
    n_observed: tuple[int, ...] = ()
    encoder_seed: int | None = None

    @property
    def digest(self) -> str:
        """A record with another one is out of date."""
        decide = self.experiment.model_dump(
            mode="json", include={"dataset", "pretraining", "finetuning"}
        )
        if (before := decide["pretraining"]) and "pretraining" not in self.trainings:
            decide["pretraining"] = {"model": before["model"]}  # the shape all the same
        decides = [decide, self.trainings, self.evaluated_on, self.run.seed, *self.n_observed]
        if self.takes_encoder:
            decides.append(f"encoder of seed {self.encoder_seed}")
        return digest_of(decides)[:16]

    @property
    def takes_encoder(self) -> bool:
        """Whether the run finetunes the encoder of another seed."""
        return "pretraining" in self.trainings and self.encoder_seed not in (None, self.run.seed)

    @property
    def encoder(self) -> str | None:
        """Digest of the pretraining; one job makes the encoder of all runs that have it. None: no encoder."""
        if "pretraining" not in self.trainings:
            return None
        trainer = self.trainer("pretraining").model_dump(mode="json")
        decide = [self.dataset, self.experiment.pretraining]
        return digest_of([*(part.model_dump(mode="json") for part in decide), trainer])[:16]

    @property
    def dataset(self) -> DatasetConfig:
        """With the seed, where observations are dropped by it."""
        config = self.experiment.dataset
        return (
            config.model_copy(update={"drop_seed": self.run.seed}) if config.drop_rate else config
        )

    def trainer(self, training: Training) -> TrainerConfig:
        stage: Stage = getattr(self.experiment, training)
        seed = self.run.seed
        if training == "pretraining" and self.encoder_seed is not None:
            seed = self.encoder_seed
        return TrainerConfig.from_values({**stage.trainer, "random_seed": seed})

    def built(self, storage: Storage, log: Log) -> Path:
        """The data set, built or found; ``log`` that this begins, since it may take minutes.

        Raises:
            DataError: that fails.
        """
        log(f"data of {self.run.name}: found, or built now …")
        return build_dataset(self.dataset, storage.datasets, storage.cache, progress=False)


def record_path(storage: Storage, run: Run) -> Path:
    return storage.root / "results" / run.benchmark / run.case / f"{run.seed}.json"


def read_record(storage: Storage, run: Run) -> Record | None:
    """What was found for this run, under whatever settings; None if it was never run."""
    path = record_path(storage, run)
    return Record.model_validate(read_json(path)) if path.exists() else None


def expected_s(plan: Plan, storage: Storage, log: Log, has_encoder: bool = False) -> float:
    """About how long a run's trainings take: as another seed did, else by model and amount of data.

    The data set is built for it if need be. ``has_encoder``: the pretraining is done, or another run's.

    Raises:
        DataError: that fails.
    """
    trainings = [name for name in plan.trainings if name != "pretraining" or not has_encoder]
    for path in sorted(record_path(storage, plan.run).parent.glob("*.json")):
        record = Record.model_validate(read_json(path))
        same = replace(plan, run=record.run).digest == record.settings_digest
        if same and record.seconds.keys() >= set(trainings):
            return sum(record.seconds[training] for training in trainings)
    manifest = read_manifest(plan.built(storage, log))
    counts, schema = manifest.counts["train"], manifest.data_schema
    size = DatasetSize(
        counts.n_series, counts.n_observations, len(schema.channels), n_axes=len(schema.axes)
    )
    known = RoMAForPreTrainingConfig.model_fields  # without those of a head
    shape = RoMAForPreTrainingConfig.from_values(
        {n: x for n, x in plan.experiment.shape.items() if n in known}
        | data_fields(schema)
        | {"grid_step": 1.0}
    )
    return sum(
        cost_s(
            training,
            shape,
            plan.trainer(training),
            size,
            getattr(plan.experiment, training).train_fraction,
        )
        for training in trainings
    )


def execute(plan: Plan, resources: Resources, storage: Storage, log: Log) -> Record:
    """Run what is missing of a run and write its record.

    Raises:
        JobFailed: a job failed; the text has the end of its log.
        Refused: the target will not run one.
        DataError: the data set cannot be built.
        StillRunning: it was interrupted while a job of it ran.
    """
    data = plan.built(storage, log)
    manifest = read_manifest(data)
    jobs = _Jobs(plan.run, resources, storage, log)
    trained: dict[Training, _Done] = {}
    if "pretraining" in plan.trainings:
        config = _pretraining(plan, data)
        trained["pretraining"] = jobs.complete("pretrain", config)
    if "finetuning" in plan.trainings:
        pretrained = trained.get("pretraining")
        weights = None if pretrained is None else pretrained.output("model")
        config = _finetuning(plan, data, weights)
        trained["finetuning"] = jobs.complete("finetune", config)
    last = trained[plan.trainings[-1]]
    if plan.evaluated_on == "validation":
        metrics = _of_the_last_evaluation(last.result)
    else:
        metrics = _evaluated(jobs, plan, data, manifest, trained)
    record = Record(
        run=plan.run,
        metrics=metrics,
        n_series=manifest.counts[plan.evaluated_on].n_series,
        seconds={
            name: float(done.result.facts.get("training_s", 0))
            for name, done in trained.items()
            if name == "finetuning" or not plan.takes_encoder
        },
        device=str(last.result.facts.get("device", "?")),
        dataset_digest=manifest.digest,
        settings_digest=plan.digest,
        code=last.code,
        finished_at=time.time(),
    )
    path = record_path(storage, plan.run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record.model_dump(mode="json"))
    return record


def _pretraining(plan: Plan, data: Path) -> TrainingJobConfig:
    stage, trainer = plan.experiment.pretraining, plan.trainer("pretraining")
    assert stage is not None  # else it is none of the plan's trainings
    return TrainingJobConfig.resolve(
        "pretrain", data, stage.model, trainer, train_fraction=stage.train_fraction
    )


def _finetuning(plan: Plan, data: Path, weights: Path | None) -> TrainingJobConfig:
    stage = plan.experiment.finetuning
    model = stage.model
    if weights is None:  # new weights, in the shape that pretraining would have given them
        model = from_scratch(plan.experiment.shape, model)
    trainer = plan.trainer("finetuning")
    return TrainingJobConfig.resolve(
        "finetune", data, model, trainer, weights=weights, train_fraction=stage.train_fraction
    )


def from_scratch(pretraining: dict[str, Any], finetuning: dict[str, Any]) -> dict[str, Any]:
    """Model section of a finetuning that starts from new weights."""
    shape = {name: value for name, value in pretraining.items() if name in SHAPE}
    encoder = {**pretraining.get("encoder_config", {}), **finetuning.get("encoder_config", {})}
    return {**shape, **finetuning, "encoder_config": encoder}


def _of_the_last_evaluation(result: Result) -> dict[str, float]:
    """Of the validation split, at the end of the training; the loss of classes is the log loss."""
    found = {
        name.removeprefix("eval/"): value
        for name, value in result.metrics.items()
        if name.startswith("eval/")
    }
    return found | ({"log_loss": found["loss"]} if "accuracy" in found else {})


def _evaluated(
    jobs: _Jobs, plan: Plan, data: Path, manifest: Manifest, trained: dict[Training, _Done]
) -> dict[str, float]:
    """Metrics on the test split."""
    pretrained, classifier = trained.get("pretraining"), trained.get("finetuning")
    about = {
        "name": plan.experiment.name,
        "dataset": str(data),
        "dataset_digest": manifest.digest,
        "autoencoder": None if pretrained is None else str(pretrained.output("model")),
    }
    if classifier is not None:
        about["classifier"] = str(classifier.output("model"))
    else:
        about["n_observed"] = plan.n_observed
    config = EvaluationJobConfig.model_validate(about)
    metrics = read_json(jobs.complete("evaluate", config).output("metrics"))
    return {k: v["value"] for k, v in metrics.items() if isinstance(v, dict) and "value" in v}


@cache
def _code() -> str:
    """The code of this process; the tables that it writes change the checkout."""
    return code_version()


class _Done:
    """A completed job."""

    def __init__(self, folder: JobFolder, result: Result) -> None:
        self.folder, self.result = folder, result

    @property
    def code(self) -> str:
        """What ran it first; a job that was done before is found again under other code."""
        return str(read_json(self.folder.path / _CODE)["code"])

    def output(self, name: str) -> Path:
        return self.folder.path / self.result.outputs[name]


@dataclass(frozen=True)
class _Jobs:
    """Runs the jobs of a run, or finds them done."""

    run: Run
    resources: Resources
    storage: Storage
    log: Log

    def complete(self, command: str, config: BaseModel) -> _Done:
        document = config.model_dump(mode="json")
        key = job_key(f"results/{command}", digest_of(document))
        folder = JobFolder(self.storage.jobs / key)
        resources = self.resources.of(_STAGES[command])
        threads = resources.threads_per_process or 1  # times are told of one core
        resources = resources.model_copy(update={"threads_per_process": threads})
        about = (key, roma_command(command, folder.path), digest_of(document))
        spec = job_spec(resources.target, resources, *about)
        if not (folder.path / _CODE).exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.path / _CODE, {"code": _code()})
        what = f"{self.run.name} {command}"
        self.log(f"{what}: job {key}")
        try:
            outcome = supervise(
                launcher_for(resources.target, resources.profile, self.storage),
                folder,
                spec,
                document,
                holder={"asset_key": f"results/{what}"},
                on_poll=_Progress(folder, what, self.log),
                max_attempts=resources.max_attempts,
            )
        except KeyboardInterrupt:
            if folder.attempt_numbers():
                raise StillRunning(key, what) from None
            raise
        assert outcome.result is not None, "a completed job has a result"
        return _Done(folder, outcome.result)


class _Progress:
    """Says every half minute how far a training is."""

    def __init__(self, folder: JobFolder, what: str, log: Log) -> None:
        self.folder, self.what, self.log = folder, what, log
        self._said_at = time.monotonic()

    def __call__(self, state: JobState) -> None:
        if state.ended or time.monotonic() - self._said_at < 30:
            return
        self._said_at = time.monotonic()
        last = _last_record(self.folder.metrics)
        where = f"step {last['step']}" if last else str(state)
        self.log(f"{self.what}: {where}")


def _last_record(path: Path) -> dict[str, Any] | None:
    from roma_core.trainer.metrics import read_records

    records = [record for _, record in read_records(path)] if path.exists() else []
    return records[-1] if records else None
