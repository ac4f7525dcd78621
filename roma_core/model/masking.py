"""Which tokens are hidden: a pure function of (seed, epoch, sample id, token index).

Each token's noise is an integer hash of those four; in every series the tokens of smallest noise
are hidden. So a series has the same mask on every rank, in every batch and on every device, and
nothing has to be saved to resume.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from roma_core.hashing import hash_ints
from roma_core.model.segments import Segments


def hidden_count(lengths: Tensor, fraction: Fraction) -> Tensor:
    """⌈n · fraction⌉ in exact arithmetic, leaving at least one token visible; int64 like ``lengths``."""
    wanted = (lengths * fraction.numerator + fraction.denominator - 1) // fraction.denominator
    return torch.minimum(wanted, (lengths - 1).clamp(min=0))


def rank_in_series(noise: Tensor, segments: Segments) -> Tensor:
    """``(T,)`` int64: how many tokens of the same series have smaller noise; ties go by index.

    ``noise`` is ``(T,)`` int64 in ``[0, 2**32)``.
    """
    order = (segments.ids * 2**32 + noise).argsort(stable=True)  # (T,)
    rank = torch.empty_like(order)
    rank[order] = segments.index_in_series
    return rank


def sample_hidden(
    segments: Segments,
    sample_ids: Tensor,
    fraction: Fraction,
    strategy: str,
    seed: int,
    epoch: int,
    channel: Tensor | None = None,
) -> Tensor:
    """Choose the tokens to reconstruct.

    Args:
        segments: the series of the batch.
        sample_ids: ``(B,)`` int64, stable names of the series.
        fraction: share of each series' tokens to hide, in ``[0, 1)``.
        strategy: ``random`` tokens; one contiguous ``block``; the ``future``: the last ones; or
            whole channels, for tokens that are one observation of one ``channel`` each. The last
            channel to be hidden may be hidden in part, from its first token on, so that every
            strategy hides equally many.
        channel: ``(T,)`` int64, the channel each token belongs to; for ``channel`` only.

    Returns:
        ``(T,)`` bool, True where hidden. Every series keeps at least one visible token.

    Raises:
        ValueError: unknown strategy, or no channels for ``channel``.
    """
    n_hidden = hidden_count(segments.sizes, fraction)  # (B,)
    series_hash = hash_ints(seed, epoch, sample_ids)  # (B,)
    index = segments.index_in_series  # (T,)
    if strategy in ("random", "channel"):
        if strategy == "channel" and channel is None:
            raise ValueError("mask_strategy 'channel' needs to know each token's channel")
        noise = hash_ints(series_hash[segments.ids], index if channel is None else channel)
        return rank_in_series(noise, segments) < n_hidden[segments.ids]
    if strategy == "block":
        start = series_hash % (segments.sizes - n_hidden + 1)
    elif strategy == "future":
        start = segments.sizes - n_hidden
    else:
        raise ValueError(
            f"unknown mask_strategy {strategy!r}; there are random, block, future and channel"
        )
    return (index >= start[segments.ids]) & (index < (start + n_hidden)[segments.ids])
