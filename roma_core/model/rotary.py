"""Rotary embedding of continuous positions on several axes (axial p-RoPE).

The pairs of channels of a head are shared out over the position axes. Of an axis with n pairs the
first r = ⌊p·n⌋ rotate, pair k by ``position / 10000^(k/n)`` radians: the fastest ones, the others
stay as they are (RoMAE, arXiv 2505.20535, section 3.1; partial rotation after Barbero et al.,
arXiv 2410.06205).

Inside a head, channels are laid out as all first halves, then all second halves, so that one
multiplication serves all axes. Published weights keep each axis's channels together;
``published_channels`` gives the permutation between both.
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
    starts = [axis * chunk + k for axis in range(n_axes) for k in range(chunk // 2)]
    return starts + [start + chunk // 2 for start in starts]


class Rotation(nn.Module):
    """Positions → cosines and sines, in float32 whatever the precision of the network."""

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
        self.timescales: Tensor
        self.register_buffer("axis_of_pair", torch.tensor(axis_of_pair), persistent=False)
        self.register_buffer("timescales", torch.tensor(timescales), persistent=False)

    @torch.no_grad()
    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``(…, D)`` float32 positions → cos and sin, each ``(…, 1, head_width // 2)`` float32."""
        angles = positions.float()[..., self.axis_of_pair] / self.timescales.float()
        return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``(…, h, head_width)`` queries or keys; the product is cast back to their dtype."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(
        x.dtype
    )
    return rotated if rest.shape[-1] == 0 else torch.cat((rotated, rest), dim=-1)
