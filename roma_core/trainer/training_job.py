"""Pretraining and finetuning as a job: ``config.json`` in, weights and metrics out."""

from __future__ import annotations

import torch

from roma_core.data.store import StoredDataset
from roma_core.files import read_json
from roma_core.job import Attempt, JobFolder
from roma_core.job_runner import Work
from roma_core.model.classification import RoMAForClassification
from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.model.weights import start_classifier
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.job_config import TrainingJobConfig
from roma_core.trainer.trainer import Trainer

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
    torch.manual_seed(seed)  # the same initial weights in every process and every attempt
    if config.task == "pretrain":
        return RoMAForPreTraining(RoMAForPreTrainingConfig.from_values(config.model))
    classifier = RoMAForClassificationConfig.from_values(config.model)
    if config.weights is None:
        return RoMAForClassification(classifier)
    return start_classifier(config.weights, classifier)


def train(folder: JobFolder, attempt: Attempt) -> Work:
    """Run or resume the training that ``config.json`` describes."""
    config = TrainingJobConfig.model_validate(read_json(folder.config, schema_version=1))
    trainer = TrainerConfig.from_values(config.trainer | {"checkpoint_dir": folder.checkpoints})
    dataset = open_dataset(config.dataset, config.dataset_digest, verify=True)
    model = _model_of(config, trainer.random_seed)
    model.data_schema = dataset.schema.model_dump(mode="json")
    end = Trainer(trainer).train(
        dataset.split("train").part(config.train_share, trainer.random_seed),
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
