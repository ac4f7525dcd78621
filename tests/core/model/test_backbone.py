"""The part both models share: features, initial weights, projection and neighbours."""

from __future__ import annotations

import pytest
import torch

from roma_core import (
    RoMAForClassification,
)
from tests.benchmarks.timing import HostReads
from tests.core.model.small_models import (
    autoencoder,
    classifier,
    every_part,
    new_autoencoder,
    new_classifier,
    small_batch,
)


@pytest.mark.parametrize("use_cls", [True, False])
def test_features_pooled_and_per_token_belong_together(use_cls):
    for model in (new_autoencoder(use_cls=use_cls), new_classifier(use_cls=use_cls)):
        model.eval()
        values, positions, pad_mask = small_batch([8, 3, 5])
        by_token = model.embed(values, positions, pad_mask, pooling="token")
        assert by_token.shape == (3, 8, 24)
        assert not by_token[pad_mask].any()
        mean = model.embed(values, positions, pad_mask)
        torch.testing.assert_close(mean, by_token.sum(1) / torch.tensor([[8], [3], [5]]))
        alone = model.embed(values[1:2, :3], positions[1:2, :, :3])
        torch.testing.assert_close(mean[1:2], alone, rtol=1e-5, atol=1e-5)
        if use_cls:
            assert model.embed(values, positions, pad_mask, pooling="cls").shape == (3, 24)
        else:
            with pytest.raises(ValueError, match="use_cls=False"):
                model.embed(values, positions, pad_mask, pooling="cls")


@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_no_part_of_a_step_would_wait_for_a_gpu(make):
    model, batch = every_part(make)
    with HostReads() as reads:
        logits, loss = model(batch)
        (logits.sum() if loss is None else loss).backward()
    assert reads.operators > 300 and not reads.found


def test_both_models_start_as_declared():
    for model in (new_autoencoder(), new_classifier()):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all(), name
            elif name == "projection.bias":  # keeps a series of zeros off zero
                assert 0 < parameter.abs().max() < 0.1, name
            elif name.endswith("bias"):
                assert not parameter.any(), name
            else:
                std = 0.02 if parameter.ndim == 1 else (3 * parameter.shape[1]) ** -0.5
                assert parameter.abs().max() <= 2 * std, name
                if parameter.numel() > 500:  # 0.88 σ: cut at two of them
                    assert 0.8 < parameter.std() / std < 0.95, name


def test_features_of_the_numbers_bend_and_are_carried_over(tmp_path):
    model = new_autoencoder(value_features=32)
    heights = torch.linspace(-3, 3, 61)[:, None].expand(-1, model.config.tubelet_width)
    bent = model.projection(heights) - torch.lerp(
        *model.projection(heights[[0, -1]])[:, None], torch.linspace(0, 1, 61)[:, None]
    )
    model.save_pretrained(tmp_path)

    started = RoMAForClassification.from_pretrained(tmp_path, dim_output=3)

    assert bent.norm(dim=1).max() > 0.3
    assert torch.equal(started.projection.features.weight, model.projection.features.weight)
    assert torch.equal(started.projection(heights), model.projection(heights))
    assert new_classifier().projection.features is None


def test_neighbours_are_found_at_their_offsets_and_carried_over(tmp_path):
    model = new_autoencoder(neighbours=2)
    around = model.neighbourhood
    tokens, positions = torch.randn(7, 2), torch.tensor([[0.0], [2], [3], [9], [10], [11], [40]])
    series = torch.tensor([0] * 5 + [1] * 2)

    inputs = around._inputs(tokens, positions, series)
    model.save_pretrained(tmp_path)
    started = RoMAForClassification.from_pretrained(tmp_path, dim_output=3)

    assert around.offsets.tolist() == [-1, -2, 1, 2]
    of_second = inputs[1].split([2, 4, 4, 4, 4])
    assert torch.equal(of_second[0], tokens[1])
    for found, place in zip(of_second[1:], around.offsets.tolist(), strict=True):
        if place == -2:  # before the series begins
            assert not found.any()
            continue
        gap = torch.asinh(positions[1 + place] - positions[1])
        assert torch.equal(found, torch.cat((tokens[1 + place] - tokens[1], gap, torch.ones(1))))
    assert not inputs[5].split([2, 4, 4, 4, 4])[1].any()  # the other series is none of its business
    assert torch.equal(
        started.neighbourhood(tokens, positions, series), around(tokens, positions, series)
    )
    assert new_classifier().neighbourhood is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_as_a_whole_computes_and_learns(dtype):
    values, positions, pad_mask = small_batch([8, 5])
    for model in (new_autoencoder(), new_classifier()):
        exact = model.embed(values, positions, pad_mask)
        model.to(dtype)
        close = (
            {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        )
        features = model.embed(values.to(dtype), positions, pad_mask)
        assert features.dtype == dtype
        torch.testing.assert_close(features.float(), exact, **close)
        _, loss = model(values.to(dtype), positions, pad_mask, torch.tensor([0, 2]))
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
