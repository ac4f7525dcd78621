"""What is wrong with an experiment, in the words of its file: section, setting, reason, closest name.

The settings of a training are checked here without the environment, so that a mistake in a file is
seen when definitions load and not after an hour of pretraining.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.model.transfer import DROPOUTS, HEAD, SHAPE
from roma_core.settings import RomaSettings, leaf_names
from roma_core.trainer.config import TrainerConfig

_DATA_DECIDE = ("tubelet_size", "n_channels", "n_pos_dims")
_ONE_OBSERVATION = {"tubelet_size": [1, 1, 1], "n_channels": 1, "n_pos_dims": 1}


def complaints(error: ValidationError, model: type[BaseModel], where: str = "") -> list[str]:
    """One line for everything that pydantic found wrong, each beginning with the setting's name."""
    lines = []
    for detail in error.errors(include_url=False):
        path = detail["loc"]
        name = ".".join([where, *map(str, path)]).strip(".")
        if detail["type"] == "extra_forbidden":
            lines.append(f"{name} is no setting{_closest(model, path)}")
        elif detail["type"] == "missing":
            lines.append(f"{name} is missing")
        elif detail["type"] == "value_error":
            cause = detail["ctx"]["error"]
            if isinstance(cause, ValidationError):  # of a section that a validator built
                lines += complaints(cause, BaseModel, name)
            else:  # our own words
                lines.append(": ".join(part for part in (name, str(cause)) if part))
        else:
            reason = detail["msg"][0].lower() + detail["msg"][1:]
            lines.append(f"{name}: {reason}, got {detail['input']!r}")
    return lines


def _closest(model: type[BaseModel], path: Sequence[int | str]) -> str:
    """``; the closest is X`` among the fields beside an unknown one; empty where none is known."""
    prefix = "".join(f"{part}." for part in path[:-1])
    leaves = (leaf for leaf in leaf_names(model) if leaf.startswith(prefix))
    names = {leaf.removeprefix(prefix).partition(".")[0] for leaf in leaves}
    closest = difflib.get_close_matches(str(path[-1]), sorted(names), n=1, cutoff=0.0)
    return f"; the closest is {closest[0]}" if closest else ""


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
    encoder = {**pretraining, **_ONE_OBSERVATION}
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
    except ValidationError as error:
        return complaints(error, settings, where)
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
