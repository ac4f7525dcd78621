"""Augmentation of training series: drop, crop, channel drop, jitter, and hooks of one's own.

Every draw is a hash of (seed, epoch, sample id, what it is for), so it depends on no process, batch
or worker, and a resumed run draws what an unbroken one would have drawn.

Shapes:
    N tokens of one series   P numbers of a token, the channel fastest   C channels   D axes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma_core.hashing import hash_ints
from roma_core.trainer.config import TrainerConfig

# keep the hashes of one purpose apart from those of another; 1 and 3 are those of the epoch plan
_DROP, _CROP, _CHANNELS, _NOISE = 2, 4, 5, 6


@dataclass(frozen=True)
class Draw:
    """Random numbers of one sample in one epoch."""

    seed: int
    epoch: int
    sample_id: int

    def ints(self, purpose: int, *parts: Any) -> Any:
        """Hash of ``purpose`` and ``parts``, in ``[0, 2**32)``; arrays give arrays."""
        return hash_ints(self.seed, self.epoch, purpose, self.sample_id & (2**64 - 1), *parts)

    def uniform(self, purpose: int, *parts: Any) -> Any:
        """In ``[0, 1)``."""
        return self.ints(purpose, *parts) / 2**32

    def normal(self, purpose: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Standard normal numbers (Box and Muller)."""
        index = np.arange(int(np.prod(shape)))
        radius = np.sqrt(-2 * np.log((self.ints(purpose, index, 0) + 0.5) / 2**32))
        return (radius * np.cos(2 * np.pi * self.uniform(purpose, index, 1))).reshape(shape)


Augmentation = Callable[[Tensor, Tensor, Draw], tuple[Tensor, Tensor]]
"""``(tokens (N, P), positions (N, D), draw)`` → tokens and positions of at least one token.

The tensors may be shared with the data set: return new ones, change none in place.
"""


@dataclass(frozen=True)
class Drop:
    """Leaves out up to ``rate`` of the tokens, anywhere."""

    rate: float

    def __call__(self, tokens: Tensor, positions: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        n = tokens.shape[0]
        n_dropped = min(int(draw.uniform(_DROP) * self.rate * n), n - 1)
        noise = draw.ints(_DROP, np.arange(n))
        kept = torch.from_numpy(np.sort(noise.argsort(kind="stable")[n_dropped:]))
        return tokens[kept], positions[kept]


@dataclass(frozen=True)
class Crop:
    """Cuts off up to ``rate`` of the tokens at both ends together, and more if there are too many."""

    rate: float
    most_tokens: int | None = None

    def __call__(self, tokens: Tensor, positions: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        n = tokens.shape[0]
        length = max(1, n - int(draw.uniform(_CROP, 0) * self.rate * n))
        length = min(length, self.most_tokens or length)
        start = int(draw.uniform(_CROP, 1) * (n - length + 1))
        return tokens[start : start + length], positions[start : start + length]


@dataclass(frozen=True)
class ChannelDrop:
    """Sets each channel to 0, the mean of normalised values, with probability ``rate``; one stays."""

    rate: float
    n_channels: int

    def __call__(self, tokens: Tensor, positions: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        chance = draw.uniform(_CHANNELS, np.arange(self.n_channels))  # (C,)
        stays = chance >= self.rate
        stays[chance.argmax()] = True
        per_number = torch.from_numpy(np.tile(stays, tokens.shape[1] // self.n_channels))  # (P,)
        return tokens * per_number, positions


@dataclass(frozen=True)
class Jitter:
    """Adds normal noise to values, and to positions on the first axis."""

    value_std: float
    position_std: float

    def __call__(self, tokens: Tensor, positions: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        noise = draw.normal(_NOISE, (len(tokens), tokens.shape[1] + 1))
        tokens = tokens + torch.from_numpy(self.value_std * noise[:, :-1]).float()
        shifted = positions.clone()
        shifted[:, 0] += torch.from_numpy(self.position_std * noise[:, -1]).float()
        return tokens, shifted


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
    return (*chosen, *getattr(dataset, "augmentations", ()))
