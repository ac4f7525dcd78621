"""Padded input to packed batches: what is refused, by name."""

from __future__ import annotations

import pytest
import torch

from roma_core.model.packing import PackedBatch, Segments
from tests.core.model.small_models import (
    autoencoder,
    classifier,
    new_autoencoder,
    new_classifier,
    padded_batch,
    small_batch,
)


def _broken(name):
    values, positions, pad_mask = padded_batch([7, 4], 8)
    if name == "rank":
        return (values[..., 0], positions), "five axes"
    if name == "channels":
        return (values[:, :, :1], positions), "n_channels=2"
    if name == "axes":
        return (values, positions[:, :1]), "n_pos_dims"
    if name == "integer values":
        return (values.long(), positions), "floating point"
    if name == "nan":
        values[1, 3, 0] = float("nan")
        return (values, positions, pad_mask), "series 1, token 3"
    if name == "infinite position":
        positions[0, 1, 6] = float("inf")
        return (values, positions, pad_mask), "positions must be finite.*series 0, token 6"
    if name == "all padding":
        pad_mask[1] = True
        return (values, positions, pad_mask), r"rows \[1\]"
    return (values, positions, pad_mask.float()), "pad_mask must be bool"


@pytest.mark.parametrize(
    "name",
    [
        "rank",
        "channels",
        "axes",
        "integer values",
        "nan",
        "infinite position",
        "all padding",
        "float mask",
    ],
)
def test_bad_input_is_named(name):
    arguments, message = _broken(name)
    for model in (classifier(), autoencoder()):
        with pytest.raises((ValueError, TypeError), match=message):
            model(*arguments)


def test_unknown_keyword_and_all_hidden_are_refused():
    values, positions, pad_mask = padded_batch([7, 4], 8)
    with pytest.raises(TypeError, match="masks"):
        autoencoder()(values, positions, masks=pad_mask)
    with pytest.raises(ValueError, match=r"hides every real token of series \[0, 1\]"):
        autoencoder()(values, positions, pad_mask, mask=~pad_mask)
    with pytest.raises(ValueError, match="n_pos_dims=2"):
        batch = PackedBatch(torch.zeros(3, 2), torch.zeros(3, 1), Segments([3]), torch.tensor([0]))
        autoencoder()(batch)


def test_a_batch_of_nothing_is_named():
    values, positions, _ = small_batch([8])
    with pytest.raises(ValueError, match="no tokens"):
        new_autoencoder()(values[:0], positions[:0])


def test_an_exception_leaves_no_trace_in_the_next_call():
    model = new_classifier().eval()
    values, positions, pad_mask = small_batch([8, 5])
    before, _ = model(values, positions, pad_mask)
    with pytest.raises(ValueError, match="NaN"):
        model(values * torch.nan, positions, pad_mask)
    assert torch.equal(model(values, positions, pad_mask)[0], before)
