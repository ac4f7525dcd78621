"""Our packed models against the published one written plainly: every variant, values and gradients."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from roma_core import RoMAForClassification, RoMAForPreTraining
from roma_core.model.weights import convert_published
from tests.core.model import reference

ENCODER = {"d_model": 24, "nhead": 2, "depth": 2, "layer_norm_eps": 1e-12}
DECODER = {"d_model": 12, "nhead": 1, "depth": 2, "layer_norm_eps": 1e-12}
SHARED = {
    "encoder_config": ENCODER,
    "use_cls": True,
    "pos_encoding": "ropend",
    "max_len": 60,
    "tubelet_size": [1, 1, 1],
    "n_channels": 2,
    "n_pos_dims": 1,
    "p_rope_val": 0.75,
    "head_drop_rate": 0.0,
}
VARIANTS = {
    "one axis": {},
    "two axes": {"n_pos_dims": 2},
    "three axes": {"n_pos_dims": 3},
    "without cls": {"use_cls": False, "n_pos_dims": 2},
    "absolute": {"pos_encoding": "absolute"},
    "absolute without cls": {"pos_encoding": "absolute", "use_cls": False},
    "nothing rotates": {"p_rope_val": 0.0},
    "half rotates": {"p_rope_val": 0.5, "n_pos_dims": 2},
    "all rotates": {"p_rope_val": 1.0, "n_pos_dims": 3},
    "heads that do not divide": {
        "encoder_config": ENCODER | {"d_model": 26, "nhead": 4},
        "n_pos_dims": 1,
    },
    "own mlp": {"encoder_config": ENCODER | {"dim_feedforward": 20}},
    "mlp ratio": {"encoder_config": ENCODER | {"mlp_ratio": 2.5}},
    "tubelets in time": {"tubelet_size": [2, 1, 1], "n_pos_dims": 2},
    "tubelets on three axes": {"tubelet_size": [2, 2, 3], "n_pos_dims": 3},
}


def inputs(document, dtype):
    """Three series of which two are padded, 8 tokens wide."""
    generator = torch.Generator().manual_seed(1)
    p1, p2, p3 = document["tubelet_size"]
    values = torch.randn(
        3, 8 * p1, document["n_channels"], p2, p3, generator=generator, dtype=dtype
    )
    positions = torch.rand(3, document["n_pos_dims"], 8, generator=generator).cumsum(2) * 5
    pad_mask = torch.arange(8) >= torch.tensor([[8], [5], [3]])
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, [1, 4, 5, 7]] = mask[1, [0, 6]] = mask[2, [2]] = True  # (1, 6) is padding: ignored
    return values, positions, pad_mask, mask


def published_folder(folder, document):
    weights = reference.random_weights(document, torch.Generator().manual_seed(0))
    save_file(weights, folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(document))
    return weights


def exact(weights):
    return {k: v.double().requires_grad_() for k, v in weights.items()}


def assert_equal_gradients(model, weights, document):
    gradients = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in weights.items()}
    gradients = convert_published(gradients, document)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("variant", [*VARIANTS, "normalised targets"])
def test_pretraining_equals_the_plain_model(variant, tmp_path):
    changes = VARIANTS.get(variant, {"tubelet_size": [2, 1, 1], "normalize_targets": True})
    document = SHARED | {"decoder_config": DECODER, "normalize_targets": False} | changes
    weights = published_folder(tmp_path, document)
    model = RoMAForPreTraining.from_pretrained(tmp_path)
    values, positions, pad_mask, mask = inputs(document, torch.float32)
    with torch.no_grad():
        expected, expected_loss = reference.pretraining(
            weights, document, values, positions, pad_mask, mask
        )
        logits, loss = model.eval()(values, positions, pad_mask, mask=mask)
    real = torch.cat([logits[b, :n] for b, n in enumerate((mask & ~pad_mask).sum(1))])
    torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-5)

    weights = exact(weights)
    reference.pretraining(weights, document, values.double(), positions, pad_mask, mask)[
        1
    ].backward()
    model.double()(values.double(), positions, pad_mask, mask=mask)[1].backward()
    assert_equal_gradients(model, weights, document)


@pytest.mark.parametrize("variant", VARIANTS)
def test_classification_equals_the_plain_model(variant, tmp_path):
    document = SHARED | {"dim_output": 5} | VARIANTS[variant]
    weights = published_folder(tmp_path, document)
    model = RoMAForClassification.from_pretrained(tmp_path)
    values, positions, pad_mask, _ = inputs(document, torch.float32)
    label = torch.tensor([4, 0, 2])
    with torch.no_grad():
        expected = reference.classification(weights, document, values, positions, pad_mask, label)
        logits, loss = model.eval()(values, positions, pad_mask, label)
    torch.testing.assert_close((logits, loss), expected, rtol=1e-4, atol=1e-5)

    weights = exact(weights)
    reference.classification(weights, document, values.double(), positions, pad_mask, label)[
        1
    ].backward()
    model.double()(values.double(), positions, pad_mask, label)[1].backward()
    assert_equal_gradients(model, weights, document)
