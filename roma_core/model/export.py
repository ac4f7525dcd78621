"""Models as ``torch.export`` programs of standard operators, for serving without this project.

They take padded tensors with a key mask instead of packed rows, and load wherever torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from roma_core.model.backbone import Backbone, Pooling
from roma_core.model.encoder import Head
from roma_core.model.prediction import RoMAForClassification


class PaddedModel(nn.Module):
    """Features as :meth:`Backbone.embed` gives them, or a head's outputs, from padded tokens."""

    def __init__(
        self, model: Backbone, pooling: Pooling = "mean", head: Head | None = None
    ) -> None:
        super().__init__()
        # its parts, not the model: a program saves every parameter that it can reach
        self.projection, self.encoder = model.projection, model.encoder
        self.neighbourhood, self.cls = model.neighbourhood, model.cls
        self.sinusoidal, self.rotary = model.sinusoidal, model.rotary
        self.pooling, self.head = pooling, head or nn.Identity()

    def forward(self, values: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """``(B, N, P)`` float32 tokens, ``(B, N, D)`` float32, ``(B, N)`` bool → ``(B, d)``.

        Padding may hold any finite number. With ``pooling="token"`` ``(B, N, d)``, arbitrary at
        padding. With a head its outputs take the place of d.
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
            return self.head(x[:, 0])
        if self.pooling == "token":
            return self.head(x[:, first:])
        weight = valid[:, first:, None].to(x.dtype)
        return self.head((x[:, first:] * weight).sum(1) / weight.sum(1))


def export_classifier(model: RoMAForClassification) -> ExportedProgram:
    """Export :class:`PaddedModel` with the head; ``model`` is put into evaluation mode."""
    return _export(PaddedModel(model.eval(), model.config.pools, model.require_head()), model)


def export_encoder(model: Backbone) -> ExportedProgram:
    """Export the mean of the encoder's tokens; ``model`` is put into evaluation mode."""
    return _export(PaddedModel(model.eval()), model)


def _export(padded: nn.Module, model: Backbone) -> ExportedProgram:
    widths = model.config.tubelet_width, model.config.n_pos_dims
    example = (*(torch.zeros(2, 5, n) for n in widths), torch.ones(2, 5, dtype=torch.bool))
    dynamic = {0: Dim("batch", min=1), 1: Dim("length", min=1)}
    with torch.no_grad():
        return torch.export.export(padded, example, dynamic_shapes=(dynamic, dynamic, dynamic))
