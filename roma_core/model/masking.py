"""Which tokens are hidden: a pure function of (seed, epoch, sample id, token index).

Each token's noise is an integer hash of those four; in every series the tokens of smallest noise
are hidden. So a series has the same mask on every rank, in every batch and on every device, and
nothing has to be saved to resume.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from roma_core.hashing import Ints, hash_ints
from roma_core.model.segments import Segments

_STRATEGIES = ("random", "block", "future", "channel")
_HOW_MANY = -1  # no token's place, so that the number hidden has a hash of its own


def hidden_count(lengths: Ints, fraction: Fraction) -> Ints:
    """⌈n · fraction⌉ in exact arithmetic, leaving at least one token visible; int64 like ``lengths``."""
    wanted = (lengths * fraction.numerator + fraction.denominator - 1) // fraction.denominator
    return wanted - ((wanted == lengths) & (lengths > 0)) * 1  # the fraction is below 1


def first_in_series(noise: Ints, count: Ints, ids: Ints, index: Ints) -> Ints:
    """``(T,)`` bool: whether fewer than ``count`` tokens of the same series have smaller noise.

    Ties go by index.

    Args:
        noise: ``(T,)`` int64 in ``[0, 2**32)``.
        count: ``(T,)`` int64, the same for all tokens of a series.
        ids: ``(T,)`` int64, ascending: the series of each token.
        index: ``(T,)`` int64, the token's place in it.
    """
    key = ids * 2**32 + noise
    # the r-th smallest of every series stands where its r-th token stood
    order = key.argsort(stable=True)  # (T,)
    first = index < count
    first[order] = index < count  # the right side is whole before the left changes
    return first


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
        segments: the series of the batch.
        sample_ids: ``(B,)`` int64, stable names of the series.
        fractions: least and largest share of each series' tokens to hide, in ``[0, 1)``; every number
            between is as likely.
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
    if strategy not in _STRATEGIES:
        raise ValueError(f"unknown mask_strategy {strategy!r}; there are {', '.join(_STRATEGIES)}")
    if strategy == "channel" and channel is None:
        raise ValueError("mask_strategy 'channel' needs to know each token's channel")
    if segments.device.type != "cpu":
        index = segments.index_in_series
        what = channel if strategy == "channel" else index
        return _drawn(
            fractions, strategy, seed, epoch, segments.sizes, segments.ids, index, sample_ids, what
        )
    # the same numbers in a fifth of the time: numpy's calls cost less
    sizes, ids, places = _as_arrays(segments)
    named = np.asarray(channel) if strategy == "channel" else places
    hidden = _drawn(
        fractions, strategy, seed, epoch, sizes, ids, places, np.asarray(sample_ids), named
    )
    return torch.from_numpy(hidden)


def sample_all_but(segments: Segments, sample_ids: Tensor, n_seen: int, seed: int) -> Tensor:
    """Hide all tokens of each series but ``n_seen`` random ones, where it has more: ``(T,)`` bool, on CPU.

    With the same seed, who sees more tokens sees those that others saw, too.

    Raises:
        ValueError: ``n_seen`` is below 1.
    """
    if n_seen < 1:
        raise ValueError(f"at least one token of each series must stay visible, not {n_seen}")
    sizes, ids, places = _as_arrays(segments)
    n_hidden = np.maximum(sizes - n_seen, 0)
    noise = hash_ints(hash_ints(seed, 0, np.asarray(sample_ids))[ids], places)
    return torch.from_numpy(first_in_series(noise, n_hidden[ids], ids, places))


def _as_arrays(segments: Segments) -> tuple[Ints, Ints, Ints]:
    """Sizes (B,) of the series; series and place in it (T,) of every token."""
    sizes = np.array(segments.lengths, dtype=np.int64)
    ids = np.repeat(np.arange(len(sizes)), sizes)
    return sizes, ids, np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _drawn(
    fractions: tuple[Fraction, Fraction],
    strategy: str,
    seed: int,
    epoch: int,
    sizes: Ints,
    ids: Ints,
    index: Ints,
    sample_ids: Ints,
    what: Ints,
) -> Ints:
    """``sample_hidden`` of tensors, or of arrays; ``what`` (T,) names what is hidden together."""
    least, most = fractions
    n_hidden = hidden_count(sizes, least)  # (B,)
    series_hash = hash_ints(seed, epoch, sample_ids)  # (B,)
    if most != least:
        choices = hidden_count(sizes, most) - n_hidden + 1
        n_hidden = n_hidden + hash_ints(series_hash, _HOW_MANY) % choices
    if strategy in ("random", "channel"):
        return first_in_series(hash_ints(series_hash[ids], what), n_hidden[ids], ids, index)
    start = sizes - n_hidden
    if strategy == "block":
        start = series_hash % (start + 1)
    return (index >= start[ids]) & (index < (start + n_hidden)[ids])
