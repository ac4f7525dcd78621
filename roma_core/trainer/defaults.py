"""Default settings for an amount of data, and the time that a training with them takes.

The defaults are starting points for a first experiment. The cost is that of one idle CPU core:

    seconds = layers · (micro-batches · 2.0 ms + numbers of tokens · 66 ns) + multiply-adds · 68 ps

The first term is a layer's overhead per micro-batch, the second its passes over every number of a
token, the third its matrix products, which dominate in wide models. The constants were fitted to steps
of widths 32 to 512 on one core; ``python -m tests.benchmarks.duration`` compares them with another
computer. Evaluations and checkpoints are not included. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from roma_core.model.config import NEIGHBOUR_FEATURES, EncoderConfig, RoMAForPreTrainingConfig
from roma_core.schema import TargetLevel
from roma_core.trainer.config import TrainerConfig

Stage = Literal["pretraining", "finetuning"]
PrimaryMetric = Literal["accuracy", "balanced_accuracy", "macro_f1", "auroc", "average_precision"]
_RARE, _MAX_IMBALANCE = 0.35, 3
_MIN_STEPS = {"pretraining": 600, "finetuning": 1200}
_MIN_EPOCHS = {"pretraining": 8, "finetuning": 16}
_SERIES_PER_BATCH = {"pretraining": 32, "finetuning": 16}
_MAX_TOKENS_PER_BATCH = {"pretraining": 4096, "finetuning": 2048}
_MIN_TOKENS_PER_BATCH = 256
_MIN_SERIES_FOR_BEST = 1000
_EARLY_STOPPING_BELOW = 5000  # irregular series; up to 2,000 were measured
_WINDOW = 8
_MIN_STEPS_OF_GRID = 64  # of a series, from which windows take the place of single observations
_MIN_FILL = 0.2  # observed share of these steps; convolutions compute the others, too
_COMPLETE = 0.95  # observed share of numbers from which training series stay as they are


@dataclass(frozen=True)
class DatasetSize:
    """Size of the train split."""

    n_series: int
    n_observations: int
    n_channels: int
    n_axes: int = 1
    grid_fill: float = 0.0  # observed share of the steps of a regular grid; 0: there is none
    observed: float = 1.0  # share of the numbers of all observations that is not missing

    @property
    def is_dense(self) -> bool:
        """Whether windows of a grid suit the series."""
        if self.n_axes > 1 or self.n_channels > 64 or self.grid_fill < _MIN_FILL:
            return False
        return self.mean_length >= _MIN_STEPS_OF_GRID * self.grid_fill  # with those not observed

    @property
    def mean_length(self) -> float:
        return self.n_observations / self.n_series


@dataclass
class DefaultSettings:
    """Settings of the trainings; without pretraining, finetuning starts from new weights."""

    trainings: dict[Stage, dict[str, Any]]  # "model" and "trainer" as in an experiment's file
    steps: dict[Stage, int]  # optimiser steps of each
    size: DatasetSize
    reasons: dict[str, str]  # a sentence for each choice, by section or setting

    @property
    def shape(self) -> dict[str, Any]:
        """``model`` of the first training, with the fields of input and encoder."""
        return next(iter(self.trainings.values()))["model"]


def default_settings(
    size: DatasetSize, targets: TargetLevel | None = None, pretrains: bool | None = None
) -> DefaultSettings:
    """Model and training settings for this much data.

    Args:
        targets: what has the targets of a regression; None: classes.
        pretrains: whether there is a pretraining; None: unless there are few dense series.
    """
    is_wide, is_few = size.n_channels > 64, size.n_series < _MIN_SERIES_FOR_BEST
    is_dense = size.is_dense and targets != "observation"
    at_once = _WINDOW if is_dense else 1
    width, depth = (128, 6) if size.n_series >= 20_000 or is_wide else (64, 4)
    stack = {"d_model": width, "nhead": width // 16}
    mask_ratio = 0.5 if size.mean_length < 50 else 0.75
    value_features, neighbours = (0, 0) if is_wide else (64, 5)
    use_cls = size.n_axes > 1
    rate = 0.003 * 64 / width
    pretrainer, pretraining_steps, pretraining_reason = _trainer("pretraining", size, rate, at_once)
    finetrainer, finetuning_steps, finetuning_reason = _trainer("finetuning", size, rate, at_once)
    if targets is None:
        finetrainer["label_smoothing"] = 0.05
    if not (is_few and is_dense):  # they learn for longer than a small validation split can say
        finetrainer["final_weights"] = "best"
        finetuning_reason += "; the weights are those that were best on validation"
    amount = f"{size.n_channels} channels" if is_wide else f"{size.n_series:,} training series"
    cls = "a CLS token at position 0 would make positions absolute, rarely useful"
    if use_cls:
        cls = "the CLS token at position 0 makes positions on every axis absolute"
    features = "a linear projection of few channels represents their levels poorly"
    differences = "a token includes its differences to observations up to 16 away"
    if is_wide:
        features = differences = "not needed with this many channels"
    embedding = {"value_features": value_features, "neighbours": neighbours}
    of_embedding = {
        "value_features": f"value_features {value_features}: {features}",
        "neighbours": f"neighbours {neighbours}: {differences}",
    }
    finetrainer["augment_drop_rate"] = 0.3
    if size.n_series < _EARLY_STOPPING_BELOW and not is_dense:
        often = max(10, finetuning_steps // 40)  # the least loss may come early
        finetrainer |= {"augment_drop_rate": 0.5, "ema_decay": 0.98, "best_metric": "eval/loss"}
        finetrainer |= {"eval_every": often, "early_stopping_patience": 12}
        finetrainer["augment_jitter_std"] = 0.0 if targets == "observation" else 0.1
        finetuning_reason += ", by the loss, as few series are soon overfitted"
    if is_dense:
        is_complete = size.grid_fill * size.observed >= _COMPLETE
        finetrainer["augment_drop_rate"] = 0.0 if is_complete else 0.5
        if is_complete:
            finetuning_reason += "; no observations are dropped: hardly any are missing"
            if is_few:
                finetrainer["base_lr"] = 0.001
                finetuning_reason += "; then few series are learnt better at a third of the rate"
        embedding = {"window": _WINDOW}
        on_grid = f"{size.mean_length:.0f} observations on a regular grid, {size.grid_fill:.0%} of its steps"
        of_embedding = {"window": f"window {_WINDOW}: {on_grid}; a token is {_WINDOW} steps"}
        if is_few:
            depth, finetrainer["encoder_lr_scale"] = 2, 0.03
            finetuning_reason += "; attention learns slower: it fits few series by heart"
    encoder = {**stack, "depth": depth}
    # without CLS at position 0, a second axis such as a band is known by differences only
    shape = {"encoder_config": encoder, "use_cls": use_cls, **embedding}
    dropouts = {"drop_path_rate": 0.1, "hidden_drop_rate": 0.1}
    finetuning: dict[str, Any] = {"encoder_config": dropouts, "head_drop_rate": 0.1}
    # the mean also where there is a CLS token
    finetuning["pooling"] = "token" if targets == "observation" else "mean"
    trainings: dict[Stage, dict[str, Any]] = {}
    steps: dict[Stage, int] = {}
    if pretrains or (pretrains is None and not (is_dense and is_few)):
        model = {**shape, "decoder_config": {**stack, "depth": 1}, "mask_ratio": mask_ratio}
        trainings["pretraining"] = {"model": model, "trainer": pretrainer}
        steps["pretraining"] = pretraining_steps
        of_embedding["mask_ratio"] = (
            f"mask_ratio {mask_ratio}: {size.mean_length:.0f} observations per series"
        )
    else:
        finetuning = {**shape, **finetuning, "encoder_config": {**encoder, **dropouts}}
        pretraining_reason = "no pretraining: few dense series are learnt better from new weights"
    trainings["finetuning"] = {"model": finetuning, "trainer": finetrainer}
    return DefaultSettings(
        trainings,
        steps | {"finetuning": finetuning_steps},
        size,
        {
            "model": f"width {width}, {depth} layers: {amount}",
            "use_cls": f"use_cls {str(use_cls).lower()}: {cls}",
            **of_embedding,
            "pretraining": pretraining_reason,
            "finetuning": finetuning_reason,
        },
    )


def primary_metric(
    wanted: PrimaryMetric | Literal["auto"], train: Mapping[str, int]
) -> tuple[PrimaryMetric, str]:
    """The metric by which a classifier is chosen and compared, and the reason.

    ``auto`` is AUROC where the rarer of two classes has less than 35 % of the training series, else
    accuracy where no class has more than three times as many as another, else macro F1.

    Args:
        train: training series of each class.
    """
    if wanted != "auto":
        return wanted, "set by primary_metric"
    least, most = min(train.values()), max(train.values())
    if len(train) == 2 and least < _RARE * (least + most):
        share = f"{100 * least / (least + most):.0f} % of the series, less than {100 * _RARE:g} %"
        return "auroc", f"the rarer of two classes has {share}"
    counts = f"{least:,} to {most:,} series per class"
    if most <= _MAX_IMBALANCE * least:
        return (
            "accuracy",
            f"the classes are balanced: {counts}, at most {_MAX_IMBALANCE} times as many",
        )
    return "macro_f1", f"the classes are imbalanced: {counts}, over {_MAX_IMBALANCE} times as many"


def _trainer(
    stage: Stage, size: DatasetSize, rate: float, at_once: int
) -> tuple[dict[str, Any], int, str]:
    """Trainer settings, their number of steps, and the reason; ``at_once``: observations of a token."""
    wanted = round(_SERIES_PER_BATCH[stage] * size.mean_length)
    most = _MAX_TOKENS_PER_BATCH[stage] * at_once
    tokens = min(most, max(wanted, _MIN_TOKENS_PER_BATCH))
    # long series make batches of fewer series, so there are more batches
    steps = _MIN_STEPS[stage] * max(1.0, wanted / tokens)
    per_epoch = max(1, round(size.n_observations / tokens))
    epochs = max(_MIN_EPOCHS[stage], math.ceil(steps / per_epoch))
    total = epochs * per_epoch
    interval = max(10, total // 10)  # a tenth of the steps, to one digit
    digit = 10 ** (len(str(interval)) - 1)
    interval = min(500, interval // digit * digit)
    trainer: dict[str, Any] = {"epochs": epochs, "tokens_per_batch": tokens, "base_lr": rate}
    trainer |= {"eval_every": interval, "save_every": interval, "mixed_precision": "auto"}
    reason = (
        f"{epochs} epochs of {per_epoch} step{'s' if per_epoch > 1 else ''} with about "
        f"{tokens / size.mean_length:.0f} series each: about {total:,} steps"
    )
    return trainer, total, reason


# seconds of entering a layer with a micro-batch, of a number of a token's vector through a layer, and
# of a multiply-add, forward and twice backward
_UNIT_COSTS = np.array([2.0e-3, 6.6e-8, 6.8e-11])


def cost_s(
    stage: Stage,
    config: RoMAForPreTrainingConfig,
    trainer: TrainerConfig,
    size: DatasetSize,
    fraction: float = 1.0,
) -> float:
    """Seconds of a training on one idle CPU core.

    Args:
        config: of the pretraining; finetuning has its input and encoder.
        size: of the train split.
        fraction: of the train split that is used.
    """
    encoder, decoder = config.encoder_config, config.decoder_config
    tokens, length, hidden = size.n_observations, size.mean_length, 0.0
    if stage == "pretraining":
        largest = config.mask_ratio if config.mask_ratio_max is None else config.mask_ratio_max
        hidden = (config.mask_ratio + largest) / 2
    visible = tokens * (1 - hidden)
    into, features = config.tubelet_width, config.value_features
    numbers: float = 0.0
    products: float = into * encoder.d_model + features * (into + encoder.d_model)
    if config.neighbours:
        numbers = 2 * config.neighbours * (into + config.n_pos_dims + 1)
        products += NEIGHBOUR_FEATURES * (into + numbers + encoder.d_model)
    encoded, seen = visible, length * (1 - hidden)  # tokens of the encoder, and those of a series
    if config.window:
        width, layers = config.stem_width, config.stem_layers
        steps = 1 / (size.grid_fill or 1)  # per observation
        encoded, seen = (x * min(1, steps / config.window) for x in (encoded, seen))
        numbers = steps * (layers + 1) * width
        products = 7 * steps * width * (2 * into + layers * width)
    work = visible * np.array([0.0, numbers, products])  # of the embedding of the input
    work += _stack(encoder, encoded, seen)
    if stage == "pretraining":
        full = seen + length * hidden
        work += _stack(decoder, tokens * full / length, full)
        work[2] += tokens * hidden * decoder.d_model * into
    if trainer.tokens_per_batch is None:
        micro_batches = math.ceil(fraction * size.n_series / trainer.batch_size)
    else:
        micro_batches = math.ceil(fraction * size.n_observations / trainer.tokens_per_batch)
    repeats = np.array([micro_batches, fraction, fraction])
    return trainer.epochs * float((repeats * work * _UNIT_COSTS).sum())


def _stack(stack: EncoderConfig, tokens: float, length: float) -> NDArray[np.float64]:
    """Layers, numbers and multiply-adds of a pass over the data."""
    inner = stack.nhead * stack.head_width
    per_token = 4 * stack.d_model * inner + 2 * stack.d_model * stack.mlp_width + 2 * length * inner
    return stack.depth * np.array([1.0, tokens * stack.d_model, tokens * per_token])
