"""Where the jobs of an experiment's stages run: resources in its file, and run config of one run."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal, Self

import dagster as dg
from pydantic import Field, model_validator

from roma_pipelines.launching.spec import JobSize

ENCODER = "pretrained_encoder"
FINETUNED = {"classification": "finetuned_classifier", "regression": "finetuned_regressor"}
"""Task -> name of the asset with the finetuned model."""
StageName = Literal["dataset", "pretraining", "finetuning", "evaluation", "predictions"]
STAGES: dict[str, StageName] = {
    "dataset": "dataset",
    ENCODER: "pretraining",
    **dict.fromkeys(FINETUNED.values(), "finetuning"),
    "evaluation_report": "evaluation",
    "batch_predictions": "predictions",
}
"""Asset -> its section of ``resources``."""
_TRAININGS = ("pretraining", "finetuning")


class StageResources(JobSize):
    """Where the jobs of one stage run, and their size."""

    target: Literal["local", "slurm", "kubernetes"] = "local"
    """Where jobs run: this computer or a cluster."""
    profile: str | None = None
    """Profile of the cluster; null takes ROMA_SLURM_PROFILE or ROMA_KUBERNETES_PROFILE."""
    time_limit_min: int | None = Field(None, gt=1)
    """Minutes of one attempt; the job resumes in a new one. null: the profile's default."""
    max_attempts: int = Field(20, gt=0, description="Attempts in a row that may add no checkpoint.")


class Resources(StageResources):
    """Where jobs run, and their size; the section of a stage overrides single fields for its job."""

    dataset: StageResources | None = None
    """Makes the data set in a job; null: in Dagster's own process."""
    pretraining: StageResources | None = None
    finetuning: StageResources | None = None
    evaluation: StageResources | None = None
    predictions: StageResources | None = None
    """Several processes write a folder of files, one process writes one file."""

    def of(self, stage: StageName) -> Self:
        """The resources of one stage's job.

        The section of the stage replaces the fields that it sets; the profile belongs to the target.
        Number of processes and GPUs outside the sections are those of trainings: other stages are one
        process, with at most one GPU for each of its own, and the data set needs none.
        """
        section = getattr(self, stage)
        given = {} if section is None else section.model_dump(exclude_unset=True)
        found = dict(self) | dict.fromkeys(STAGES.values())
        if given.get("target", self.target) != self.target:
            found["profile"] = None
        if stage in _TRAININGS:
            return self.model_copy(update=found | given)
        found |= {"nodes": 1, "processes_per_node": 1} | given
        if "gpus_per_node" not in given:
            n_gpus = min(self.gpus_per_node, found["processes_per_node"])
            found["gpus_per_node"] = 0 if stage == "dataset" else n_gpus
        return self.model_copy(update=found)

    def at(self, target: str | None, profile: str | None) -> Self:
        """These resources on another target or profile, in all stages; None keeps the present value.

        A new target drops the profile. ValueError if one is given with the local target.
        """
        here = target or self.target
        if here == "local" and profile is not None:
            raise ValueError(
                f"--profile {profile} names a cluster, but the target is local; choose another "
                f"--target or omit --profile"
            )
        changed: dict[str, Any] = {"target": here, "profile": profile}
        if profile is None and here == self.target:
            changed["profile"] = self.profile
        for stage in STAGES.values() if target or profile else ():
            if (section := getattr(self, stage)) is not None:
                place = {"target", "profile"}
                size = section.model_dump(exclude_unset=True, exclude=place)
                changed[stage] = StageResources(**size)
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _sections_have_an_effect(self) -> Self:
        for stage in STAGES.values():
            if (section := getattr(self, stage)) is None:
                continue
            found = self.of(stage)
            if found.target == "local" and section.profile is not None:
                raise ValueError(
                    f"{stage}.profile: {section.profile} names a cluster, but the target is local; remove it, "
                    f"or set {stage}.target"
                )
            if stage in ("dataset", "evaluation") and found.nodes * found.processes_per_node > 1:
                raise ValueError(
                    f"{stage}: one process does it; remove nodes and processes_per_node"
                )
        return self


Target = StrEnum("Target", ["local", "slurm", "kubernetes"])


class OneProcessConfig(dg.Config):
    """Where the job of the asset runs in this run."""

    target: Target | None = Field(
        None, description="This computer or a cluster; null, here and below: as in the experiment."
    )
    profile: str | None = Field(None, description="Profile of the cluster.")
    gpus_per_node: int | None = Field(None, description="GPUs per node; 0 uses CPUs.")
    time_limit_min: int | None = Field(
        None, description="Minutes of one attempt; the job resumes in a new one."
    )


class JobConfig(OneProcessConfig):
    """Where the job of the asset runs in this run, and its size."""

    nodes: int | None = Field(None, description="Nodes.")
    processes_per_node: int | None = Field(None, description="Processes per node.")


class TrainingConfig(JobConfig):
    """Also changes the training; the model's version, card and lineage say so."""

    model: dict[str, Any] = Field(
        {},
        description="Fields of the model over those of the experiment, such as "
        "{encoder_config: {drop_path_rate: 0.1}}.",
    )
    trainer: dict[str, Any] = Field(
        {},
        description="Fields of the trainer over those of the experiment, such as "
        "{epochs: 5, base_lr: 0.001}.",
    )


RUN_CONFIGS: dict[str, type[OneProcessConfig]] = {
    name: TrainingConfig if stage in _TRAININGS else OneProcessConfig
    for name, stage in STAGES.items()
} | {"batch_predictions": JobConfig}


def overrides(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are as in the experiment: the Launchpad's scaffold has all fields."""
    return {name: value for name, value in config.items() if value not in (None, {})}
