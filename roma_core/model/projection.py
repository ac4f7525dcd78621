"""The numbers of a token → its vector: a linear projection, and nonlinear features beside it.

A norm follows in the first block, and of a token of one or two numbers that are only projected it
leaves little but their sign: a curve's height is hard to tell. Features that bend with the numbers
say it from the first step on; ``roma-pipeline results plasticc_settings`` measures their worth.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.encoder import initialise

_BIAS_STD = 0.02


class Projection(nn.Linear):
    """``(…, P)`` → ``(…, d)``: linear with bias, as published, plus ``n_features`` of SiLU."""

    def __init__(self, n_numbers: int, width: int, n_features: int) -> None:
        super().__init__(n_numbers, width)
        self.features = self.mix = None
        if n_features:
            self.features = nn.Linear(n_numbers, n_features)
            self.mix = nn.Linear(n_features, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        linear = super().forward(x)
        if self.features is None or self.mix is None:
            return linear
        return linear + self.mix(F.silu(self.features(x)))

    @torch.no_grad()
    def initialise(self) -> None:
        """Like every matrix, but the features; without these, the bias keeps zeros off zero."""
        initialise(self)
        if self.features is None:
            # a series of zeros would stay one, and a norm's slope there is 1/√eps: the product of a
            # few such slopes is more than float32 holds
            nn.init.normal_(self.bias, std=_BIAS_STD)
        else:
            initialise_features(self.features)


@torch.no_grad()
def initialise_features(features: nn.Linear) -> None:
    """Features that bend within the spread of their inputs.

    The inputs are of about unit spread, their products with the weights of 1.4; biases of unit spread
    let the bends lie all over the range.
    """
    nn.init.normal_(features.weight, std=math.sqrt(2 / features.in_features))
    nn.init.normal_(features.bias)
