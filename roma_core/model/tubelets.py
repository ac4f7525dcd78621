"""Values ↔ tokens: a tubelet is a block of time × height × width steps with all channels.

Shapes, here and in the rest of ``roma_core.model``:
    B series   N tokens of a series, padded   T tokens of a batch, packed   P numbers per tubelet
    D position axes   d width   h heads   V visible tokens   H hidden tokens
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

_VALUES = "b (t p1) c (y p2) (x p3)"
_TOKENS = "b (t y x) (p1 p2 p3 c)"


def _sides(tubelet_size: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("p1", "p2", "p3"), tubelet_size, strict=True))


def patchify(values: Tensor, tubelet_size: tuple[int, int, int]) -> Tensor:
    """Cut ``(B, time, C, height, width)`` into tokens ``(B, N, P)``.

    Tokens run time slowest, width fastest; inside a token the channel runs fastest
    (RoMAE paper, section 3.2).

    Raises:
        ValueError: ``values`` has not five axes, or a tubelet's side does not divide its axis.
    """
    if values.ndim != 5:
        raise ValueError(
            f"values must have five axes (batch, time, channels, height, width), absent ones of size 1; "
            f"got shape {tuple(values.shape)}"
        )
    sizes = values.shape[1], values.shape[3], values.shape[4]
    for name, size, side in zip(("time", "height", "width"), sizes, tubelet_size, strict=True):
        if size % side:
            raise ValueError(
                f"values: {name} has {size} steps, which tubelet_size={tubelet_size} does not divide; "
                f"{name} must be a multiple of {side}"
            )
    return rearrange(values, f"{_VALUES} -> {_TOKENS}", **_sides(tubelet_size))


def unpatchify(
    tokens: Tensor, tubelet_size: tuple[int, int, int], grid: tuple[int, int, int]
) -> Tensor:
    """The inverse of :func:`patchify`; ``grid`` counts the tokens along time, height and width."""
    t, y, x = grid
    return rearrange(tokens, f"{_TOKENS} -> {_VALUES}", t=t, y=y, x=x, **_sides(tubelet_size))
