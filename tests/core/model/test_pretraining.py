"""The masked autoencoder: reconstructions at any positions, in any units."""

from __future__ import annotations

import pytest
import torch

from roma_core.schema import DataSchema, Normaliser
from tests.core.model.small_models import new_autoencoder, small_batch


@pytest.mark.parametrize("use_cls", [True, False])
def test_reconstructing_hidden_tokens_at_their_own_positions_is_what_training_does(use_cls):
    model = new_autoencoder(use_cls=use_cls).eval()
    values, positions, pad_mask = small_batch([8, 5])
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, [1, 3]] = True
    with torch.no_grad():
        logits, _ = model(values, positions, pad_mask, mask=mask)
        asked = model.reconstruct(
            values[:, [0, 2, 4, 5, 6, 7]],
            positions[:, :, [0, 2, 4, 5, 6, 7]],
            pad_mask[:, [0, 2, 4, 5, 6, 7]],
            query_positions=positions[:, :, [1, 3]],
        )
    torch.testing.assert_close(asked.mean, logits, rtol=1e-5, atol=1e-5)
    assert asked.std is None


SCHEMA = {
    "channels": [{"name": "flux", "unit": "mJy"}, {"name": "error", "unit": "mJy"}],
    "axes": [{"name": "time", "unit": "d"}],
    "normalisation": [
        {"transform": "arcsinh", "transform_scale": 3.0, "mean": 0.5, "std": 2.0},
        {"mean": -1.0, "std": 10.0},
    ],
}


def test_reconstructions_come_in_the_units_of_the_data_with_their_deviation():
    model = new_autoencoder(predict_variance=True).eval()
    values, positions, pad_mask = small_batch([8, 5])
    grid = torch.linspace(0, 9, 4)[None]  # one grid for all series
    with torch.no_grad():
        plain = model.reconstruct(values, positions, pad_mask, query_positions=grid)
        model.data_schema = SCHEMA
        same = model.reconstruct(
            values, positions, pad_mask, query_positions=grid, denormalise=False
        )
        result = model.reconstruct(values, positions, pad_mask, query_positions=grid)
    assert torch.equal(plain.mean, same.mean) and result.mean.shape == (2, 4, 2)
    schema = DataSchema.model_validate(SCHEMA)
    expected = torch.from_numpy(Normaliser(schema).denormalise(plain.mean.numpy()))
    torch.testing.assert_close(result.mean, expected)
    assert result.std is not None and plain.std is not None
    torch.testing.assert_close(result.std[..., 1], plain.std[..., 1] * 10)
    above = torch.from_numpy(
        Normaliser(schema).denormalise((plain.mean + 1e-3 * plain.std).numpy())
    )
    torch.testing.assert_close((above - expected) / 1e-3, result.std, rtol=2e-2, atol=2e-2)


def test_a_gaussian_head_learns_the_spread_of_noise():
    torch.manual_seed(0)
    model = new_autoencoder(predict_variance=True, mask_ratio=0.5, n_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        values = 0.3 * torch.randn(32, 6, 1, 1, 1)
        _, loss = model(values, torch.arange(6.0).expand(32, 1, 6))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        result = model.eval().reconstruct(
            0.3 * torch.randn(32, 6, 1, 1, 1),
            torch.arange(6.0).expand(32, 1, 6),
            query_positions=torch.tensor([[2.5]]),
        )
    assert 0.25 < float(result.std.mean()) < 0.36


def test_reconstruct_refuses_models_that_cannot_do_it():
    values, positions, pad_mask = small_batch([8, 5])
    for model, message in (
        (new_autoencoder(pos_encoding="absolute"), "ropend"),
        (new_autoencoder(normalize_targets=True), "normalize_targets=False"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reconstruct(values, positions, pad_mask, query_positions=positions)
    with pytest.raises(
        ValueError, match=r"query_positions must have shape .* = \(2, 1, 3\), got \(2, 2, 3\)"
    ):
        new_autoencoder().reconstruct(
            values, positions, pad_mask, query_positions=torch.zeros(2, 3)
        )


def test_standardised_predictions_are_shown_at_the_level_of_their_tubelets():
    model = new_autoencoder(normalize_targets=True, tubelet_size=(2, 1, 1))
    values, _, _ = small_batch([8], 8)
    packed, _, _ = model.pack(values * 7 + 3, torch.arange(4.0)[None, None], None)
    packed = packed.with_mask(torch.tensor([True, False, True, False]))
    model.predict_hidden = lambda *_: torch.tensor([[0.0] * 4, [1.0] * 4])
    hidden = packed.tokens[[0, 2]]
    shown = model.reconstruct_hidden(packed, packed.masked)
    torch.testing.assert_close(shown[0], hidden[0].mean().expand(4))
    torch.testing.assert_close(
        shown[1], (hidden[1].mean() + hidden[1].std()).expand(4), rtol=1e-4, atol=1e-4
    )
