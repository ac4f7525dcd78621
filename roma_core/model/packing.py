"""Packed batches: all tokens of a batch in one tensor, series after series, without padding.

Shapes, here and in the rest of ``roma_core.model``:
    B series    N tokens of a series, padded    T tokens of all series    P numbers of a token
    D position axes    C channels    V visible tokens    H hidden tokens    d width    h heads
    K covariates of a series    R rows in front of its tokens: CLS and the covariates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from roma_core.model.config import RoMAConfig
from roma_core.model.positions import origin, to_float32, to_model_positions


class Segments:
    """Where each series lies among packed rows: b owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.

    Lengths are known on the host, so that no step waits for the device.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        self.device = torch.device(device)
        self._layouts: dict[int, Layout] = {}

    @property
    def count(self) -> int:
        """Series, B."""
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """Rows, T."""
        return sum(self.lengths)

    @cached_property
    def max_seqlen(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def sizes(self) -> Tensor:
        """``(B,)`` int64 lengths on the device."""
        return torch.tensor(self.lengths, dtype=torch.int64).to(self.device, non_blocking=True)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """``(B + 1,)`` int32 cumulative lengths on the device, from 0."""
        starts = torch.tensor((0, *self.lengths), dtype=torch.int64).cumsum(0)
        return starts.to(torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def ids(self) -> Tensor:
        """``(T,)`` int64: the series each row belongs to."""
        series = torch.arange(self.count, device=self.device)
        return series.repeat_interleave(self.sizes, output_size=self.total)

    @cached_property
    def index_in_series(self) -> Tensor:
        """``(T,)`` int64: 0 for the first row of each series."""
        return torch.arange(self.total, device=self.device) - self.cu_seqlens[:-1].long()[self.ids]

    def with_prefix(self, n: int) -> Layout:
        """Where rows go with ``n`` rows in front of each series' tokens."""
        if n not in self._layouts:
            rows = torch.arange(self.total, device=self.device)
            prefix = torch.arange(n, device=self.device)
            first = self.cu_seqlens[:-1].long() + n * torch.arange(self.count, device=self.device)
            self._layouts[n] = Layout(
                segments=Segments([m + n for m in self.lengths], self.device) if n else self,
                token_rows=rows + n * (self.ids + 1) if n else rows,
                prefix_rows=first[:, None] + prefix,
            )
        return self._layouts[n]

    def to(self, device: torch.device | str) -> Segments:
        return self if torch.device(device) == self.device else Segments(self.lengths, device)


@dataclass(frozen=True)
class Layout:
    """Where the rows of some series go in the encoder's input: CLS, covariates, tokens."""

    segments: Segments
    token_rows: Tensor  # (T,) int64
    prefix_rows: Tensor  # (B, R) int64, CLS first


@dataclass(frozen=True)
class MaskedTokens:
    """Which rows are visible and which are to be reconstructed, ascending within each series."""

    visible_rows: Tensor  # (V,) int64
    visible: Segments
    hidden_rows: Tensor  # (H,) int64
    hidden: Segments
    n_targets: float | None = None  # terms of the loss; None: one per hidden token

    @classmethod
    def of(cls, hidden: Tensor, segments: Segments) -> MaskedTokens:
        """Split by a ``(T,)`` bool mask, True where hidden. Costs one wait for the device on GPU."""
        if hidden.device.type != "cpu":
            counts = torch.zeros(segments.count, dtype=torch.int64, device=hidden.device)
            n_hidden = counts.index_add_(0, segments.ids, hidden.long()).tolist()
        else:
            so_far = np.zeros(len(hidden) + 1, dtype=np.int64)
            np.cumsum(hidden.numpy(), out=so_far[1:])
            ends = so_far[np.cumsum(np.array(segments.lengths, dtype=np.int64))]
            n_hidden = np.diff(ends, prepend=0).tolist()
        n_visible = [n - m for n, m in zip(segments.lengths, n_hidden, strict=True)]
        both = Segments(n_visible, segments.device), Segments(n_hidden, segments.device)
        return cls(_rows_where(~hidden), both[0], _rows_where(hidden), both[1])

    def map(self, move: Callable[[Tensor], Tensor], device: torch.device | str) -> MaskedTokens:
        rows = move(self.visible_rows), move(self.hidden_rows)
        both = self.visible.to(device), self.hidden.to(device)
        return MaskedTokens(rows[0], both[0], rows[1], both[1], self.n_targets)


def _rows_where(mask: Tensor) -> Tensor:
    """``(n,)`` int64, ascending: where ``(T,)`` bool is True."""
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # ten times as fast


@dataclass(frozen=True)
class PackedBatch:
    """A batch of series of different lengths, without padding, one after the other."""

    tokens: Tensor  # (T, P) float; NaN: not observed, for a model with missing_values
    positions: Tensor  # (T, D) float32; on an axis with categories their indices
    segments: Segments
    sample_ids: Tensor  # (B,) int64, stable over epochs and processes; masks depend on them
    indices: Tensor | None = None  # (B,) int64, rows of the data set the batch was drawn from
    # (B,) int64 classes or (B, K) float targets; for a head on every token (T,) or (T, K)
    labels: Tensor | None = None
    masked: MaskedTokens | None = None  # in pretraining; None lets the model draw
    covariates: Tensor | None = None  # (B, K) float32: numbers, indices of categories, NaN: missing
    # (T,) int64, where tokens with some numbers hidden have two rows; None: a row per token
    token_index: Tensor | None = None

    @property
    def index_in_series(self) -> Tensor:
        """``(T,)`` int64: the index of each row's token in its series."""
        return self.segments.index_in_series if self.token_index is None else self.token_index

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move everything; copies from pinned memory overlap with computation."""
        return self._map(lambda x: x.to(device, non_blocking=True), device)

    def pin_memory(self) -> PackedBatch:
        """Called by data loaders, so that :meth:`to` need not wait."""
        return self._map(torch.Tensor.pin_memory, self.segments.device)

    def _map(self, move: Callable[[Tensor], Tensor], device: torch.device | str) -> PackedBatch:
        return PackedBatch(
            tokens=move(self.tokens),
            positions=move(self.positions),
            segments=self.segments.to(device),
            sample_ids=move(self.sample_ids),
            indices=self.indices,  # read on the host only
            labels=None if self.labels is None else move(self.labels),
            masked=None if self.masked is None else self.masked.map(move, device),
            covariates=None if self.covariates is None else move(self.covariates),
            token_index=None if self.token_index is None else move(self.token_index),
        )

    def with_mask(self, hidden: Tensor, missing_values: bool = False) -> PackedBatch:
        """Hide the tokens where ``(T,)`` bool ``hidden`` is True.

        With ``missing_values`` the numbers of hidden tokens that were observed are counted, which costs
        a wait for the device on GPU.
        """
        masked = MaskedTokens.of(hidden, self.segments)
        if missing_values:
            targets = self.tokens[masked.hidden_rows]
            n_targets = float(targets.isfinite().sum()) / targets.shape[1]
            masked = replace(masked, n_targets=n_targets)
        return replace(self, masked=masked)


def patchify(values: Tensor, tubelet_size: tuple[int, int, int]) -> Tensor:
    """Cut ``(B, time, C, height, width)`` into tokens ``(B, N, P)`` (RoMAE paper, section 3.2).

    Tokens run time slowest, width fastest; inside a token the channel runs fastest.
    """
    if values.ndim != 5:
        raise ValueError(
            f"values must have five axes (batch, time, channels, height, width), absent ones of size 1; "
            f"got shape {tuple(values.shape)}"
        )
    for axis, name, side in zip((1, 3, 4), ("time", "height", "width"), tubelet_size, strict=True):
        if values.shape[axis] % side:
            raise ValueError(
                f"values: {name} has {values.shape[axis]} steps, which tubelet_size={tubelet_size} does "
                f"not divide; {name} must be a multiple of {side}"
            )
    sides = dict(zip(("p1", "p2", "p3"), tubelet_size, strict=True))
    return rearrange(values, "b (t p1) c (y p2) (x p3) -> b (t y x) (p1 p2 p3 c)", **sides)


def pack(
    values: Tensor,
    positions: Tensor,
    pad_mask: Tensor | None,
    config: RoMAConfig,
    covariates: Tensor | None = None,
) -> tuple[PackedBatch, Tensor, Tensor]:
    """Pack padded tensors, shortest series first so that equal lengths are adjacent.

    Args:
        values: ``(B, time, C, height, width)`` float; padding may hold anything. With ``missing_values``
            NaN marks numbers that were not observed, of which a real token has at least one observed.
        positions: ``(B, D, N)`` of any real type; on an axis with categories their indices.
        pad_mask: ``(B, N)`` bool, True where a token is padding; None: no padding.
        covariates: ``(B, K)``, numbers and indices of categories, NaN where missing.

    Returns:
        batch: without labels and mask; ``sample_ids`` count the rows of ``values``.
        order: ``(B,)`` int64, the row of ``values`` that became series b.
        rows: ``(T,)`` int64, the index of every packed token in the flattened ``(B * N)``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    tokens, valid = check_inputs(values, positions, pad_mask, config)
    axes = config.position_axes
    at = to_model_positions(positions, origin(positions, valid, axes), axes)
    return pack_tokens(tokens, at, valid, config, covariates)


def check_inputs(
    values: Tensor, positions: Tensor, pad_mask: Tensor | None, config: RoMAConfig
) -> tuple[Tensor, Tensor]:
    """Tokens ``(B, N, P)`` and ``(B, N)`` bool, True at real ones; errors as in :func:`pack`."""
    if not values.is_floating_point():
        raise TypeError(f"values must be floating point, got {values.dtype}")
    tokens = patchify(values, config.tubelet_size)  # (B, N, P)
    n_series, n_tokens, _ = tokens.shape
    if values.shape[2] != config.n_channels:
        raise ValueError(
            f"values have {values.shape[2]} channels (axis 2), but the model was built for "
            f"n_channels={config.n_channels}"
        )
    check_positions(positions, (n_series, config.n_pos_dims, n_tokens))
    if pad_mask is None:
        valid = torch.ones(n_series, n_tokens, dtype=torch.bool, device=values.device)
    else:
        if pad_mask.dtype != torch.bool:
            raise TypeError(f"pad_mask must be bool, True at padding, got {pad_mask.dtype}")
        if tuple(pad_mask.shape) != (n_series, n_tokens):
            raise ValueError(
                f"pad_mask must have shape (batch, tokens) = {(n_series, n_tokens)}, got {tuple(pad_mask.shape)}"
            )
        valid = ~pad_mask
    if n_series == 0 or n_tokens == 0:
        raise ValueError(f"values hold no tokens: their shape is {tuple(values.shape)}")
    if empty := (~valid.any(1)).nonzero().flatten().tolist():
        raise ValueError(
            f"every series needs at least one real token; got {n_series} series, of which rows {empty} "
            f"of pad_mask are all padding"
        )
    return tokens, valid


def check_positions(
    positions: Tensor, expected: tuple[int, int, int], name: str = "positions"
) -> None:
    """Raises TypeError or ValueError unless ``positions`` are real numbers of the expected shape."""
    if positions.dtype == torch.bool or positions.is_complex():
        raise TypeError(f"{name} must be real numbers, got {positions.dtype}")
    if tuple(positions.shape) != expected:
        raise ValueError(
            f"{name} must have shape (batch, n_pos_dims, tokens) = {expected}, got {tuple(positions.shape)}"
        )


def pack_tokens(
    tokens: Tensor,
    positions: Tensor,
    valid: Tensor,
    config: RoMAConfig,
    covariates: Tensor | None = None,
) -> tuple[PackedBatch, Tensor, Tensor]:
    """``(B, N, P)``, ``(B, D, N)`` float64 and ``(B, N)`` bool → what :func:`pack` returns."""
    n_series, n_tokens, width = tokens.shape
    lengths = valid.sum(1)  # (B,)
    order = lengths.argsort(stable=True)  # (B,)
    index = torch.arange(n_series * n_tokens, device=tokens.device).view(n_series, n_tokens)
    rows = index[order][valid[order]]  # (T,)
    packed = tokens.reshape(-1, width)[rows]
    at = positions.transpose(1, 2).flatten(0, 1)[rows]  # (T, D)
    observed = packed.isfinite()
    usable = observed.any(1) & ~packed.isinf().any(1) if config.missing_values else observed.all(1)
    for name, good in (("values", usable), ("positions", at.isfinite().all(1))):
        if not bool(good.all()):
            series, token = divmod(int(rows[(~good).nonzero()[0, 0]]), n_tokens)
            if name == "values" and config.missing_values:
                raise ValueError(
                    f"values of a real token must have a finite number, and NaN where one was not observed; "
                    f"series {series}, token {token} has infinity, or none"
                )
            raise ValueError(
                f"{name} must be finite at real tokens; series {series}, token {token} has NaN or infinity. "
                f"Leave unobserved tokens out or mark them in pad_mask"
            )
    for axis, size in enumerate(config.axis_categories):
        codes = at[:, axis]
        if size and bool(((codes < 0) | (codes >= size) | (codes != codes.round())).any()):
            raise ValueError(
                f"positions of axis {axis} must be indices of its {size} categories, 0 to {size - 1}; they "
                f"reach from {float(codes.min()):g} to {float(codes.max()):g}"
            )
    batch = PackedBatch(
        tokens=packed,
        positions=to_float32(at),
        segments=Segments(lengths[order].tolist(), tokens.device),
        sample_ids=order,
        covariates=None if covariates is None else covariates[order].float(),
    )
    return batch, order, rows


def unpack(packed: Tensor, segments: Segments, order: Tensor) -> Tensor:
    """``(T, …)`` rows → ``(B, longest series, …)``, zero past the end of a series.

    Series b becomes row ``order[b]``, the user's.
    """
    out = packed.new_zeros(segments.count, segments.max_seqlen, *packed.shape[1:])
    out[order[segments.ids], segments.index_in_series] = packed
    return out


def scatter(packed: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``(T, …)`` rows → ``(B, N, …)``, each at its index in the flattened ``shape``; padding is zero."""
    n_series, n_tokens = shape
    out = packed.new_zeros(n_series * n_tokens, *packed.shape[1:])
    return out.index_copy(0, rows, packed).unflatten(0, (n_series, n_tokens))
