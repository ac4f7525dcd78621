"""Masks: which tokens are hidden is a pure function of (seed, epoch, sample id, token index).

Each token's noise is an integer hash of those four; in every series the tokens of smallest noise
are hidden, on every rank and in every batch alike. Masks are computed on the host.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_core.hashing import hash_ints
from roma_core.model.config import RoMAForPreTrainingConfig
from roma_core.model.packing import PackedBatch, Segments

Int64 = NDArray[np.int64]
_STRATEGIES = ("random", "block", "future", "channel")
_COUNT = -1  # no token has this index, so the number of hidden tokens has a hash of its own


def draw_mask(
    batch: PackedBatch, config: RoMAForPreTrainingConfig, seed: int, epoch: int
) -> PackedBatch:
    """The batch with the tokens hidden that :func:`sample_hidden` chooses for this configuration."""
    channel = None
    if config.mask_strategy == "channel":
        channel = batch.positions[:, config.mask_axis].round().long()
    rule = config.mask_fractions, config.mask_strategy
    hidden = sample_hidden(batch.segments, batch.sample_ids, *rule, seed, epoch, channel)
    return batch.with_mask(hidden, config.missing_values)


def sample_hidden(
    segments: Segments,
    sample_ids: Tensor,
    fractions: tuple[Fraction, Fraction],
    strategy: str,
    seed: int,
    epoch: int,
    channel: Tensor | None = None,
) -> Tensor:
    """Choose the tokens to reconstruct.

    Args:
        sample_ids: ``(B,)`` int64, stable identifiers of the series.
        fractions: smallest and largest fraction of each series' tokens to hide, in ``[0, 1)``; every
            count between is equally likely.
        strategy: ``random`` tokens; one contiguous ``block``; the ``future``: the last ones; or
            whole ``channel``s, the last of them in part, so that every strategy hides equally many.
        channel: ``(T,)`` int64, the channel each token belongs to; for ``channel`` only.

    Returns:
        ``(T,)`` bool, True where hidden. Every series keeps at least one visible token.

    Raises:
        ValueError: unknown strategy, or no channels for ``channel``.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"unknown mask_strategy {strategy!r}; there are {', '.join(_STRATEGIES)}")
    if strategy == "channel" and channel is None:
        raise ValueError("mask_strategy 'channel' needs each token's channel")
    sizes, ids, index = _as_arrays(segments)
    least, most = fractions
    n_hidden = hidden_count(sizes, least)  # (B,)
    series_hash = hash_ints(seed, epoch, sample_ids.cpu().numpy())  # (B,)
    if most != least:
        choices = hidden_count(sizes, most) - n_hidden + 1
        n_hidden = n_hidden + hash_ints(series_hash, _COUNT) % choices
    if strategy in ("random", "channel"):  # tokens of equal unit are hidden together
        unit = index if channel is None or strategy == "random" else channel.cpu().numpy()
        noise = hash_ints(series_hash[ids], unit)
        hidden = _smallest_of_each(noise, n_hidden[ids], ids, index)
    else:
        start = sizes - n_hidden
        if strategy == "block":
            start = series_hash % (start + 1)
        hidden = (index >= start[ids]) & (index < (start + n_hidden)[ids])
    return torch.from_numpy(hidden).to(segments.device)


def mask_all_but(segments: Segments, sample_ids: Tensor, n_visible: int, seed: int) -> Tensor:
    """Hide all tokens of each series but ``n_visible`` random ones: ``(T,)`` bool, on CPU.

    A series of fewer tokens keeps them all. A larger number keeps those of a smaller one.

    Raises:
        ValueError: ``n_visible`` is below 1.
    """
    if n_visible < 1:
        raise ValueError(f"at least one token of each series must stay visible, not {n_visible}")
    sizes, ids, index = _as_arrays(segments)
    n_hidden = np.maximum(sizes - n_visible, 0)
    noise = hash_ints(hash_ints(seed, 0, sample_ids.numpy())[ids], index)
    return torch.from_numpy(_smallest_of_each(noise, n_hidden[ids], ids, index))


def hidden_count(lengths: Int64, fraction: Fraction) -> Int64:
    """⌈n · fraction⌉ in exact arithmetic, leaving at least one token visible; int64 like ``lengths``."""
    wanted = (lengths * fraction.numerator + fraction.denominator - 1) // fraction.denominator
    return wanted - ((wanted == lengths) & (lengths > 0)) * 1  # the fraction is below 1


def _as_arrays(segments: Segments) -> tuple[Int64, Int64, Int64]:
    """Sizes (B,) of the series; series and index in it (T,) of every token."""
    sizes = np.array(segments.lengths, dtype=np.int64)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    return sizes, ids, np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _smallest_of_each(noise: Int64, count: Int64, ids: Int64, index: Int64) -> NDArray[np.bool_]:
    """``(T,)`` bool: whether a token's noise is among the ``count`` smallest of its series.

    All are ``(T,)`` int64: noise in ``[0, 2**32)``, series ``ids`` ascending. Ties go by index.
    """
    # the r-th smallest of every series gets the row of its r-th token
    order = (ids * 2**32 + noise).argsort(stable=True)  # (T,)
    first = index < count
    first[order] = index < count  # the right side is complete before the left changes
    return first
