"""What is wrong with the trainings of an experiment, in the words of its file.

The settings of a training are checked here without the environment, so that a mistake in a file is
seen when definitions load and not after an hour of pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.model.transfer import DROPOUTS, HEAD, SHAPE
from roma_core.settings import RomaSettings, SettingsError
from roma_core.trainer.config import TrainerConfig

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
