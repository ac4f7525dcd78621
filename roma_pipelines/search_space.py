"""The section ``tuning`` of an experiment: what a hyperparameter search varies, and its budget.

A setting is named by its path in the file, such as ``finetuning.trainer.base_lr``. Imports no Optuna.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from roma_core.model.config import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.settings import Frozen, RomaSettings, leaves_of
from roma_core.trainer.config import TrainerConfig

Value = bool | int | float | str | None
_MODELS: dict[str, type[RomaSettings]]
_MODELS = {"pretraining": RoMAForPreTrainingConfig, "finetuning": RoMAForClassificationConfig}
_COMPARED = "trials are compared by the primary metric"
_FIXED = dict.fromkeys(("trainer.best_metric", "trainer.best_metric_mode"), _COMPARED)
_FIXED["trainer.random_seed"] = "the best of several seeds is chance"
_FIXED["trainer.eval_every"] = "the value of a trial is the best of its evaluations"


class Dimension(Frozen):
    """Values of one setting: the numbers from ``low`` to ``high``, or ``choices``."""

    low: float | None = Field(None, allow_inf_nan=False)
    high: float | None = Field(None, allow_inf_nan=False)
    log: bool = Field(False, description="Sample the logarithm.")
    step: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Distance between values; null: any."""
    choices: tuple[Value, ...] = ()

    @model_validator(mode="after")
    def _is_a_range_or_choices(self) -> Self:
        if self.choices:
            if self.model_fields_set != {"choices"} or len(set(self.choices)) < 2:
                raise ValueError("expected two or more different choices, and nothing beside them")
        elif self.low is None or self.high is None or not self.low < self.high:
            given = f"low={self.low}, high={self.high}"
            raise ValueError(f"expected low and a larger high, or choices; got {given}")
        elif self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is larger than the range; reduce it")
        elif self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"log needs a low above 0 and no step; got low={self.low}")
        return self

    def bounds(self, path: str) -> tuple[Any, ...]:
        """All choices, or low and high as the setting of this path takes them."""
        if self.low is None or self.high is None:
            return self.choices
        whole = _is_integer(path)
        return tuple(int(x) if whole and x.is_integer() else x for x in (self.low, self.high))

    def suggest(self, trial: Any, name: str, path: str) -> Value:
        """The value of an Optuna trial for the setting of this path, of at most four digits."""
        if self.choices:
            return trial.suggest_categorical(name, self.choices)
        low, high = self.bounds(path)
        if _is_integer(path):
            return trial.suggest_int(name, low, high, log=self.log, step=int(self.step or 1))
        value = trial.suggest_float(name, low, high, log=self.log, step=self.step)
        return min(max(float(f"{value:.4g}"), low), high)

    def contains(self, value: Any) -> bool:
        if self.low is None or self.high is None:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high


class Tuning(Frozen):
    """A hyperparameter search, which ``roma-pipeline tune`` and the asset ``tuning_study`` run."""

    space: dict[str, Dimension] = Field({}, description="By path; empty: a default space.")
    trials: int = Field(30, gt=0, description="Trials of the study, failed and pruned ones too.")
    parallel: int = Field(2, gt=0, description="Trials at the same time.")
    hours: float | None = Field(None, gt=0)
    """GPU-hours, or CPU-hours of jobs without a GPU, after which no trial starts; null: no limit."""

    def problems(self, experiment: Any, changed: Callable[..., object]) -> list[str]:
        """A sentence for everything that the experiment, of which this is no part, cannot take.

        ``changed`` is its ``with_settings``, which is tried with each bound.
        """
        found = []
        if experiment.task == "interpolation":
            found.append(f"tuning: {_COMPARED}, which a pretraining does not log; remove it")
        if experiment.start_from == "champion":
            found.append("tuning: trials do not start from the champion; remove start_from")
        for path, dimension in self.space.items():
            stage, _, field = path.partition(".")
            here, step = f"tuning.space.{path}", dimension.step or 1.0
            if stage not in _MODELS or not field.startswith(("model.", "trainer.")):
                found.append(f"{here}: expected a path such as finetuning.trainer.base_lr")
            elif getattr(experiment, stage) is None:
                found.append(f"{here}: {stage} is null; remove it")
            elif field in _FIXED:
                found.append(f"{here}: {_FIXED[field]}; remove it")
            elif _is_integer(path) and not step.is_integer():
                found.append(f"{here}.step: expected a whole number, got {step}")
            else:
                for value in dimension.bounds(path):
                    try:
                        changed(**sections(experiment, {path: value}))
                    except ValueError as error:
                        text = str(error).removeprefix(f"experiment {experiment.name}: ")
                        found += [f"tuning.space: {line}" for line in text.splitlines()]
        return list(dict.fromkeys(found))


def _is_integer(path: str) -> bool:
    stage, part, name = path.split(".", 2)
    field = leaves_of(_MODELS[stage] if part == "model" else TrainerConfig).get(name)
    types = set() if field is None else _types(field.annotation)
    return int in types and float not in types


def _types(annotation: Any) -> set[Any]:
    inner = typing.get_args(annotation)
    return set().union(*map(_types, inner)) if inner else {annotation}


def sections(experiment: Any, values: Mapping[str, Value]) -> dict[str, Any]:
    """Values by path as the arguments of ``Experiment.with_settings``."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        stage, part, *names, last = path.split(".")
        given = getattr(getattr(experiment, stage), part)
        here = found.setdefault(stage, {}).setdefault(part, {})
        for name in names:
            given = given.get(name) if isinstance(given, Mapping) else None
            here = here.setdefault(name, dict(given) if isinstance(given, Mapping) else {})
        here[last] = value
    return found


def given_values(experiment: Any, space: Mapping[str, Dimension]) -> dict[str, Value]:
    """The values that the file itself has, as far as they are in the space."""
    found: dict[str, Any] = {}
    for path, dimension in space.items():
        stage, part, *names = path.split(".")
        here = getattr(getattr(experiment, stage), part)
        for name in names:
            here = here.get(name, ...) if isinstance(here, Mapping) else ...
        if dimension.contains(here):
            found[path] = here
    return found


def default_space(experiment: Any) -> dict[str, Dimension]:
    """Settings of the finetuning alone, so that all trials share one encoder, if any."""
    default = TrainerConfig.model_fields["base_lr"].default
    trainer = experiment.finetuning.trainer
    rate = float(trainer.get("base_lr", default))
    stack = "model.encoder_config"
    dropped = 0.75 if experiment.shape.get("window") else 0.5
    dropped = max(dropped, trainer.get("augment_drop_rate", 0.0))
    limits = {"trainer.augment_drop_rate": dropped, "model.head_drop_rate": 0.5}
    limits |= {f"{stack}.drop_path_rate": 0.3, f"{stack}.hidden_drop_rate": 0.3}
    if experiment.task == "classification":
        limits["trainer.label_smoothing"] = 0.2
    space = {name: Dimension(low=0.0, high=high) for name, high in limits.items()}
    space["trainer.base_lr"] = Dimension(low=rate / 10, high=rate * 5, log=True)
    space["trainer.optimizer_args.weight_decay"] = Dimension(low=1e-3, high=0.3, log=True)
    return {f"finetuning.{name}": dimension for name, dimension in space.items()}
