"""Properties the models keep whatever the weights: padding, shifts, order, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from tests.core.model.small_models import autoencoder, classifier, padded_batch


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    extra=st.integers(0, 4),
    pooling=st.sampled_from(["cls", "mean"]),
    neighbours=st.sampled_from([0, 3]),
)
def test_padding_and_batch_order_change_no_logit(lengths, extra, pooling, neighbours):
    model = classifier(pooling=pooling, neighbours=neighbours)
    values, positions, pad_mask = padded_batch(lengths, max(lengths) + extra)
    with torch.no_grad():
        alone = [
            model(values[b : b + 1, :n], positions[b : b + 1, :, :n])[0]
            for b, n in enumerate(lengths)
        ]
        dirty = values.masked_fill(pad_mask[:, :, None, None, None], float("nan"))
        together, _ = model(dirty, positions, pad_mask)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-100, 100), n_axes=st.integers(1, 3), neighbours=st.sampled_from([0, 2]))
def test_without_cls_a_shift_of_all_positions_changes_nothing(shift, n_axes, neighbours):
    model = autoencoder(use_cls=False, n_pos_dims=n_axes, neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4], 8, n_axes)
    mask = torch.arange(8).remainder(2).eq(1).expand(2, -1)
    moved = positions.clone()
    moved[:, -1] += shift
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask, mask=mask)
        there, _ = model(values, moved, pad_mask, mask=mask)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)


@pytest.mark.parametrize("neighbours", [0, 3])
def test_hidden_values_cannot_influence_the_reconstruction(neighbours):
    model = autoencoder(neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4], 8)
    mask = torch.arange(8).remainder(3).eq(1).expand(2, -1)
    changed = values.masked_fill(mask[:, :, None, None, None], 1e3)
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask, mask=mask)
        there, _ = model(changed, positions, pad_mask, mask=mask)
    assert torch.equal(here, there)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_the_order_of_the_tokens_changes_no_logit(neighbours):
    model = classifier(neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4], 8)
    positions[:, 0] = positions[:, 0].round(decimals=-1)  # the second axis breaks ties
    order = torch.randperm(8)
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask)
        there, _ = model(values[:, order], positions[:, :, order], pad_mask[:, order])
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_unequal_masks_give_each_series_what_it_would_get_alone(neighbours):
    model = autoencoder(neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4, 6], 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, [1, 2, 5]] = mask[1, 3] = True
    mask[1, 6] = True  # padding: ignored
    with torch.no_grad():
        logits, loss = model(values, positions, pad_mask, mask=mask)
        first, _ = model(values[:1, :7], positions[:1, :, :7], mask=mask[:1, :7])
        second, _ = model(values[1:2, :4], positions[1:2, :, :4], mask=mask[1:2, :4])
    assert logits.shape == (3, 3, 2)
    torch.testing.assert_close(logits[0], first[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1, :1], second[0], rtol=1e-5, atol=1e-5)
    assert not logits[1, 1:].any() and not logits[2].any()
    targets = torch.stack([*values[0, [1, 2, 5], :, 0, 0], values[1, 3, :, 0, 0]])
    predicted = torch.cat([logits[0], logits[1, :1]])
    torch.testing.assert_close(loss, ((predicted - targets) ** 2).mean())


@pytest.mark.parametrize("use_cls", [True, False])
@pytest.mark.parametrize("encoding", ["ropend", "absolute"])
def test_every_parameter_receives_a_gradient(use_cls, encoding):
    values, positions, pad_mask = padded_batch([7, 4], 8)
    for model in (
        autoencoder(use_cls=use_cls, pos_encoding=encoding, neighbours=1),
        classifier(use_cls=use_cls, pos_encoding=encoding, neighbours=1),
    ):
        label = torch.tensor([0, 2])
        _, loss = model.train()(values, positions, pad_mask, label)
        loss.backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent


def test_a_series_of_zeros_has_finite_gradients_from_the_first_step():
    stack = EncoderConfig(d_model=16, nhead=2, depth=6)
    shape = {"encoder_config": stack, "tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}
    shape |= {"use_cls": False, "value_features": 0}
    for model in (
        RoMAForPreTraining(RoMAForPreTrainingConfig(**shape, decoder_config=stack)),
        RoMAForClassification(RoMAForClassificationConfig(**shape, dim_output=3)),
    ):
        _, loss = model(
            torch.zeros(2, 8, 2, 1, 1),
            torch.arange(8.0).expand(2, 1, 8),
            label=torch.tensor([0, 1]),
        )
        loss.backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        assert largest < 1e3
