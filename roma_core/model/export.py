"""The classifier as a program of standard operators, for serving without this project.

Padded tensors with a key mask instead of packed rows: what is exported loads wherever torch does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from roma_core.model.classification import RoMAForClassification


class PaddedClassifier(nn.Module):
    """The same numbers as :class:`RoMAForClassification` in evaluation, from padded tokens."""

    def __init__(self, model: RoMAForClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """``(B, N, P)`` float32 tokens, ``(B, N, D)`` float32, ``(B, N)`` bool → ``(B, dim_output)``.

        Padding may hold any finite number. With a head on every token ``(B, N, dim_output)``, of
        which padding's rows mean nothing.
        """
        model = self.model
        x = model.projection(values)  # (B, N, d)
        if model.table is not None:
            shift = 0 if model.cls is None else 1
            x = x + model.table.table[shift : shift + x.shape[1]]
        if model.cls is not None:
            cls = model.cls if model.table is None else model.cls + model.table.table[0]
            x = torch.cat((cls.expand(x.shape[0], 1, -1), x), dim=1)
            positions = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
            valid = torch.cat((torch.ones_like(valid[:, :1]), valid), dim=1)
        rotations = None if model.rotation is None else model.rotation(positions)
        x = model.encoder.forward_padded(x, rotations, valid)
        first = 0 if model.cls is None else 1
        if model.config.pools == "cls":
            return model.head_of()(x[:, 0])
        if model.config.pools == "token":
            return model.head_of()(x[:, first:])
        weight = valid[:, first:, None].to(x.dtype)
        return model.head_of()((x[:, first:] * weight).sum(1) / weight.sum(1))


def export_classifier(model: RoMAForClassification) -> ExportedProgram:
    """Export with dynamic batch and length; ``model`` is put into evaluation mode.

    The program takes and returns what :class:`PaddedClassifier` does.
    """
    padded = PaddedClassifier(model.eval())
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
