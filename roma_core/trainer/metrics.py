"""``metrics.jsonl``, which holds every metric of a run once, and the numbers that are written to it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from torch import Tensor

Record = dict[str, Any]
"""One line of the file: ``step``, ``epoch``, ``time`` and ``metrics`` by name."""

WALL_CLOCK = frozenset(
    {"train/tokens_per_s", "train/data_wait_fraction", "train/memory_mb", "train/eta_s"}
)
"""Metrics that measure the computer; all others are the same in every repetition of a run."""


class MetricsLog:
    """Appends records in the order of steps; only rank 0 has one."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open ``path`` and truncate it at byte ``offset``, where its checkpoint ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if path.stat().st_size < offset:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes, but the checkpoint refers to {offset}; "
                f"it was truncated: restore it, or remove the run's folder to start again"
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
        """Sync what was written to disk, so that a checkpoint may refer to it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_records(
    path: Path, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, Record]]:
    """(offset after it, record) of every complete line between two byte offsets."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if not line.endswith(b"\n") or (end is not None and start > end):
                return
            yield start, json.loads(line)


class DeferredScalars:
    """Loss and gradient norm of steps, still on the device: reading each would wait for it."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, Tensor, Tensor]] = []

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self._steps.append((step, loss, norm))

    def read(self) -> list[tuple[int, float, float]]:
        """(step, loss, norm) of every step since the last call, in one wait for the device."""
        if not self._steps:
            return []
        import torch

        steps, losses, norms = zip(*self._steps, strict=True)
        self._steps = []
        numbers = torch.stack([torch.stack(losses), torch.stack(norms).double()]).tolist()
        return list(zip(steps, *numbers, strict=True))


class ThroughputMeter:
    """Loss and cost of the steps since the last record.

    Losses are summed step by step in float64, so that a run that resumes between two records writes
    the same number as an uninterrupted one.

    Attributes:
        steps, loss: number of steps and the sum of their losses, over all processes.
        tokens: real tokens of these steps.
    """

    def __init__(self, steps: int = 0, loss: float = 0.0) -> None:
        self.steps, self.loss, self.tokens = steps, loss, 0.0
        self._waited_s = self._paused_s = 0.0
        self._started = time.monotonic()

    def add(self, loss: float) -> None:
        self.steps += 1
        self.loss += loss

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in the ``with`` block does not count as training."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in the ``with`` block counts as waiting for data."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - started

    def metrics(self) -> dict[str, float]:
        seconds = max(1e-9, time.monotonic() - self._started - self._paused_s)
        return {
            "train/loss": self.loss / self.steps,
            "train/tokens_per_s": self.tokens / seconds,
            "train/data_wait_fraction": self._waited_s / seconds,
            "train/memory_mb": memory_mb(),
        }


def memory_mb() -> float:
    """Peak GPU memory allocated so far, in MiB; without a GPU, the resident memory of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return psutil.Process().memory_info().rss / 2**20
