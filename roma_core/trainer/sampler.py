"""The order of samples: a list of global batches per epoch, a pure function of its inputs.

Processes and micro-batches only slice a global batch, so any number of them sees the same samples
in the same steps, and a position in a run is one number: the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from roma_core.hashing import hash_ints
from roma_core.trainer.config import TrainerConfig

Indices = NDArray[np.int64]
_ORDER = 1  # keeps the hashes of the order apart from those of masks and drops
_BATCH_ORDER = 3
_WINDOW = 32  # batches among which series are sorted by length


class BatchSampler(ABC):
    """Every sample once per epoch, in global batches."""

    unit: str
    n_samples: int
    global_batch_size: int  # of a step over all processes, in `unit`; frozen at the first start
    batches_per_epoch: int
    sorts = False  # puts series of similar length into a batch

    @abstractmethod
    def batches(self, epoch: int) -> list[Indices]:
        """The global batches of one epoch: int64 sample indices."""

    @abstractmethod
    def _micro_batches(self, samples: Indices) -> list[Indices]: ...

    def shard(self, batch: Indices, rank: int, world_size: int) -> list[Indices]:
        """The micro-batches that one process computes of a global batch: every ``world_size``-th sample,
        so that all get similar lengths. Raises ValueError for more processes than samples."""
        if len(batch) < world_size:
            raise ValueError(
                f"a step of {len(batch)} samples cannot be shared by {world_size} processes; "
                f"use fewer processes or a larger batch_size"
            )
        return self._micro_batches(batch[rank::world_size])


class SeriesBatchSampler(BatchSampler):
    """Batches of equally many series; sizes differ by at most one."""

    unit = "series"

    def __init__(
        self, n_samples: int, global_batch_size: int, seed: int, micro_batch_size: int = 1
    ) -> None:
        """``micro_batch_size`` is the largest number of samples a process computes at once."""
        self.n_samples, self.global_batch_size = n_samples, global_batch_size
        self.seed, self.micro_batch_size = seed, micro_batch_size
        self.batches_per_epoch = -(-n_samples // global_batch_size)

    def batches(self, epoch: int) -> list[Indices]:
        noise = hash_ints(self.seed, epoch, _ORDER, np.arange(self.n_samples))
        return np.array_split(noise.argsort(kind="stable"), self.batches_per_epoch)

    def _micro_batches(self, samples: Indices) -> list[Indices]:
        return np.array_split(samples, -(-len(samples) // self.micro_batch_size))


class TokenBatchSampler(BatchSampler):
    """Batches of about equally many tokens and similar lengths.

    The samples are shuffled, then, if it ``sorts``, sorted by length inside windows of 32 batches, cut
    into batches, and the batches shuffled. A batch holds at most one longest series more than
    ``global_batch_size``, and no fewer than ``min_samples``.
    """

    unit, sorts = "tokens", True

    def __init__(
        self, lengths: Indices, global_batch_size: int, seed: int, micro_batch_size: int
    ) -> None:
        """Sizes are in tokens, ``lengths`` ``(n,)`` are those of the samples; ValueError if one
        is more than a batch.
        """
        self.lengths, self.seed, self.n_samples = lengths, seed, len(lengths)
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.batches_per_epoch = max(1, -(-int(lengths.sum()) // global_batch_size))
        longest = int(lengths.max())
        # the middles of two neighbours are at most a longest sample apart, so each stretch of a
        # batch's width holds at least this many; none is empty if every sample fits into one
        self.min_samples = int(lengths.sum()) // self.batches_per_epoch // longest
        if longest * self.batches_per_epoch > lengths.sum():
            raise ValueError(
                f"the longest series has {longest:,} tokens, but a step has on average only "
                f"{int(lengths.sum()) / self.batches_per_epoch:,.1f}; raise tokens_per_batch above the "
                f"longest series, or cut long series with augment_crop_tokens"
            )

    def batches(self, epoch: int) -> list[Indices]:
        n_batches = self.batches_per_epoch
        noise = hash_ints(self.seed, epoch, _ORDER, np.arange(self.n_samples))
        order = noise.argsort(kind="stable")
        if self.sorts:
            window = _part_of(self.lengths[order], n_batches) // _WINDOW
            order = order[np.lexsort((self.lengths[order], window))]
        batches = _cut(order, self.lengths, n_batches)
        shuffled = hash_ints(self.seed, epoch, _BATCH_ORDER, np.arange(n_batches))
        return [batches[k] for k in shuffled.argsort(kind="stable")]

    def _micro_batches(self, samples: Indices) -> list[Indices]:
        n = round(int(self.lengths[samples].sum()) / self.micro_batch_size)
        return _cut(samples, self.lengths, min(max(1, n), len(samples)))


def make_sampler(
    config: TrainerConfig, dataset: Any, world_size: int, global_batch_size: int | None = None
) -> BatchSampler:
    """The sampler of a training: by ``tokens_per_batch``, if given, else by ``batch_size``.

    Args:
        dataset: the training set; only lengths of its items are read, and only for tokens.
        world_size: processes at the first start.
        global_batch_size: of a resumed run, frozen at its first start.

    Raises:
        ValueError: the longest series does not fit into a batch, or leaves other processes nothing.
    """
    at_once = world_size * config.gradient_accumulation_steps
    if config.tokens_per_batch is None:
        size = min(global_batch_size or config.batch_size * at_once, len(dataset))
        return SeriesBatchSampler(len(dataset), size, config.random_seed, config.batch_size)
    lengths = lengths_of(dataset)
    if config.augment_crop_tokens is not None:
        lengths = np.minimum(lengths, config.augment_crop_tokens)
    size = global_batch_size or config.tokens_per_batch * at_once
    sampler = TokenBatchSampler(lengths, size, config.random_seed, config.tokens_per_batch)
    if world_size > 1 and sampler.min_samples < world_size:
        raise ValueError(
            f"a step of about {size:,} tokens may hold as few as {sampler.min_samples} series, too few "
            f"for {world_size} processes: the longest has {lengths.max():,} tokens; raise "
            f"tokens_per_batch, or cut long series with augment_crop_tokens"
        )
    return sampler


def lengths_of(dataset: Any) -> Indices:
    """Tokens of every item, ``(n,)``: the data set's ``lengths``, else counted item by item."""
    if (lengths := getattr(dataset, "lengths", None)) is not None:
        return np.asarray(lengths, dtype=np.int64)
    counted = []
    for i in range(len(dataset)):
        item = dataset[i]
        pad_mask = item.get("pad_mask")
        padding = 0 if pad_mask is None else int(np.asarray(pad_mask).sum())
        counted.append(np.shape(item["positions"])[1] - padding)
    return np.array(counted, dtype=np.int64)


def _part_of(lengths: Indices, n_parts: int) -> Indices:
    """Which of ``n_parts`` stretches of equally many tokens the middle of each sample lies in."""
    ends = np.cumsum(lengths)
    middles = 2 * ends - lengths  # twice the middle, to stay with whole numbers
    return middles * n_parts // (2 * ends[-1])


def _cut(order: Indices, lengths: Indices, n_parts: int) -> list[Indices]:
    """Consecutive samples of about equally many tokens; no part is empty, there may be fewer."""
    part = _part_of(lengths[order], n_parts)
    return np.split(order, np.flatnonzero(np.diff(part)) + 1)
