"""Models as ``torch.export`` programs of standard operators, for serving without this project.

They take padded tensors with a key mask instead of packed rows, and load wherever torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from roma_core.model.backbone import Backbone
from roma_core.model.prediction import RoMAForClassification


class PaddedEncoder(nn.Module):
    """The encoder's features as :meth:`Backbone.embed` gives them, from padded tokens."""

    def __init__(self, model: Backbone, pooling: str = "mean") -> None:
        super().__init__()
        # its parts, not the model: a program saves every parameter that it can reach
        self.projection, self.encoder = model.projection, model.encoder
        self.neighbourhood, self.cls = model.neighbourhood, model.cls
        self.sinusoidal, self.rotary = model.sinusoidal, model.rotary
        self.pooling = pooling

    def forward(self, values: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """``(B, N, P)`` float32 tokens, ``(B, N, D)`` float32, ``(B, N)`` bool → ``(B, d)``.

        Padding may hold any finite number. With ``pooling="token"`` ``(B, N, d)``, arbitrary at
        padding.
        """
        x = self.projection(values)  # (B, N, d)
        if self.neighbourhood is not None:
            x = x + self.neighbourhood.forward_padded(values, positions, valid)
        if self.sinusoidal is not None:
            shift = 0 if self.cls is None else 1
            x = x + self.sinusoidal.table[shift : shift + x.shape[1]]
        if self.cls is not None:
            cls = self.cls if self.sinusoidal is None else self.cls + self.sinusoidal.table[0]
            x = torch.cat((cls.expand(x.shape[0], 1, -1), x), dim=1)
            positions = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
            valid = torch.cat((torch.ones_like(valid[:, :1]), valid), dim=1)
        rotations = None if self.rotary is None else self.rotary(positions)
        x = self.encoder.forward_padded(x, rotations, valid)
        first = 0 if self.cls is None else 1
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "token":
            return x[:, first:]
        weight = valid[:, first:, None].to(x.dtype)
        return (x[:, first:] * weight).sum(1) / weight.sum(1)


class PaddedClassifier(nn.Module):
    """The same numbers as :class:`RoMAForClassification` in evaluation, from padded tokens."""

    def __init__(self, model: RoMAForClassification) -> None:
        super().__init__()
        self.encoder = PaddedEncoder(model, model.config.pools)
        self.head = model.require_head()

    def forward(self, values: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """Shapes as for :class:`PaddedEncoder` → ``(B, dim_output)``; per token ``(B, N, dim_output)``."""
        return self.head(self.encoder(values, positions, valid))


def export_classifier(model: RoMAForClassification) -> ExportedProgram:
    """Export with dynamic batch and length; ``model`` is put into evaluation mode.

    The program takes and returns what :class:`PaddedClassifier` does.
    """
    return _exported(PaddedClassifier(model.eval()), model)


def export_encoder(model: Backbone) -> ExportedProgram:
    """Export the mean of the encoder's tokens; ``model`` is put into evaluation mode."""
    return _exported(PaddedEncoder(model.eval()), model)


def _exported(padded: nn.Module, model: Backbone) -> ExportedProgram:
    width, axes = model.config.tubelet_width, model.config.n_pos_dims
    example = (
        torch.zeros(2, 5, width),
        torch.zeros(2, 5, axes),
        torch.ones(2, 5, dtype=torch.bool),
    )
    batch, length = Dim("batch", min=1), Dim("length", min=1)
    dynamic = {0: batch, 1: length}
    with torch.no_grad():
        return torch.export.export(padded, example, dynamic_shapes=(dynamic, dynamic, dynamic))
