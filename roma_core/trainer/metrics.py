"""What is counted between two records of ``metrics.jsonl``.

``metrics.jsonl``: every metric of a run, once, in the order of its steps.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

Record = dict[str, Any]
"""One line of the file."""

WALL_CLOCK = frozenset(
    {"train/tokens_per_s", "train/data_wait_fraction", "train/memory_mb", "train/eta_s"}
)
"""Metrics that tell of the computer, not of the training; all others are the same in every repetition."""


class MetricsLog:
    """Appends records; rank 0 alone has one."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open ``path`` and cut it at byte ``offset``, where its checkpoint ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size < offset:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, the checkpoint counts on {offset}; "
                f"it was cut by hand: restore it, or remove the run's folder to start again"
            )
        self.path = path
        self._file = path.open("r+b")
        self._file.truncate(offset)
        self._file.seek(offset)

    def append(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        """Add one record; numbers that are not finite are left out."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        record: Record = {
            "step": step,
            "epoch": round(epoch, 6),
            "time": time.time(),
            "metrics": finite,
        }
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def sync(self) -> None:
        """Make what was written safe on disk, so that a checkpoint may count on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_records(
    path: Path, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, Record]]:
    """(offset after it, record) of every whole line between two byte offsets."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if not line.endswith(b"\n") or (end is not None and start > end):
                return
            yield start, json.loads(line)


class ThroughputMeter:
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
            "train/data_wait_fraction": self.waited_s / self.seconds,
            "train/memory_mb": memory_mb(),
        }


def memory_mb() -> float:
    """Most device memory held so far, in MiB; without a GPU, what this process holds now."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20
