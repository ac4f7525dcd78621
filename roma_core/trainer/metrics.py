"""``metrics.jsonl``, which holds every metric of a run once, and the numbers that are written to it."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

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
        record = {"step": step, "epoch": round(epoch, 6), "time": time.time(), "metrics": finite}
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


class ThroughputMeter:
    """Steps since the last record, the sum of their losses, real tokens, and time.

    Losses are summed step by step in float64, so that a run that resumes between two records writes
    the same number as an uninterrupted one.
    """

    def __init__(self, steps: int = 0, loss: float = 0.0) -> None:
        self.steps, self.loss, self.tokens = steps, loss, 0.0
        self._seconds = {"waiting": 0.0, "paused": 0.0}
        self._started = time.monotonic()

    @contextmanager
    def timed(self, activity: Literal["waiting", "paused"]) -> Iterator[None]:
        """Time in the ``with`` block counts as waiting for data, or not as training at all."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds[activity] += time.monotonic() - started

    def metrics(self) -> dict[str, float]:
        """Mean loss, tokens per second, and peak GPU or else resident memory in MiB."""
        import torch

        seconds = max(1e-9, time.monotonic() - self._started - self._seconds["paused"])
        on_gpu = torch.cuda.is_available()
        n_bytes = (
            torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        )
        return {
            "train/loss": self.loss / self.steps,
            "train/tokens_per_s": self.tokens / seconds,
            "train/data_wait_fraction": self._seconds["waiting"] / seconds,
            "train/memory_mb": n_bytes / 2**20,
        }
