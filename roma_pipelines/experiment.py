"""What one experiment is: the content of its ``defs.yaml``, checked. Imports no torch.

What is wrong with the trainings of an experiment, in the words of its file.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import dagster as dg
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from roma_core.data.config import DatasetConfig
from roma_core.evaluation.config import Baseline
from roma_core.files import digest_of
from roma_core.model.config import (
    DROPOUTS,
    HEAD,
    SHAPE,
    RoMAForClassificationConfig,
    RoMAForPreTrainingConfig,
)
from roma_core.settings import RomaSettings, SettingsError, variable_of
from roma_core.trainer.config import TrainerConfig
from roma_pipelines.automation.settings import Automation
from roma_pipelines.executor import retry_policy
from roma_pipelines.provenance import DISTRIBUTION
from roma_pipelines.registry.gate import GateThresholds

ENCODER = "pretrained_encoder"
ASSET_NAMES = (
    "dataset",
    ENCODER,
    "finetuned_classifier",
    "evaluation_report",
    "registered_classifier",
)
"""The assets of an experiment, in the order in which they are made."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Section):
    """One training: fields of the model's and the trainer's configuration by name."""

    model: dict[str, Any] = Field({}, description="Fields that the data do not decide.")
    trainer: dict[str, Any] = Field({}, description="Fields of TrainerConfig.")
    train_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of the training series to use, of every class alike."
    )


class Resources(_Section):
    """Where trainings run and on how much."""

    target: Literal["local", "slurm", "kubernetes"] = Field(
        "local", description="Where jobs run: this computer, or a cluster."
    )
    profile: str | None = Field(
        None,
        description="Profile of the cluster; null takes ROMA_SLURM_PROFILE or "
        "ROMA_KUBERNETES_PROFILE.",
    )
    nodes: int = Field(1, gt=0, description="Computers; local runs all their processes on one.")
    processes_per_node: int = Field(1, gt=0, description="Training processes on each.")
    threads_per_process: int = Field(1, gt=0, description="CPU threads of each process.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs on each node; 0 trains on CPUs.")
    memory_gb: float | None = Field(None, gt=0, description="Per node; null: the site's default.")
    time_limit_min: int | None = Field(
        None, gt=1, description="Of one attempt; null: the site's default. Attempts continue."
    )
    max_attempts: int = Field(20, gt=0, description="Attempts that may continue one another.")

    def at(self, target: str | None, profile: str | None) -> Self:
        """The same somewhere else; None leaves as it is. A profile of one target is none of another.

        Raises:
            ValueError: a profile is given, and the target is this computer.
        """
        changes: dict[str, Any] = {"target": target or self.target, "profile": self.profile}
        if changes["target"] != self.target:
            changes["profile"] = None
        if profile is not None:
            changes["profile"] = profile
        if changes["target"] == "local" and profile is not None:
            raise ValueError(
                f"--profile {profile} names a cluster, and the target is local; name another --target, "
                f"or leave --profile out"
            )
        return self.model_copy(update=changes)


class Predictions(_Section):
    """What the champion predicts regularly: the asset ``batch_predictions``."""

    input: str = Field(description="Parquet, .jsonl, or the folder of a data set.")
    split: Literal["train", "validation", "test"] = Field(
        "test", description="Series to take of a data set."
    )


