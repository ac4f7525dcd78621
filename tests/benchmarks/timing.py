"""How the benchmarks measure: side by side in one process, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender: median, smallest and largest."""

    median: float
    low: float
    high: float


class Clock:
    """CPU seconds of one thread, which other programs on the computer disturb least; else wall."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.counts_cpu = device == "cpu" and threads == 1

    def __str__(self) -> str:
        return "CPU time" if self.counts_cpu else "wall time"

    def seconds(self, work: Work) -> float:
        now = time.process_time if self.counts_cpu else time.perf_counter
        self._wait()
        start = now()
        work()
        self._wait()
        return now() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def interleaved(self, contenders: Mapping[str, Work], repeats: int) -> dict[str, Timing]:
        """A B C A B C …, after two rounds of warm-up."""
        for work in [*contenders.values()] * 2:
            work()
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(repeats):
            for name, work in contenders.items():
                seconds[name].append(self.seconds(work))
        return {n: Timing(statistics.median(s), min(s), max(s)) for n, s in seconds.items()}

    def matmul_rate(self, dtype: torch.dtype, width: int = 192) -> float:
        """FLOP/s of a product of the size that a block of this width computes, the best of 30."""
        rows = 4096 if self.device == "cpu" else 65536
        a = torch.randn(rows, width, device=self.device).to(dtype)
        b = torch.randn(width, 4 * width, device=self.device).to(dtype)
        return 2 * rows * width * 4 * width / min(self.seconds(lambda: a @ b) for _ in range(30))
