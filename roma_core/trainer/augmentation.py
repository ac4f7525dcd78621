"""Augmentation of training series: drop, crop, channel drop, jitter, and functions of the data set's own.

Every draw is a hash of (seed, epoch, purpose, sample id), so it depends on no process, batch or
worker, and a resumed run draws what an uninterrupted one would have drawn. All series of a batch are
augmented at once.

Shapes:
    B series of a batch   T tokens of all of them   P numbers of a token, the channel fastest
    C channels   D axes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_core.data.ragged import RaggedBatch
from roma_core.hashing import hash_ints
from roma_core.trainer.config import TrainerConfig

# keep the hashes of one purpose apart from those of another; 1 and 3 are those of the sampler
_DROP, _CROP, _CHANNELS, _NOISE, _CUSTOM = 2, 4, 5, 6, 7

Augmentation = Callable[[RaggedBatch, int, int], RaggedBatch]
"""``(batch, seed, epoch)`` → a batch of the same series; the arrays of the first stay as they are."""


@dataclass(frozen=True)
class Drop:
    """Leaves out up to ``rate`` of each series' tokens, anywhere."""

    rate: float

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        fraction = hash_ints(seed, epoch, _DROP, batch.ids) / 2**32 * self.rate  # (B,)
        n_dropped = np.minimum((fraction * batch.lengths).astype(np.int64), batch.lengths - 1)
        noise = hash_ints(seed, epoch, _DROP, batch.ids[batch.series], batch.index)  # (T,)
        rank = np.empty_like(batch.index)
        rank[np.lexsort((noise, batch.series))] = batch.index
        return batch.select(rank >= n_dropped[batch.series])


@dataclass(frozen=True)
class Crop:
    """Cuts off up to ``rate`` of the tokens at both ends together, and more if there are too many."""

    rate: float
    max_tokens: int | None = None

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        n = batch.lengths
        fraction = hash_ints(seed, epoch, _CROP, batch.ids, 0) / 2**32 * self.rate  # (B,)
        left = np.maximum(1, n - (fraction * n).astype(np.int64))
        left = np.minimum(left, self.max_tokens or left)
        offset = hash_ints(seed, epoch, _CROP, batch.ids, 1) / 2**32
        start = (offset * (n - left + 1)).astype(np.int64)
        index, series = batch.index, batch.series
        return batch.select((index >= start[series]) & (index < (start + left)[series]))


@dataclass(frozen=True)
class ChannelDrop:
    """Sets each channel of a series to 0, the mean of normalised values, with probability ``rate``.

    One channel stays.
    """

    rate: float
    n_channels: int

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        channels = np.arange(self.n_channels)
        chance = hash_ints(seed, epoch, _CHANNELS, batch.ids[:, None], channels) / 2**32  # (B, C)
        kept = chance >= self.rate
        kept[np.arange(len(kept)), chance.argmax(axis=1)] = True
        per_number = np.tile(kept, batch.values.shape[1] // self.n_channels)  # (B, P)
        return replace(batch, values=batch.values * per_number[batch.series])


@dataclass(frozen=True)
class Jitter:
    """Adds normal noise to values, and to positions on the first axis."""

    value_std: float
    position_std: float

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        width = batch.values.shape[1]
        key = (seed, epoch, _NOISE, batch.ids[batch.series][:, None], batch.index[:, None])
        noise = _normal(key, np.arange(width + 1))  # (T, P + 1)
        positions = batch.positions.copy()
        positions[:, 0] += self.position_std * noise[:, -1]
        values = batch.values + self.value_std * noise[:, :-1]
        return replace(batch, values=values, positions=positions)


def _normal(key: tuple[Any, ...], index: NDArray[np.int64]) -> NDArray[np.float32]:
    """Standard normal numbers (Box and Muller), in float32: its cosine takes a twentieth of the time."""
    uniform, turn = (
        (hash_ints(*key, index, k).astype(np.float32) + np.float32(0.5)) / np.float32(2**32)
        for k in (0, 1)
    )
    return np.sqrt(-2 * np.log(uniform)) * np.cos(np.float32(2 * np.pi) * turn)


@dataclass(frozen=True)
class CustomAugmentation:
    """A user's own augmentation of one series at a time.

    ``function(tokens, positions, generator)`` takes and returns tensors ``(N, P)`` and ``(N, D)`` of
    at least one token; ``generator`` is a numpy generator of this sample in this epoch.
    """

    function: Callable[[Tensor, Tensor, np.random.Generator], tuple[Tensor, Tensor]]

    def __call__(self, batch: RaggedBatch, seed: int, epoch: int) -> RaggedBatch:
        changed = []
        for tokens, positions, name in zip(*batch.split(), batch.ids.tolist(), strict=True):
            key = [hash_ints(seed, epoch, _CUSTOM, name), hash_ints(seed, epoch, _CUSTOM, name, 1)]
            result = self.function(
                torch.from_numpy(tokens), torch.from_numpy(positions), np.random.default_rng(key)
            )
            n, m = result[0].shape[0], result[1].shape[0]
            if n == 0 or n != m:
                raise ValueError(
                    f"the augmentation {self.function} left {n} tokens and {m} positions of sample "
                    f"{name}; it must leave at least one, and equally many"
                )
            changed.append([part.numpy() for part in result])
        values, at = zip(*changed, strict=True)
        return replace(RaggedBatch.of(values, at, batch.ids), labels=batch.labels)


def augmentations_of(
    config: TrainerConfig, n_channels: int, dataset: Any = None
) -> tuple[Augmentation, ...]:
    """The augmentations of the settings, then the data set's own ``augmentations``, if it has any."""
    chosen: list[Augmentation] = []
    if config.augment_crop_rate > 0 or config.augment_crop_tokens is not None:
        chosen.append(Crop(config.augment_crop_rate, config.augment_crop_tokens))
    if config.augment_drop_rate > 0:
        chosen.append(Drop(config.augment_drop_rate))
    if config.augment_channel_drop_rate > 0:
        chosen.append(ChannelDrop(config.augment_channel_drop_rate, n_channels))
    if config.augment_jitter_std > 0 or config.augment_jitter_position > 0:
        chosen.append(Jitter(config.augment_jitter_std, config.augment_jitter_position))
    return (
        *chosen,
        *(CustomAugmentation(function) for function in getattr(dataset, "augmentations", ())),
    )
