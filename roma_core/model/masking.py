"""Masks: which tokens are hidden is a pure function of (seed, epoch, sample id, token index).

Each token's noise is an integer hash of those four; in every series the tokens of smallest noise
are hidden, on every rank and in every batch alike. Masks are computed on the host. Where a token has
several numbers of which some may be missing, single numbers can be hidden likewise.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_core.hashing import hash_ints
from roma_core.model.config import MaskStrategy, RoMAForPreTrainingConfig
from roma_core.model.packing import PackedBatch, Segments
from roma_core.model.windows import window_of

Int64 = NDArray[np.int64]
_STRATEGIES = get_args(MaskStrategy)
_N_WINDOWS = 8  # equal parts of a series' time, of which some are hidden
# no token has these indices, so the number of hidden tokens and the other draws have their own hashes
_COUNT, _CHOICE, _PHASE = -1, -2, -3


def draw_mask(
    batch: PackedBatch, config: RoMAForPreTrainingConfig, seed: int, epoch: int
) -> PackedBatch:
    """The batch with tokens, or numbers of tokens, hidden by the strategies of the configuration.

    A token of which only some numbers are hidden becomes two rows: a visible one without them, and at
    the same position a hidden one of them alone. ``token_index`` then tells the rows' tokens.
    """
    strategies, rule = config.mask_strategies, config.mask_fractions
    if list(strategies) == ["random"] and not config.window:  # without the detours below
        hidden = sample_hidden(batch.segments, batch.sample_ids, rule, "random", seed, epoch)
        return batch.with_mask(hidden, config.missing_values)
    by_number = any(map(config.hides_numbers, strategies))
    sizes, ids, index = _as_arrays(batch.segments)
    names = batch.sample_ids.cpu()
    keys = hash_ints(seed, epoch, names.numpy())  # (B,)
    ends = np.cumsum(list(strategies.values()))
    chosen = np.searchsorted(ends / ends[-1], hash_ints(keys, _CHOICE) / 2**32, side="right")
    found = np.zeros((len(ids), batch.tokens.shape[1] if by_number else 1), dtype=bool)
    for k, strategy in enumerate(strategies):
        mine = chosen == k  # (B,)
        row, number, unit = np.flatnonzero(mine[ids]), None, None
        if config.hides_numbers(strategy):
            observed = batch.tokens.isfinite().cpu().numpy()
            row, number = np.nonzero(observed & mine[ids][:, None])
            unit = torch.from_numpy(number % config.n_channels)
        elif strategy == "channel":
            unit = batch.positions[:, config.mask_axis].round().long().cpu()[row]
        elif strategy == "random" and config.window:
            at = batch.positions.cpu(), batch.segments.ids.cpu(), batch.segments.count
            unit = window_of(*at, config)[row]
        elif strategy == "window":
            time = batch.positions[:, config.rotary_axes[0]].double().cpu().numpy()
            unit = torch.from_numpy(_windows(time, sizes, ids, index, keys)[row])
        lengths = np.bincount(ids[row], minlength=len(sizes))[mine]
        segments = Segments(lengths.tolist())
        drawn = sample_hidden(segments, names[mine], rule, strategy, seed, epoch, unit).numpy()
        if number is None:
            found[row] = drawn[:, None]
        else:
            found[row, number] = drawn
    if by_number:
        return _with_hidden_numbers(batch, torch.from_numpy(found))
    hidden = torch.from_numpy(found[:, 0]).to(batch.segments.device)
    return batch.with_mask(hidden, config.missing_values)


def _windows(
    time: NDArray[np.float64], sizes: Int64, ids: Int64, index: Int64, keys: Int64
) -> Int64:
    """``(T,)`` the part of its series' time span that a token lies in; the first begins anywhere.

    Without a span, the token's index.
    """
    starts = np.cumsum(sizes) - sizes
    first = np.minimum.reduceat(time, starts)  # (B,)
    span = np.maximum.reduceat(time, starts) - first
    part = (time - first[ids]) / np.where(span > 0, span, 1)[ids]
    phase = hash_ints(keys, _PHASE) / 2**32
    return np.where(span[ids] > 0, np.floor(part * _N_WINDOWS + phase[ids]).astype(np.int64), index)


def _with_hidden_numbers(batch: PackedBatch, numbers: Tensor) -> PackedBatch:
    """Hide the observed numbers where ``(T, P)`` bool is True; see :func:`draw_mask`."""
    device = batch.segments.device
    observed = ~batch.tokens.isnan().cpu()
    hidden, seen = observed & numbers, observed & ~numbers
    both = hidden.any(1) & seen.any(1)
    rows = torch.arange(len(both)).repeat_interleave(1 + both.long())  # (T + H of both,)
    is_copy = torch.diff(rows, prepend=rows.new_tensor([-1])) == 0
    mask = is_copy | (hidden.any(1) & ~both)[rows]
    left_out = torch.where(mask[:, None], ~hidden[rows], ~seen[rows]).to(device)
    series = batch.segments.ids.cpu()[rows]
    index = batch.segments.index_in_series
    rows = rows.to(device)
    split = replace(
        batch,
        tokens=batch.tokens[rows].masked_fill(left_out, torch.nan),
        positions=batch.positions[rows],
        segments=Segments(series.bincount(minlength=batch.segments.count).tolist(), device),
        token_index=index[rows],
    )
    return split.with_mask(mask.to(device), missing_values=True)


def sample_hidden(
    segments: Segments,
    sample_ids: Tensor,
    fractions: tuple[Fraction, Fraction],
    strategy: str,
    seed: int,
    epoch: int,
    unit: Tensor | None = None,
) -> Tensor:
    """Choose the tokens to reconstruct.

    Args:
        sample_ids: ``(B,)`` int64, stable identifiers of the series.
        fractions: smallest and largest fraction of each series' tokens to hide, in ``[0, 1)``; every
            count between is equally likely.
        strategy: ``random`` tokens, or ``value``s if they are numbers; one contiguous ``block``; the
            ``future``: the last ones; or whole ``channel``s or time ``window``s, the last of them in
            part, so that every strategy hides equally many.
        unit: ``(T,)`` int64, the channel or window each token belongs to; for these two, and for
            ``random`` if whole windows of the model are hidden.

    Returns:
        ``(T,)`` bool, True where hidden. Every series keeps at least one visible token.

    Raises:
        ValueError: unknown strategy, or no units for ``channel`` or ``window``.
    """
    if strategy not in _STRATEGIES:
        raise ValueError(f"unknown mask_strategy {strategy!r}; there are {', '.join(_STRATEGIES)}")
    if strategy in ("channel", "window") and unit is None:
        raise ValueError(f"mask_strategy {strategy!r} needs each token's {strategy}")
    sizes, ids, index = _as_arrays(segments)
    least, most = fractions
    n_hidden = hidden_count(sizes, least)  # (B,)
    series_hash = hash_ints(seed, epoch, sample_ids.cpu().numpy())  # (B,)
    if most != least:
        choices = hidden_count(sizes, most) - n_hidden + 1
        n_hidden = n_hidden + hash_ints(series_hash, _COUNT) % choices
    if strategy not in ("block", "future"):  # tokens of equal unit are hidden together
        together = index if unit is None or strategy == "value" else unit.cpu().numpy()
        noise = hash_ints(series_hash[ids], together)
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
