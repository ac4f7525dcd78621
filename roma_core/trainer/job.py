"""Pretraining and finetuning as a job: ``config.json`` in, weights and metrics out.

Whether targets are of a size that a model can learn. Imports no torch.
The frozen configuration of a training job, ``config.json``. Imports no torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from roma_core.data.schema import Manifest
from roma_core.data.store import StoredDataset
from roma_core.files import read_json
from roma_core.job import Attempt, JobFolder
from roma_core.model.config import (
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
    classifier_config,
    is_pretraining,
)
from roma_core.run_job import Work
from roma_core.schema import DataSchema
from roma_core.trainer.config import TrainerConfig

if TYPE_CHECKING:
    from roma_core.model.prediction import RoMAForClassification
    from roma_core.model.pretraining import RoMAForPreTraining

_FAR = 30.0  # times larger or smaller than 1
_MOST_SERIES = 2_000  # looked at, evenly spaced among more


def far_targets(dataset: Path) -> list[str]:
    """A sentence for each target of the train split that is far from unit size, with what to do."""
    stored = StoredDataset(dataset, verify=False)
    train = stored.split("train").indices
    if not len(train):
        return []
    chosen = train[:: -(-len(train) // _MOST_SERIES)]
    found = [targets for i in chosen if (targets := stored.targets(int(i))) is not None]
    targets = np.concatenate(found).astype(np.float64)  # (T, K)
    sentences = []
    for target, mean, std in zip(
        stored.schema.targets, targets.mean(axis=0), targets.std(axis=0), strict=True
    ):
        is_small = 0 < std < 1 / _FAR  # one that never changes is small in no sense
        if abs(mean) > _FAR or std > _FAR or is_small:
            sentences.append(
                f"target {target.name!r} has mean {mean:.4g} and standard deviation {std:.4g} in train, "
                f"and is learnt as it is, which trains badly so far from 0 and 1: let its source give "
                f"(x - {mean:.4g}) / {std or 1:.4g} instead, and build the data set again"
            )
    return sentences


def data_fields(schema: DataSchema) -> dict[str, Any]:
    """What the data decide of a model: channels, axes, and tokens of one observation."""
    return {
        "tubelet_size": [1, 1, 1],
        "n_channels": len(schema.channels),
        "n_pos_dims": len(schema.axes),
        "position_axes": [],  # the data set applies its own
    }


class TrainingJobConfig(BaseModel):
    """One training: on which data, of which model, from which weights, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    task: Literal["pretrain", "finetune"]
    dataset: str = Field(description="Folder of the data set.")
    dataset_digest: str = Field(description="Its version; another one under this path is refused.")
    weights: str | None = Field(
        None, description="Folder of the weights to start from; None starts new."
    )
    model: dict[str, Any] = Field(description="Every field of the model's configuration.")
    trainer: dict[str, Any] = Field(description="Every field of the trainer's configuration.")
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training series that are used, of every class alike: what labels "
        "are worth.",
    )

    @classmethod
    def pretraining(
        cls,
        dataset: Path,
        manifest: Manifest,
        model: dict[str, Any],
        trainer: TrainerConfig,
        train_fraction: float = 1.0,
    ) -> Self:
        """Pretraining from new weights; ``model`` holds the fields that the data do not decide."""
        config = RoMAForPreTrainingConfig(**model | data_fields(manifest.data_schema))
        return cls(
            task="pretrain",
            dataset=str(dataset),
            dataset_digest=manifest.digest,
            model=config.model_dump(mode="json"),
            trainer=_portable(trainer),
            train_fraction=train_fraction,
        )

    @classmethod
    def finetuning(
        cls,
        dataset: Path,
        manifest: Manifest,
        weights: Path | None,
        model: dict[str, Any],
        trainer: TrainerConfig,
        train_fraction: float = 1.0,
    ) -> Self:
        """Finetuning of a classifier, from pretrained weights or, with None, from new ones.

        Warns of a regression's targets that are far from unit size.

        Raises:
            ValueError: the data set does not know what the model is to tell.
        """
        schema = manifest.data_schema
        document = None if weights is None else read_json(weights / "model_config.json")
        told = schema.targets if _regresses(model, document) else schema.classes
        wishes = {"dim_output": len(told) or None, **model} | data_fields(schema)
        if document is None or weights is None:
            config = RoMAForClassificationConfig(**wishes)
        else:
            config = classifier_config(document, wishes, weights)
        _refuse_what_the_data_do_not_know(config, manifest)
        if config.problem_type == "regression":
            for sentence in far_targets(dataset):
                warnings.warn(sentence, stacklevel=2)
        return cls(
            task="finetune",
            dataset=str(dataset),
            dataset_digest=manifest.digest,
            weights=None if weights is None else str(weights),
            model=config.model_dump(mode="json"),
            trainer=_portable(trainer),
            train_fraction=train_fraction,
        )

    def completed(self) -> Self:
        """The same with the settings that have come into being since, at what they were before."""
        model = RoMAForPreTrainingConfig if self.task == "pretrain" else RoMAForClassificationConfig
        return self.model_copy(
            update={
                "model": model.from_values(self.model).model_dump(mode="json"),
                "trainer": _portable(TrainerConfig.from_values(self.trainer)),
            }
        )


