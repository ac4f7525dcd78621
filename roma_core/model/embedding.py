"""What the tokens around a token say about it: features of its place in the series' course.

Attention can find a token's neighbours by their rotations, but of few labelled series it learns that
late or never. Here every token is told from the first step on how it differs, in value and in
position, from those 1, 2, 4, 8, … places before and after it, as dilated convolutions would tell it;
gaps may be as irregular as they like. Only tokens that the encoder sees take part: in pretraining
nothing hidden shows, and places lie farther apart than in finetuning. ``roma-pipeline results
neighbours neighbours_plasticc`` measures what it is worth.

The places count in the order of positions, the first axis first, so the order in which the tokens of a
series come does not matter, except among those that no axis tells apart.

Shapes: ``roma_core.model.packing``; K places that are looked at.

The numbers of a token → its vector: a linear projection, and nonlinear features beside it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.config import NEIGHBOUR_FEATURES
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


class Neighbourhood(nn.Module):
    """``(T, P)`` tokens at ``(T, D)`` positions → ``(T, d)``, to be added to their projection."""

    places: Tensor  # (K,) int64, relative to the token's own

    def __init__(self, n_numbers: int, n_axes: int, reach: int, width: int) -> None:
        """
        Args:
            n_numbers, n_axes: P and D.
            reach: how many places are looked at on either side, 2^0, …, 2^(reach - 1) away; K is twice
                as many.
            width: of the token vectors, d.
        """
        super().__init__()
        ahead = [2**k for k in range(reach)]
        places = torch.tensor([*(-place for place in ahead), *ahead])
        self.register_buffer("places", places, persistent=False)
        n_inputs = n_numbers + 2 * reach * (n_numbers + n_axes + 1)
        self.features = nn.Linear(n_inputs, NEIGHBOUR_FEATURES)
        self.mix = nn.Linear(NEIGHBOUR_FEATURES, width, bias=False)

    def forward(self, tokens: Tensor, positions: Tensor, series: Tensor) -> Tensor:
        """
        Args:
            series: ``(T,)`` int64, which series each token belongs to.
        """
        order = _sorted_within(series, positions)
        inputs = self._inputs(tokens[order], positions[order], series[order])
        found = self.mix(F.silu(self.features(inputs)))
        return torch.zeros_like(found).index_copy(0, order, found)

    def of_padded(self, tokens: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """``(B, N, P)``, ``(B, N, D)`` and ``(B, N)`` bool → ``(B, N, d)``; padding's mean nothing."""
        n_series = valid.shape[0]
        series = torch.arange(n_series, device=valid.device)[:, None]
        series = torch.where(valid, series, n_series)  # padding is a series of its own
        found = self(tokens.flatten(0, 1), positions.flatten(0, 1), series.flatten())
        # by the sizes of positions: an exported program takes other tensors' for different numbers
        return found.unflatten(0, (positions.shape[0], positions.shape[1]))

    def _inputs(self, tokens: Tensor, positions: Tensor, series: Tensor) -> Tensor:
        """``(T, P + K (P + D + 1))``: the token, and of each place both differences and a 1.

        All three are 0 where the series ends before that place.
        """
        n = tokens.shape[0]
        wanted = torch.arange(n, device=tokens.device)[:, None] + self.places  # (T, K)
        there = wanted.clamp(0, n - 1)
        exists = (wanted == there) & (series[there] == series[:, None])
        differences = torch.cat(
            (
                tokens[there] - tokens[:, None],
                # gaps of days and of years are both to be felt
                torch.asinh(positions[there] - positions[:, None]).to(tokens.dtype),
                tokens.new_ones(n, len(self.places), 1),
            ),
            dim=2,
        )
        differences = differences.masked_fill(~exists[..., None], 0)
        return torch.cat((tokens, differences.flatten(1)), dim=1)

    @torch.no_grad()
    def initialise(self) -> None:
        """After :func:`roma_core.model.encoder.initialise`, which the mixing matrix keeps."""
        initialise_features(self.features)


def _sorted_within(series: Tensor, positions: Tensor) -> Tensor:
    """``(T,)`` int64: the rows by series, and in each by position, the first axis first."""
    order = torch.arange(positions.shape[0], device=positions.device)
    for key in (*reversed(positions.unbind(1)), series):
        order = order[key[order].argsort(stable=True)]
    return order
