"""``metrics.jsonl``: every metric of a run, once, in the order of its steps.

One line is ``{"step": int, "epoch": float, "time": seconds since 1970, "metrics": {name: number}}``.
A resume cuts the file at its checkpoint, so no step is in it twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""One line of the file."""

WALL_CLOCK = frozenset(
    {"train/tokens_per_s", "train/data_wait_share", "train/memory_mb", "train/eta_s"}
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
