"""Parity with numbers of the published implementation (tests/golden, made by commit 480cfaf)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from roma_core import RoMAForClassification, RoMAForPreTraining

GOLDEN = Path(__file__).parents[2] / "golden"
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def case(name):
    folder = GOLDEN / name
    return (
        folder,
        load_file(folder / "inputs.safetensors"),
        load_file(folder / "outputs.safetensors"),
    )


@pytest.mark.parametrize("name", ["pretrain_series", "pretrain_padded"])
def test_pretraining_reconstructs_what_the_published_model_does(name):
    folder, inputs, outputs = case(name)
    model = RoMAForPreTraining.from_pretrained(folder).eval()
    pad_mask = inputs.get("pad_mask")

    with torch.no_grad():
        logits, loss = model(inputs["values"], inputs["positions"], pad_mask, mask=inputs["mask"])

    mask = inputs["mask"]
    if pad_mask is None:
        torch.testing.assert_close(logits, outputs["logits"], **CLOSE)
        torch.testing.assert_close(loss.reshape(1), outputs["loss"], **CLOSE)
        return
    # the published mask covers padding; its real hidden tokens come first in every row
    for row, n_real in enumerate((mask & ~pad_mask).sum(1).tolist()):
        torch.testing.assert_close(logits[row, :n_real], outputs["logits"][row, :n_real], **CLOSE)
        assert not logits[row, n_real:].any()
    # half of the published denominator is padding
    torch.testing.assert_close(loss.reshape(1), 2 * outputs["loss"], **CLOSE)


def test_classification_gives_the_published_logits_and_loss():
    folder, inputs, outputs = case("classify_padded")
    model = RoMAForClassification.from_pretrained(folder).eval()

    with torch.no_grad():
        logits, loss = model(
            inputs["values"], inputs["positions"], inputs["pad_mask"], inputs["label"]
        )

    torch.testing.assert_close(logits, outputs["logits"], **CLOSE)
    torch.testing.assert_close(loss.reshape(1), outputs["loss"], **CLOSE)


def test_padded_classifier_agrees_with_the_packed_one():
    folder, inputs, outputs = case("classify_padded")
    model = RoMAForClassification.from_pretrained(folder).eval()
    tokens = inputs["values"].flatten(2)  # tubelets of one step, (B, N, P)

    with torch.no_grad():
        logits = model.padded()(tokens, inputs["positions"].transpose(1, 2), ~inputs["pad_mask"])

    torch.testing.assert_close(logits, outputs["logits"], **CLOSE)
