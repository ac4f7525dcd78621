"""About how long a training takes on one idle CPU core. Imports no torch.

    seconds = layers · (micro-batches · 2.0 ms + numbers of tokens · 66 ns) + multiply-adds · 68 ps

A layer costs something to enter, however few tokens come; then what passes over every number of a token;
then the matrix products, which alone count once a model is wide. The constants were fitted to steps of
widths 32 to 512 on one core; ``python -m tests.benchmarks.duration`` compares them with this computer.
Evaluations and checkpoints come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from roma_core.model.config import NEIGHBOUR_FEATURES, EncoderConfig, RoMAForPreTrainingConfig
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.sizing import Amount

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
