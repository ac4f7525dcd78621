"""The order of samples: a list of global batches per epoch, a pure function of its inputs.

Processes and micro-batches only slice a global batch, so any number of them sees the same samples
in the same steps, and a position in a run is one number: the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from roma_core.hashing import hash_ints

Indices = NDArray[np.int64]
_ORDER = 1  # keeps the hashes of the order apart from those of masks and drops


@dataclass(frozen=True)
class EpochPlan:
    """Every sample once per epoch, in batches of nearly equal size.

    Attributes:
        n_samples: size of the training set.
        global_batch_size: largest number of samples in one step, over all processes.
        seed: of the order.
    """

    n_samples: int
    global_batch_size: int
    seed: int

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.n_samples // self.global_batch_size)

    def epoch(self, epoch: int) -> list[Indices]:
        """The global batches of one epoch: int64 sample indices; sizes differ by at most one."""
        noise = hash_ints(self.seed, epoch, _ORDER, np.arange(self.n_samples))
        return np.array_split(noise.argsort(kind="stable"), self.batches_per_epoch)


def share_of(batch: Indices, rank: int, world_size: int, micro_batch_size: int) -> list[Indices]:
    """What one process computes of a global batch: micro-batches of at most ``micro_batch_size``.

    Raises:
        ValueError: there are more processes than samples.
    """
    if len(batch) < world_size:
        raise ValueError(
            f"a step of {len(batch)} samples cannot be shared by {world_size} processes; "
            f"use fewer processes or a larger batch_size"
        )
    mine = batch[rank::world_size]
    return np.array_split(mine, -(-len(mine) // micro_batch_size))
