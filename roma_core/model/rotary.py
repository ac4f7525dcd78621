"""Rotary embedding of continuous positions on several axes (axial p-RoPE).

The pairs of channels of a head are shared out over the position axes. Of an axis with n pairs the
first r = ⌊p·n⌋ rotate, pair k by ``position / 10000^(k/n)`` radians: the fastest ones, the others
stay as they are (RoMAE, arXiv 2505.20535, section 3.1; partial rotation after Barbero et al.,
arXiv 2410.06205).

Inside a head, the two channels of a pair stand side by side, so that a rotation is one product of
complex numbers, for all axes at once and without a copy. Published weights keep each axis's first
halves and second halves apart; ``published_channels`` gives the permutation between both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BASE = 10_000.0


def pairs_per_axis(head_width: int, n_axes: int) -> list[int]:
    """Share ``head_width // 2`` pairs out over the axes, the first ones getting what is left over."""
    pairs, rest = divmod(head_width // 2, n_axes)
    return [pairs + (axis < rest) for axis in range(n_axes)]


def published_channels(head_width: int, n_axes: int) -> list[int]:
    """For each channel of our head layout, its place in the published one.

    Raises:
        ValueError: the published layout does not exist for this width.
    """
    chunk = head_width // n_axes
    if head_width % n_axes or chunk % 2:
        raise ValueError(
            f"published weights split a head of width {head_width} into {n_axes} even chunks, which is impossible"
        )
    firsts = [axis * chunk + k for axis in range(n_axes) for k in range(chunk // 2)]
    return [channel for first in firsts for channel in (first, first + chunk // 2)]


class Rotation(nn.Module):
    """Positions → rotations, in float32 whatever the precision of the network."""

    def __init__(self, head_width: int, n_axes: int, p: float) -> None:
        super().__init__()
        axis_of_pair: list[int] = []
        timescales: list[float] = []
        for axis, n_pairs in enumerate(pairs_per_axis(head_width, n_axes)):
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
        """``(head_width // 2,)`` float32, units of position per radian; infinite: never turns."""
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