def _regresses(model: dict[str, Any], document: dict[str, Any] | None) -> bool:
    """Whether a model is to tell numbers: as wished, as its head's weights do, or by the environment."""
    if "problem_type" in model:
        found = model["problem_type"]
    elif document is None or is_pretraining(document):  # a new head
        found = RoMAForClassificationConfig().problem_type
    else:  # published heads do not say, and tell classes
        found = document.get("problem_type", "classification")
    return bool(found == "regression")


def _refuse_what_the_data_do_not_know(
    config: RoMAForClassificationConfig, manifest: Manifest
) -> None:
    """A data set knows the class of a series, and the targets of an observation."""
    if config.problem_type == "regression" and not manifest.data_schema.targets:
        raise ValueError(
            f"problem_type=regression needs targets, and the data set {manifest.name} has none; name "
            f"their columns in `targets` of its source and build it again"
        )
    if config.problem_type == "regression" and config.pools != "token":
        raise ValueError(
            f"targets belong to observations, and pooling={config.pools} tells one output a series; "
            f"set pooling=token"
        )
    if config.problem_type == "classification" and config.pools == "token":
        raise ValueError(
            "classes belong to series, and pooling=token tells an output for every observation; set "
            "problem_type=regression to learn the targets of a data set, or leave pooling out"
        )
    if config.problem_type == "classification" and not manifest.data_schema.classes:
        instead = (
            "; set pooling=token and problem_type=regression to learn its targets"
            if manifest.data_schema.targets
            else ""
        )
        raise ValueError(
            f"a classifier needs classes, and the data set {manifest.name} has none: name the column of "
            f"the class in its source and build it again{instead}"
        )


def _portable(trainer: TrainerConfig) -> dict[str, Any]:
    """The fields of the trainer, but for the folder, which is the job's own."""
    return trainer.model_dump(mode="json", exclude={"checkpoint_dir"})


MODEL_OUTPUT = "outputs/model"
"""Where the trained weights go, relative to the job folder."""


def open_dataset(path: str, digest: str, *, verify: bool) -> StoredDataset:
    """The data set a job was planned for.

    Raises:
        ValueError: another version lies there now.
    """
    dataset = StoredDataset(path, verify=verify)
    if dataset.manifest.digest != digest:
        raise ValueError(
            f"the job was planned for version {digest[:12]} of the data set, but {path} is version "
            f"{dataset.manifest.digest[:12]}; plan the job again"
        )
    return dataset


def _model_of(config: TrainingJobConfig, seed: int) -> RoMAForPreTraining | RoMAForClassification:
    import torch

    from roma_core.model.prediction import RoMAForClassification
    from roma_core.model.pretraining import RoMAForPreTraining
    from roma_core.model.weights import start_classifier

    torch.manual_seed(seed)  # the same initial weights in every process and every attempt
    if config.task == "pretrain":
        return RoMAForPreTraining(RoMAForPreTrainingConfig.from_values(config.model))
    classifier = RoMAForClassificationConfig.from_values(config.model)
    if config.weights is None:
        return RoMAForClassification(classifier)
    return start_classifier(config.weights, classifier)


def train(folder: JobFolder, attempt: Attempt) -> Work:
    """Run or resume the training that ``config.json`` describes."""
    from roma_core.trainer.trainer import Trainer

    config = TrainingJobConfig.model_validate(read_json(folder.config, schema_version=1))
    trainer = TrainerConfig.from_values(config.trainer | {"checkpoint_dir": folder.checkpoints})
    dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
    model = _model_of(config, trainer.random_seed)
    model.data_schema = dataset.schema.model_dump(mode="json")
    end = Trainer(trainer).train(
        dataset.split("train").part(config.train_fraction, trainer.random_seed),
        dataset.split("validation"),
        model,
        folder=folder.path,
        attempt=attempt,
        what=config.task,
    )
    if end.status == "continue":
        return Work("continue", end.world_size, end.step, end.reason)
    if end.is_main_process:
        model.save_pretrained(folder.path / MODEL_OUTPUT)
    return Work(
        "completed",
        end.world_size,
        end.step,
        metrics=end.metrics,
        outputs={"model": MODEL_OUTPUT},
        facts={
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_s": round(end.elapsed_s, 3),
            "device": str(next(model.parameters()).device),
        },
    )