def checked_name(given: str) -> str:
    """The name of an experiment, as given.

    Raises:
        ValueError: it cannot be part of asset keys, folders and registered models.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", given):
        raise ValueError(
            f"the name of an experiment has lower-case letters, digits and _, beginning with a letter, "
            f"such as japanese_vowels; got {given!r}"
        )
    return given


Name = Annotated[str, AfterValidator(checked_name)]


class Experiment(_Section):
    """Data → pretrained encoder → classifier → report → registered model."""

    name: Name = Field(description="Key prefix, group and registered name.")
    description: str = Field("", description="What it is for, shown on its assets.")
    dataset: DatasetConfig
    pretraining: Stage = Stage()
    pretrained_from: Name | None = Field(
        None,
        description="Another experiment whose encoder is finetuned here, instead of pretraining one.",
    )
    finetuning: Stage = Stage()
    resources: Resources = Resources()
    gate: GateThresholds = GateThresholds()
    baselines: tuple[Baseline, ...] = ()
    predictions: Predictions | None = Field(None, description="None: no asset for it.")
    schedule: str | None = Field(
        None, description="Cron expression (UTC) of retraining; starts switched off."
    )
    automation: Automation = Automation()
    owners: tuple[str, ...] = Field((), description="E-mail addresses or team:NAME.")
    tags: dict[str, str] = Field({}, description="Further tags of the assets.")

    @model_validator(mode="after")
    def _one_encoder(self) -> Self:
        if self.pretrained_from is not None and self.pretraining != Stage():
            raise ValueError(
                f"pretrained_from: {self.pretrained_from}: the encoder comes from there, so pretraining "
                f"has nothing to say; leave one of the two out"
            )
        if self.pretrained_from == self.name:
            raise ValueError(f"pretrained_from: {self.name} is this experiment; leave it out")
        return self

    @model_validator(mode="after")
    def _trainings_can_be_configured(self) -> Self:
        before, after = self.pretraining, self.finetuning
        if wrong := about_trainings(before.model, before.trainer, after.model, after.trainer):
            raise ValueError("\n".join(wrong))
        return self

    def refuse_what_cannot_be_served(self, environment: bool = False) -> None:
        """Its assets end with a registered model, and a regressor cannot be packaged.

        Args:
            environment: ask it, too, where the file leaves the type open: what a job would be here.

        Raises:
            ValueError: it finetunes a regressor.
        """
        found, said = self.finetuning.model.get("problem_type"), "finetuning.model.problem_type"
        if found is None and environment:
            found = RoMAForClassificationConfig().problem_type
            said = f"{variable_of(RoMAForClassificationConfig, 'problem_type')} is set to {found}"
        if found not in (None, "classification"):
            raise ValueError(
                f"experiment {self.name}: {said}: a regressor cannot be served or "
                f"registered yet, so it has no assets; train it with `roma finetune`, judge it with "
                f"`roma evaluate`, or make it a row of `roma-pipeline results`"
            )

    def key(self, noun: str) -> dg.AssetKey:
        """Key of one of its assets, or of the encoder it shares."""
        owner = self.pretrained_from if noun == ENCODER else None
        return dg.AssetKey([owner or self.name, noun])

    def asset_arguments(self, noun: str, *upstream: str, settings: set[str]) -> dict[str, Any]:
        """What all assets of the experiment have in common.

        ``settings`` names the sections that decide the asset's content; with the release they are
        its code version, so that a change of them, and only that, makes it outdated.
        """
        decides = self.model_dump(mode="json", include=settings)
        if "pretraining" in settings and self.pretrained_from is not None:
            decides["pretrained_from"] = self.pretrained_from
        release = importlib.metadata.version(DISTRIBUTION)
        return {
            "code_version": digest_of([release, decides])[:12],
            "key": self.key(noun),
            "group_name": self.name,
            "owners": list(self.owners) or None,
            "tags": {"experiment": self.name, **self.tags},
            "deps": [self.key(name) for name in upstream],
            "retry_policy": retry_policy(),
        }


_DATA_DECIDE = ("tubelet_size", "n_channels", "n_pos_dims", "position_axes")
_ONE_OBSERVATION = {"tubelet_size": [1, 1, 1], "n_channels": 1}


def about_trainings(
    pretraining: Mapping[str, Any],
    pretrainer: Mapping[str, Any],
    finetuning: Mapping[str, Any],
    finetrainer: Mapping[str, Any],
) -> list[str]:
    """What is wrong with the model and trainer sections of the two trainings; empty if nothing is."""
    found = []
    for where, trainer in (("pretraining", pretrainer), ("finetuning", finetrainer)):
        found += [
            f"{where}.trainer.{name}: every job has a folder of its own; leave it out"
            for name in ("checkpoint_dir",)
            if name in trainer
        ]
        found += _refused(TrainerConfig, trainer, f"{where}.trainer")
    found += [
        f"pretraining.model.{name}: the data decide it; leave it out"
        for name in _DATA_DECIDE
        if name in pretraining
    ]
    # the data's axes are not known here; there are as many as the settings speak of
    channel_axis = pretraining.get("channel_axis")
    n_axes = max(1, 1 + channel_axis) if isinstance(channel_axis, int) else 1
    encoder = {**pretraining, **_ONE_OBSERVATION, "n_pos_dims": n_axes}
    wrong = _refused(RoMAForPreTrainingConfig, encoder, "pretraining.model")
    shaped = _of_the_encoder(finetuning)
    if wrong or shaped:
        return found + wrong + shaped
    shape = RoMAForPreTrainingConfig.from_values(encoder)
    stack = shape.encoder_config.model_dump() | dict(finetuning.get("encoder_config", {}))
    classifier = {name: getattr(shape, name) for name in SHAPE} | dict(finetuning)
    classifier["encoder_config"] = stack
    return found + _refused(RoMAForClassificationConfig, classifier, "finetuning.model")


def _refused(settings: type[RomaSettings], values: Mapping[str, Any], where: str) -> list[str]:
    try:
        settings.from_values(values)
    except SettingsError as error:
        return [
            ": ".join(filter(None, (f"{where}.{name}".strip("."), text)))
            for name, text in error.problems
        ]
    return []


def _of_the_encoder(finetuning: Mapping[str, Any]) -> list[str]:
    """Settings of finetuning that the pretrained encoder brings along."""
    stack = finetuning.get("encoder_config", {})
    if not isinstance(stack, Mapping):
        return [f"finetuning.model.encoder_config: expected a mapping, got {stack!r}"]
    free = f"{', '.join(HEAD)} and, in encoder_config, {', '.join(DROPOUTS)}"
    shape = [name for name in finetuning if name in SHAPE]
    known = RoMAForPreTrainingConfig.model_fields["encoder_config"].default
    shape += [
        f"encoder_config.{name}"
        for name in stack
        if name in type(known).model_fields and name not in DROPOUTS
    ]
    return [
        f"finetuning.model.{name}: it comes with the pretrained encoder; free are {free}"
        for name in shape
    ]
