"""Classification and regression: a head on every token, labels."""

from __future__ import annotations

import pytest
import torch

from roma_core.model import EncoderConfig, RoMAForClassification, RoMAForClassificationConfig
from tests.core.model.small_models import new_classifier, small_batch


@pytest.mark.parametrize("problem_type", ["classification", "regression"])
def test_a_head_on_every_token_ignores_padding(problem_type):
    model = new_classifier(pooling="token", problem_type=problem_type)
    values, positions, pad_mask = small_batch([8, 3, 5])
    label = torch.randint(3, (3, 8)) if problem_type == "classification" else torch.randn(3, 8, 3)

    logits, loss = model(values, positions, pad_mask, label)

    assert logits.shape == (3, 8, 3)
    assert not logits[pad_mask].any() and logits[~pad_mask].any(-1).all()
    alone, _ = model(values[1:2, :3], positions[1:2, :, :3])
    torch.testing.assert_close(logits[1:2, :3], alone, rtol=1e-5, atol=1e-5)
    real, wanted = logits[~pad_mask], label[~pad_mask]
    expected = (
        torch.nn.functional.cross_entropy(real, wanted)
        if problem_type == "classification"
        else ((real - wanted) ** 2).mean()
    )
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="one entry per token"):
        model(values, positions, pad_mask, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("pooling", ["mean", "token"])
@pytest.mark.parametrize("has_variance", [False, True])
def test_a_regressor_answers_in_units_and_learns_standardised_numbers(pooling, has_variance):
    fields = {"pooling": pooling, "problem_type": "regression", "predict_variance": has_variance}
    plain = new_classifier(**fields)
    scales = torch.tensor([[50.0, 20], [0, 1], [-3, 0.1]])
    model = new_classifier(**fields, target_scales=scales.tolist())
    model.load_state_dict(plain.state_dict())
    values, positions, pad_mask = small_batch([8, 3, 5])
    mean, std = scales.T
    label = torch.randn((3, 8, 3) if pooling == "token" else (3, 3))

    raw, expected = plain(values, positions, pad_mask, label)
    outputs, loss = model(values, positions, pad_mask, label * std + mean)

    torch.testing.assert_close(loss, expected)
    real = ~pad_mask if pooling == "token" else slice(None)
    told, raw = outputs[real], raw[real]
    torch.testing.assert_close(told[..., :3], raw[..., :3] * std + mean)
    if has_variance:
        torch.testing.assert_close(told[..., 3:], raw[..., 3:] * std)
        nll = torch.nn.functional.gaussian_nll_loss(raw[..., :3], label[real], raw[..., 3:] ** 2)
        torch.testing.assert_close(loss, nll)
    tokens = values.permute(0, 1, 3, 4, 2).reshape(3, 8, -1)
    padded = model.eval().padded()(tokens, positions.transpose(1, 2), ~pad_mask)
    torch.testing.assert_close(padded[real], told, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling, label", [("cls", [0, 3]), ("token", [[0] * 7 + [-1]] * 2)])
def test_a_label_that_is_no_class_is_named(pooling, label):
    values, positions, _ = small_batch([8, 8])
    with pytest.raises(ValueError, match=r"classes from 0 to 2 \(dim_output=3\); row \d+ has"):
        new_classifier(pooling=pooling)(values, positions, label=torch.tensor(label))


@pytest.mark.parametrize("use_cls", [True, False])
def test_equal_values_tell_their_places_only_beside_a_cls_token(use_cls):
    torch.manual_seed(0)
    model = RoMAForClassification(
        RoMAForClassificationConfig(
            encoder_config=EncoderConfig(d_model=16, nhead=2, depth=2),
            tubelet_size=(1, 1, 1),
            n_channels=1,
            n_pos_dims=1,
            use_cls=use_cls,
            pooling="token",
            dim_output=1,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that no part is neutral
    places = torch.rand(1, 1, 10) * 49 + 1

    told = model(torch.ones(1, 10, 1, 1, 1), places)[0].squeeze().detach()

    spread = float((told - told.mean()).abs().max())
    assert (spread > 1e-2) is use_cls, "attention mixes equal values, whatever its weights"
