"""About how long a training takes on one idle CPU core. Imports no torch.

    seconds = layers · (micro-batches · 2.0 ms + numbers of tokens · 66 ns) + multiply-adds · 68 ps

A layer costs something to enter, however few tokens come; then what passes over every number of a token;
then the matrix products, which alone count once a model is wide. The constants were fitted to steps of
widths 32 to 512 on one core; ``python -m tests.benchmarks.duration`` compares them with this computer.
Evaluations and checkpoints come on top.

How large a model and how long a training suit an amount of data: starting points, not truths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from roma_core.model.config import NEIGHBOUR_FEATURES, EncoderConfig, RoMAForPreTrainingConfig
from roma_core.trainer.config import TrainerConfig

_FEWEST_STEPS = {"pretraining": 600, "finetuning": 1200}
_FEWEST_EPOCHS = {"pretraining": 8, "finetuning": 16}
_SERIES_PER_BATCH = {"pretraining": 32, "finetuning": 16}
_TOKENS_PER_BATCH = {"pretraining": 4096, "finetuning": 2048}  # at most
_LEAST_TOKENS = 256
_MANY_SERIES = 20_000
_WIDE_TOKENS = 64  # numbers in one observation
_VALUE_FEATURES = 64
_NEIGHBOURS = 5  # up to 16 places away
_LEARNING_RATE = 0.003  # at width 64; it shrinks as the width grows
_SHORT = 50  # observations in a series


@dataclass(frozen=True)
class Amount:
    """How much the train split holds."""

    n_series: int
    n_observations: int
    n_channels: int
    n_axes: int = 1

    @property
    def mean_length(self) -> float:
        return self.n_observations / self.n_series


@dataclass
class Sizes:
    """Settings of the two trainings, as an experiment's file has them, and why.

    Attributes:
        pretraining: ``model`` and ``trainer``.
        finetuning: ``model`` and ``trainer``.
        steps: optimiser steps of each.
        amount: of data that they are for.
        why: section → a sentence.
    """

    pretraining: dict[str, Any]
    finetuning: dict[str, Any]
    steps: dict[str, int]
    amount: Amount
    why: dict[str, str] = field(default_factory=dict)


def sizes_for(amount: Amount) -> Sizes:
    """Model and training settings for this much data."""
    large = amount.n_series >= _MANY_SERIES or amount.n_channels > _WIDE_TOKENS
    width, depth = (128, 6) if large else (64, 4)
    mask_ratio = 0.5 if amount.mean_length < _SHORT else 0.75
    rate = _LEARNING_RATE * 64 / width
    pretrainer, pre_steps, pre_why = _training("pretraining", amount, rate)
    finetrainer, fine_steps, fine_why = _training("finetuning", amount, rate)
    value_features = 0 if amount.n_channels > _WIDE_TOKENS else _VALUE_FEATURES
    neighbours = 0 if amount.n_channels > _WIDE_TOKENS else _NEIGHBOURS
    because = (
        f"{amount.n_channels} numbers in an observation"
        if amount.n_channels > _WIDE_TOKENS
        else f"{amount.n_series:,} series to train on"
    )
    return Sizes(
        pretraining={
            "model": {
                "encoder_config": {"d_model": width, "nhead": width // 16, "depth": depth},
                "decoder_config": {"d_model": width, "nhead": width // 16, "depth": 1},
                # without CLS at position 0, a second axis such as a band is known by differences only
                "use_cls": amount.n_axes > 1,
                "value_features": value_features,
                "neighbours": neighbours,
                "mask_ratio": mask_ratio,
            },
            "trainer": pretrainer,
        },
        finetuning={
            "model": {
                "encoder_config": {"drop_path_rate": 0.1, "hidden_drop_rate": 0.1},
                "head_drop_rate": 0.1,
                "pooling": "mean",  # also where there is a CLS vector
            },
            "trainer": {**finetrainer, "label_smoothing": 0.05, "augment_drop_rate": 0.3},
        },
        steps={"pretraining": pre_steps, "finetuning": fine_steps},
        amount=amount,
        why={
            "model": f"width {width}, {depth} layers: {because}",
            "mask_ratio": f"mask_ratio {mask_ratio}: {amount.mean_length:.0f} observations a series",
            "use_cls": (
                "use_cls true: by a token at position 0 every axis is known absolutely"
                if amount.n_axes > 1
                else "use_cls false: a token at position 0 would tell absolute places, seldom needed"
            ),
            "value_features": f"value_features {value_features}: "
            + (
                "heights of few numbers are hard to tell from a projection alone"
                if value_features
                else "an observation of so many numbers needs none"
            ),
            "neighbours": f"neighbours {neighbours}: "
            + (
                f"a token is shown how it differs from those up to {2 ** (neighbours - 1)} places beside it"
                if neighbours
                else "an observation of so many numbers says enough by itself"
            ),
            "pretraining": pre_why,
            "finetuning": fine_why,
        },
    )


def _training(name: str, amount: Amount, rate: float) -> tuple[dict[str, Any], int, str]:
    """Trainer settings, the steps they come to, and a sentence."""
    wanted = round(_SERIES_PER_BATCH[name] * amount.mean_length)
    tokens = min(_TOKENS_PER_BATCH[name], max(wanted, _LEAST_TOKENS))
    # batches of fewer series, because these are long, make up for it in number
    steps = _FEWEST_STEPS[name] * max(1.0, wanted / tokens)
    per_epoch = max(1, round(amount.n_observations / tokens))
    epochs = max(_FEWEST_EPOCHS[name], math.ceil(steps / per_epoch))
    total = epochs * per_epoch
    trainer = {
        "epochs": epochs,
        "tokens_per_batch": tokens,
        "base_lr": rate,
        "eval_every": _often(total),
        "save_every": _often(total),
    }
    why = (
        f"{epochs} epochs of {per_epoch} step{'s' if per_epoch > 1 else ''} with about "
        f"{tokens / amount.mean_length:.0f} series each: {total:,} steps"
    )
    return trainer, total, why


def _often(steps: int) -> int:
    """A tenth of the steps, to one digit, at most 500."""
    tenth = max(10, steps // 10)
    digit = 10 ** (len(str(tenth)) - 1)
    return min(500, tenth // digit * digit)


_ENTERING_S = 2.0e-3  # a layer, by a micro-batch
_NUMBER_S = 6.6e-8  # a number of a token's vector, through a layer
_MULTIPLY_ADD_S = 6.8e-11  # forward, and twice backward


@dataclass(frozen=True)
class _Work:
    """What one pass over the data asks of a part of the model."""

    layers: float = 0  # entered by each micro-batch
    numbers: float = 0
    multiply_adds: float = 0

    def __add__(self, other: _Work) -> _Work:
        return _Work(
            self.layers + other.layers,
            self.numbers + other.numbers,
            self.multiply_adds + other.multiply_adds,
        )


def pretraining_s(
    config: RoMAForPreTrainingConfig, trainer: TrainerConfig, amount: Amount, share: float = 1.0
) -> float:
    """Seconds of a pretraining.

    Args:
        amount: of data in the train split.
        share: of the train split that is used.
    """
    most = config.mask_ratio if config.mask_ratio_max is None else config.mask_ratio_max
    hidden = (config.mask_ratio + most) / 2
    tokens = amount.n_observations
    decoder = config.decoder_config
    work = (
        _projection(config.encoder_config, config, tokens * (1 - hidden))
        + _stack(config.encoder_config, tokens * (1 - hidden), amount.mean_length * (1 - hidden))
        + _stack(decoder, tokens, amount.mean_length)
        + _Work(multiply_adds=tokens * hidden * decoder.d_model * config.tubelet_width)
    )
    return _seconds(work, trainer, amount, share)


def finetuning_s(
    config: RoMAForPreTrainingConfig, trainer: TrainerConfig, amount: Amount, share: float = 1.0
) -> float:
    """Seconds of a finetuning, which has the input and the encoder of a pretraining."""
    stack, tokens = config.encoder_config, amount.n_observations
    work = _projection(stack, config, tokens) + _stack(stack, tokens, amount.mean_length)
    return _seconds(work, trainer, amount, share)


def _stack(stack: EncoderConfig, tokens: float, length: float) -> _Work:
    inner = stack.nhead * stack.head_width
    per_token = 4 * stack.d_model * inner + 2 * stack.d_model * stack.mlp_width + 2 * length * inner
    return _Work(
        layers=stack.depth,
        numbers=stack.depth * tokens * stack.d_model,
        multiply_adds=stack.depth * tokens * per_token,
    )


def _projection(stack: EncoderConfig, config: RoMAForPreTrainingConfig, tokens: float) -> _Work:
    into, features, width = config.tubelet_width, config.value_features, stack.d_model
    work = _Work(multiply_adds=tokens * (into * width + features * (into + width)))
    if config.neighbours:
        around = 2 * config.neighbours * (into + config.n_pos_dims + 1)
        features = NEIGHBOUR_FEATURES
        work += _Work(
            numbers=tokens * around, multiply_adds=tokens * features * (into + around + width)
        )
    return work


def _seconds(work: _Work, trainer: TrainerConfig, amount: Amount, share: float) -> float:
    """Of all epochs; the shape of the micro-batches decides how often layers are entered."""
    if trainer.tokens_per_batch is None:
        micro_batches = math.ceil(share * amount.n_series / trainer.batch_size)
    else:
        micro_batches = math.ceil(share * amount.n_observations / trainer.tokens_per_batch)
    once = work.numbers * _NUMBER_S + work.multiply_adds * _MULTIPLY_ADD_S
    return trainer.epochs * (micro_batches * work.layers * _ENTERING_S + share * once)
