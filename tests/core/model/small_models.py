"""Small models and batches for the tests of the models."""

from __future__ import annotations

import torch

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.model.masking import draw_mask

STACK = EncoderConfig(d_model=24, nhead=2, depth=2)
SHAPE = {"encoder_config": STACK, "tubelet_size": (1, 1, 1), "n_channels": 2}


def classifier(**changes):
    torch.manual_seed(0)
    values = {**SHAPE, "n_pos_dims": 2, "dim_output": 3, **changes}
    return spread(RoMAForClassification(RoMAForClassificationConfig(**values))).eval()


def autoencoder(**changes):
    torch.manual_seed(0)
    values = {
        **SHAPE,
        "n_pos_dims": 2,
        "decoder_config": EncoderConfig(d_model=12, nhead=1, depth=2),
    }
    return spread(RoMAForPreTraining(RoMAForPreTrainingConfig(**values | changes))).eval()


def spread(model):
    """Weights large enough that no part is neutral."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1) * 0.5)
    return model


def padded_batch(lengths, n_tokens, n_axes=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    n = len(lengths)
    values = torch.randn(n, n_tokens, 2, 1, 1, generator=g, dtype=dtype)
    positions = torch.rand(n, n_axes, n_tokens, generator=g, dtype=dtype) * 40
    pad_mask = torch.arange(n_tokens) >= torch.tensor(lengths)[:, None]
    return values, positions, pad_mask


def every_part(make):
    """A model that ``make`` makes with every optional part, in training, and a packed batch for it."""
    parts = {"axis_categories": (0, 3), "covariates": (0, 4), "neighbours": 2}
    model = make(**parts, missing_values=True).train()
    values, positions, pad_mask = padded_batch([9, 4, 7, 7], 9)
    positions[:, 1] = positions[:, 1].floor() % 3
    values[:, ::3, 0] = torch.nan
    covariates = torch.tensor([[1, 2], [torch.nan, 1], [0, 0], [1, 3]])
    batch, _, _ = model.pack(values, positions, pad_mask, covariates)
    if isinstance(model, RoMAForPreTraining):
        batch = draw_mask(batch, model.config, 0, 0)
    return model, batch


NEW_SHAPE = {
    "encoder_config": EncoderConfig(d_model=24, nhead=2, depth=2),
    "tubelet_size": (1, 1, 1),
    "n_channels": 2,
    "n_pos_dims": 1,
}
DECODER = EncoderConfig(d_model=12, nhead=1, depth=2)


def new_autoencoder(**changes):
    torch.manual_seed(0)
    values = NEW_SHAPE | {"decoder_config": DECODER} | changes
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**values))


def new_classifier(**changes):
    torch.manual_seed(0)
    return RoMAForClassification(
        RoMAForClassificationConfig(**NEW_SHAPE | {"dim_output": 3} | changes)
    )


def small_batch(lengths, n_tokens=8):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(len(lengths), n_tokens, 2, 1, 1, generator=g)
    positions = torch.rand(len(lengths), 1, n_tokens, generator=g).cumsum(2)
    return values, positions, torch.arange(n_tokens) >= torch.tensor(lengths)[:, None]
