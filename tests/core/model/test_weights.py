"""Weights on disk: what a transfer carries, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from roma_core import (
    RoMAForClassification,
)
from tests.core.model.small_models import autoencoder


def test_transfer_carries_projection_encoder_and_cls(tmp_path):
    pretrained = autoencoder()
    pretrained.data_schema = {"axes": ["time"]}
    pretrained.save_pretrained(tmp_path)

    model = RoMAForClassification.from_pretrained(tmp_path, dim_output=4)

    shared = [n for n, _ in model.named_parameters() if not n.startswith("head.")]
    assert {"cls", "projection.weight", "projection.bias"} < set(shared)
    for name in shared:
        assert torch.equal(model.get_parameter(name), pretrained.get_parameter(name)), name
    assert model.data_schema == {"axes": ["time"]}
    model.save_pretrained(tmp_path / "classifier")
    again = RoMAForClassification.from_pretrained(tmp_path / "classifier")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_contradicting_the_checkpoint_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="n_pos_dims=1 contradicts"):
        RoMAForClassification.from_pretrained(tmp_path, dim_output=4, n_pos_dims=1)
    with pytest.raises(ValueError, match="dim_output"):
        RoMAForClassification.from_pretrained(tmp_path)
