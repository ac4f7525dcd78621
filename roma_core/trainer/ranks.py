"""What the processes of a training tell each other, host to host: no device ever waits for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The processes of one training.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Every process makes its own, at the same place of the program."""
        self.rank, self.size = rank, size
        self._group: Any = None
        if size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: list[float]) -> list[float]:
        """Sums over the processes, in float64, the same on all."""
        if self.size == 1:
            return [float(n) for n in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums, group=self._group)
        return sums.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks, on every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    @torch.no_grad()
    def take_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of rank 0, which has the same."""
        for tensor in tensors if self.size > 1 else ():
            on_host = tensor.detach().cpu().contiguous()
            dist.broadcast(on_host, src=0, group=self._group)
            tensor.copy_(on_host)

    def wait(self) -> None:
        """Go on when every process has come here."""
        self.gather(None)


ALONE = Ranks()
"""A single process."""
