"""How large a model and how long a training suit an amount of data: starting points, not truths.

A training is counted in optimiser steps: a few hundred series need many passes to make enough of
them, a million observations need few. Settings that come out here are written into a file, where
people see and change them; nothing looks at the data again when a training starts. They extend what
was chosen on validation series of PLAsTiCC, one seed each (`roma-pipeline results plasticc_settings`
compares it anew), to other amounts of data, and the neighbours that paid from new weights on OSULeaf
and PLAsTiCC (``neighbours``, ``neighbours_plasticc``); no search over many data sets stands behind them.
After pretraining neighbours were even on PLAsTiCC and missed on PickupGesture. PLAsTiCC's own
file pretrains 30 epochs, which paid there, and where labels are few it is worth trying.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

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
