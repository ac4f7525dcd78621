"""Positions as a user has them → positions as the rotation takes them, at the padded edge.

Axes are described by the model's configuration (``position_axes``); without a description the
numbers are taken as they are. All arithmetic is in float64 and the result is rounded once, so that
dates such as MJD 60000.001 keep their fraction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from roma_core.data.schema import PositionAxis

_LARGEST_LOSS = 1e-3  # radians of the fastest rotation


def start_of(positions: Tensor, valid: Tensor, axes: Sequence[PositionAxis]) -> Tensor:
    """What is subtracted from the positions of each series: anchor and offset.

    Args:
        positions: ``(B, D, N)`` of any real type, in the axes' units.
        valid: ``(B, N)`` bool, True at real tokens; each series has one.

    Returns:
        ``(B, D, 1)`` float64.
    """
    start = positions.new_zeros(*positions.shape[:2], 1, dtype=torch.float64)
    for d, axis in enumerate(axes):
        if axis.anchor == "first":
            exact = positions[:, d].double().masked_fill(~valid, torch.inf)
            start[:, d] = exact.amin(1, keepdim=True)
        start[:, d] += axis.offset
    return start


def placed(positions: Tensor, start: Tensor, axes: Sequence[PositionAxis]) -> Tensor:
    """``(B, D, N)`` positions in the axes' units → ``(B, D, N)`` float64 as the model sees them."""
    scale = positions.new_ones(positions.shape[1], 1, dtype=torch.float64)
    for d, axis in enumerate(axes):
        scale[d] = axis.scale
    return (positions.double() - start) / scale


def in_float32(packed: Tensor) -> Tensor:
    """Round ``(T, D)`` float64 positions once.

    Raises:
        ValueError: float32 cannot hold them; absolute dates, for example.
    """
    rounded = packed.float()
    lost = (packed - rounded.double()).abs().amax(0) if len(packed) else packed.new_zeros(0)
    for d in (lost > _LARGEST_LOSS).nonzero().flatten().tolist():
        raise ValueError(
            f"positions of axis {d} reach {float(packed[:, d].abs().max()):,.0f}, where float32 loses up to "
            f"{float(lost[d]):.2g} of them; set position_axes in the model's configuration "
            f"(anchor='first' subtracts each series' first position), or subtract an origin before the call"
        )
    return rounded
