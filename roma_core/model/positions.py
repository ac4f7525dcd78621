"""Positions: into the model's units, and into the network as rotations or as a table of sines.

``pos_encoding="ropend"`` rotates queries and keys by continuous positions on several axes (axial
p-RoPE). ``"absolute"`` adds a sine table indexed by token order to the inputs; it is kept to reproduce
published checkpoints, off-by-one included: with CLS the encoder's token n takes row n + 1, the
decoder's takes row n, and visible tokens are unmarked in the decoder.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from roma_core.schema import PositionAxis

BASE = 10_000.0
Rotations = Tensor | None  # (…, 1, w // 2, 2) float32: cosine and sine of every pair of channels
_MAX_ROUNDING = 1e-3  # radians of the fastest rotation


def origin(positions: Tensor, valid: Tensor, axes: Sequence[PositionAxis]) -> Tensor:
    """Anchor and offset of each series' ``(B, D, N)`` positions, ``(B, D, 1)`` float64.

    ``valid`` is ``(B, N)`` bool, True at real tokens, of which each series has one.
    """
    subtracted = positions.new_zeros(*positions.shape[:2], 1, dtype=torch.float64)
    for d, axis in enumerate(axes):
        if axis.anchor == "first":
            exact = positions[:, d].double().masked_fill(~valid, torch.inf)
            subtracted[:, d] = exact.amin(1, keepdim=True)
        subtracted[:, d] += axis.offset
    return subtracted


def to_model_positions(positions: Tensor, origin: Tensor, axes: Sequence[PositionAxis]) -> Tensor:
    """``(B, D, N)`` positions in the axes' units → ``(B, D, N)`` float64 as the model sees them.

    ``origin`` is :func:`origin`'s ``(B, D, 1)``.
    """
    scale = positions.new_ones(positions.shape[1], 1, dtype=torch.float64)
    for d, axis in enumerate(axes):
        scale[d] = axis.scale
    return (positions.double() - origin) / scale


def to_float32(packed: Tensor) -> Tensor:
    """Round ``(T, D)`` float64 positions; ValueError if float32 cannot hold them, as of dates."""
    rounded = packed.float()
    lost = (packed - rounded.double()).abs().amax(0) if len(packed) else packed.new_zeros(0)
    for d in (lost > _MAX_ROUNDING).nonzero().flatten().tolist():
        raise ValueError(
            f"positions of axis {d} reach {float(packed[:, d].abs().max()):,.0f}, where float32 loses up to "
            f"{float(lost[d]):.2g} of them; set position_axes in the model's configuration "
            f"(anchor='first' subtracts each series' first position), or subtract an origin before the call"
        )
    return rounded


def pairs_per_axis(head_width: int, n_axes: int) -> list[int]:
    """Divide ``head_width // 2`` channel pairs among the axes; the first axes take the remainder."""
    pairs, rest = divmod(head_width // 2, n_axes)
    return [pairs + (axis < rest) for axis in range(n_axes)]


class RotaryEmbedding(nn.Module):
    """Positions → rotations in float32; the fastest fraction ``p`` of each axis's pairs rotates."""

    def __init__(self, head_width: int, axes: Sequence[int], p: float) -> None:
        """``axes``: the columns of positions that rotate."""
        super().__init__()
        axis_of_pair: list[int] = []
        timescales: list[float] = []
        for axis, n_pairs in zip(axes, pairs_per_axis(head_width, len(axes)), strict=True):
            n_rotating = int(p * 2 * n_pairs) // 2
            axis_of_pair += [axis] * n_pairs
            timescales += [
                BASE ** (k / n_pairs) if k < n_rotating else float("inf") for k in range(n_pairs)
            ]
        self.axis_of_pair: Tensor
        self._timescale_bits: Tensor
        self.register_buffer("axis_of_pair", torch.tensor(axis_of_pair), persistent=False)
        # as integers, so that casting the whole model to 16 bits leaves them exact
        bits = torch.tensor(timescales).view(torch.int32)
        self.register_buffer("_timescale_bits", bits, persistent=False)

    @property
    def timescales(self) -> Tensor:
        """``(head_width // 2,)`` float32, units of position per radian; infinite: does not rotate."""
        return self._timescale_bits.view(torch.float32)

    @torch.no_grad()
    def forward(self, positions: Tensor) -> Tensor:
        """``(…, D)`` positions → ``(…, 1, head_width // 2, 2)`` float32: cosine and sine per pair."""
        angles = positions.float()[..., self.axis_of_pair] / self.timescales
        return torch.stack((angles.cos(), angles.sin()), dim=-1).unsqueeze(-3)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotate ``(…, h, head_width)`` queries or keys; the product is cast back to their dtype.

    A head of odd width keeps its last channel as it is.
    """
    width = 2 * rotations.shape[-2]
    paired = x if width == x.shape[-1] else x[..., :width].contiguous()
    exact = (paired if x.dtype == torch.float64 else paired.float()).unflatten(-1, (-1, 2))
    if x.is_cuda and torch.compiler.is_compiling():  # fuses there; complex numbers do not
        cos, sin = rotations.unbind(-1)
        first, second = exact.unbind(-1)
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        product = torch.view_as_complex(exact) * torch.view_as_complex(rotations)
        turned = torch.view_as_real(product)
    rotated = turned.flatten(-2).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


class SinusoidalEmbedding(nn.Module):
    """``(max_len, width)`` table: even columns ``sin(n / 10000^(2i/w))``, odd ones the cosine."""

    def __init__(self, max_len: int, width: int) -> None:
        super().__init__()
        rates = BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(max_len, dtype=torch.float64)[:, None] * rates
        table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1).float()
        self.table: Tensor
        self.register_buffer("table", table, persistent=False)

    def forward(self, index: Tensor) -> Tensor:
        """Rows of the table for ``(T,)`` int64 token indices."""
        return self.table[index]
