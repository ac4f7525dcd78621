"""Augmentation of training series: drop, crop, channel drop, jitter, and hooks of one's own.

Every draw is a hash of (seed, epoch, what it is for, sample id), so it depends on no process, batch
or worker, and a resumed run draws what an unbroken one would have drawn. All series of a batch are
augmented at once.

Shapes:
    B series of a batch   T tokens of all of them   P numbers of a token, the channel fastest
    C channels   D axes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_core.hashing import hash_ints
from roma_core.trainer.config import TrainerConfig

# keep the hashes of one purpose apart from those of another; 1 and 3 are those of the epoch plan
_DROP, _CROP, _CHANNELS, _NOISE, _OWN = 2, 4, 5, 6, 7


@dataclass(frozen=True)
class Rows:
    """The tokens of some series, one series after the other.

    Attributes:
        tokens, positions: ``(T, P)`` and ``(T, D)`` float32; new tensors, not the data set's.
        lengths: ``(B,)`` int64 tokens of each series, at least 1.
        ids: ``(B,)`` int64, stable names of the samples.
        labels: ``(T,)`` or ``(T, K)``, for a head on every token; else None.
    """

    tokens: Tensor
    positions: Tensor
    lengths: NDArray[np.int64]
    ids: NDArray[np.int64]
    labels: Tensor | None = None

    @classmethod
    def of(cls, tokens: Sequence[Tensor], positions: Sequence[Tensor], ids: Sequence[int]) -> Rows:
        lengths = np.array([t.shape[0] for t in tokens])
        return cls(torch.cat(list(tokens)), torch.cat(list(positions)), lengths, np.array(ids))

    @cached_property
    def series(self) -> NDArray[np.int64]:
        """``(T,)`` index into ``lengths`` and ``ids`` of each token's series."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """``(T,)`` 0 for the first token of each series."""
        return np.arange(len(self.series)) - np.repeat(self._starts, self.lengths)

    @property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths) - self.lengths

    def only(self, kept: NDArray[np.bool_]) -> Rows:
        """The tokens where ``(T,)`` kept is True; at least one of every series must be."""
        rows = torch.from_numpy(np.flatnonzero(kept))
        lengths = np.bincount(self.series[kept], minlength=len(self.lengths))
        return replace(self._at(rows), lengths=lengths)

    def in_order(self, order: NDArray[np.int64]) -> Rows:
        """The series in another order: ``(B,)`` places in the present one."""
        lengths = self.lengths[order]
        shift = self._starts[order] - (np.cumsum(lengths) - lengths)  # of each series' tokens
        rows = np.arange(len(self.tokens)) + np.repeat(shift, lengths)
        return replace(self._at(torch.from_numpy(rows)), lengths=lengths, ids=self.ids[order])

    def _at(self, rows: Tensor) -> Rows:
        """Only what stands in these ``(n,)`` rows; ``lengths`` is then wrong."""
        return replace(
            self,
            tokens=self.tokens[rows],
            positions=self.positions[rows],
            labels=None if self.labels is None else self.labels[rows],
        )

    def split(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Tokens and positions of each series."""
        lengths = self.lengths.tolist()
        return self.tokens.split(lengths), self.positions.split(lengths)


Augmentation = Callable[[Rows, int, int], Rows]
"""``(rows, seed, epoch)`` → rows of the same series."""


@dataclass(frozen=True)
class Drop:
    """Leaves out up to ``rate`` of each series' tokens, anywhere."""

    rate: float

    def __call__(self, rows: Rows, seed: int, epoch: int) -> Rows:
        share = hash_ints(seed, epoch, _DROP, rows.ids) / 2**32 * self.rate  # (B,)
        n_dropped = np.minimum((share * rows.lengths).astype(np.int64), rows.lengths - 1)
        noise = hash_ints(seed, epoch, _DROP, rows.ids[rows.series], rows.index)  # (T,)
        rank = np.empty_like(rows.index)
        rank[np.lexsort((noise, rows.series))] = rows.index
        return rows.only(rank >= n_dropped[rows.series])


@dataclass(frozen=True)
class Crop:
    """Cuts off up to ``rate`` of the tokens at both ends together, and more if there are too many."""

    rate: float
    most_tokens: int | None = None

    def __call__(self, rows: Rows, seed: int, epoch: int) -> Rows:
        n = rows.lengths
        share = hash_ints(seed, epoch, _CROP, rows.ids, 0) / 2**32 * self.rate  # (B,)
        left = np.maximum(1, n - (share * n).astype(np.int64))
        left = np.minimum(left, self.most_tokens or left)
        place = hash_ints(seed, epoch, _CROP, rows.ids, 1) / 2**32
        start = (place * (n - left + 1)).astype(np.int64)
        index, series = rows.index, rows.series
        return rows.only((index >= start[series]) & (index < (start + left)[series]))


@dataclass(frozen=True)
class ChannelDrop:
    """Sets each channel of a series to 0, the mean of normalised values, with probability ``rate``.

    One channel stays.
    """

    rate: float
    n_channels: int

    def __call__(self, rows: Rows, seed: int, epoch: int) -> Rows:
        channels = np.arange(self.n_channels)
        chance = hash_ints(seed, epoch, _CHANNELS, rows.ids[:, None], channels) / 2**32  # (B, C)
        stays = chance >= self.rate
        stays[np.arange(len(stays)), chance.argmax(axis=1)] = True
        per_number = np.tile(stays, rows.tokens.shape[1] // self.n_channels)  # (B, P)
        return replace(rows, tokens=rows.tokens * torch.from_numpy(per_number[rows.series]))


@dataclass(frozen=True)
class Jitter:
    """Adds normal noise to values, and to positions on the first axis."""

    value_std: float
    position_std: float

    def __call__(self, rows: Rows, seed: int, epoch: int) -> Rows:
        width = rows.tokens.shape[1]
        key = (seed, epoch, _NOISE, rows.ids[rows.series][:, None], rows.index[:, None])
        noise = torch.from_numpy(_normal(key, np.arange(width + 1)))  # (T, P + 1)
        positions = rows.positions.clone()
        positions[:, 0] += self.position_std * noise[:, -1]
        return replace(
            rows, tokens=rows.tokens + self.value_std * noise[:, :-1], positions=positions
        )


def _normal(key: tuple[Any, ...], index: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard normal numbers (Box and Muller), in float32: its cosine takes a twentieth of the time."""
    uniform, turn = (
        (hash_ints(*key, index, k).astype(np.float32) + np.float32(0.5)) / np.float32(2**32)
        for k in (0, 1)
    )
    return np.sqrt(-2 * np.log(uniform)) * np.cos(np.float32(2 * np.pi) * turn)


@dataclass(frozen=True)
class Each:
    """An augmentation of one's own, of one series at a time.

    ``function(tokens (N, P), positions (N, D), random)`` returns tokens and positions of at least one
    token; ``random`` is a generator that belongs to this sample in this epoch.
    """

    function: Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]

    def __call__(self, rows: Rows, seed: int, epoch: int) -> Rows:
        changed = []
        for one, places, name in zip(*rows.split(), rows.ids.tolist(), strict=True):
            key = [hash_ints(seed, epoch, _OWN, name), hash_ints(seed, epoch, _OWN, name, 1)]
            own = self.function(one, places, np.random.default_rng(key))
            n, m = own[0].shape[0], own[1].shape[0]
            if n == 0 or n != m:
                raise ValueError(
                    f"the augmentation {self.function} left {n} tokens and {m} positions of sample "
                    f"{name}; it must leave at least one, and equally many"
                )
            changed.append(own)
        tokens, positions = zip(*changed, strict=True)
        return Rows.of(tokens, positions, rows.ids.tolist())


def augmentations_of(
    config: TrainerConfig, n_channels: int, dataset: Any = None
) -> tuple[Augmentation, ...]:
    """What the settings ask for, then the data set's own ``augmentations``, if it has any."""
    chosen: list[Augmentation] = []
    if config.augment_crop_rate > 0 or config.augment_crop_tokens is not None:
        chosen.append(Crop(config.augment_crop_rate, config.augment_crop_tokens))
    if config.augment_drop_rate > 0:
        chosen.append(Drop(config.augment_drop_rate))
    if config.augment_channel_drop_rate > 0:
        chosen.append(ChannelDrop(config.augment_channel_drop_rate, n_channels))
    if config.augment_jitter_std > 0 or config.augment_jitter_position > 0:
        chosen.append(Jitter(config.augment_jitter_std, config.augment_jitter_position))
    return (*chosen, *(Each(function) for function in getattr(dataset, "augmentations", ())))
