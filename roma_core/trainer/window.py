"""What is counted between two records of ``metrics.jsonl``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch


class Window:
    """The steps since the last record.

    Losses are summed step by step in float64, so that a run which was cut in the middle of a window
    and goes on from a checkpoint records the same number.

    Attributes:
        steps, loss: number of steps and the sum of their losses, over all processes.
        seconds: spent on training, without evaluation.
        waited_s: of them, waiting for data.
        tokens: real tokens of the steps in ``seconds``.
    """

    def __init__(self, steps: int = 0, loss: float = 0.0) -> None:
        self.steps, self.loss = steps, loss
        self.waited_s = self.tokens = 0.0
        self._paused_s = 0.0
        self._started = time.monotonic()

    def add(self, loss: float) -> None:
        self.steps += 1
        self.loss += loss

    @property
    def seconds(self) -> float:
        return max(1e-9, time.monotonic() - self._started - self._paused_s)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the ``with`` block is not training."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the ``with`` block is waiting for data."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.waited_s += time.monotonic() - started

    def metrics(self) -> dict[str, float]:
        """The mean loss, and what the steps cost."""
        return {
            "train/loss": self.loss / self.steps,
            "train/tokens_per_s": self.tokens / self.seconds,
            "train/data_wait_share": self.waited_s / self.seconds,
            "train/memory_mb": memory_mb(),
        }


def memory_mb() -> float:
    """Most device memory held so far, in MiB; without a GPU, what this process holds now."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20
