"""How the benchmarks measure: side by side in one process, medians with their spread."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

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
        """FLOP/s of products of the size that a block of this width computes, the best of 30."""
        # on a GPU many at once: the host takes longer to start one than the device to compute it
        rows, at_once = (4096, 1) if self.device == "cpu" else (65536, max(1, 4096 // width))
        a = torch.randn(rows, width, device=self.device).to(dtype)
        b = torch.randn(width, 4 * width, device=self.device).to(dtype)

        def work() -> None:
            for _ in range(at_once):
                torch.mm(a, b, out=product)

        product = a @ b
        best = min(self.seconds(work) for _ in range(30))
        return at_once * 2 * rows * width * 4 * width / best


class HostReads(TorchDispatchMode):
    """Counts, on any device, operators after which a GPU's host must wait for it.

    They return a number to Python, or their result's shape depends on the values: ``item``,
    ``nonzero``, an index of bools; or they copy an index that is a list of Python.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.operators = 0
        self._from_python: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        name = func.overloadpacket.__name__
        waits = name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"}
        if name in ("index", "index_put", "index_put_"):
            indices = [i for i in args[1] if i is not None]
            waits = any(
                i.dtype in (torch.bool, torch.uint8) or any(i is x for x in self._from_python)
                for i in indices
            )
        elif func is torch.ops.aten.repeat_interleave.Tensor:
            waits = (kwargs or {}).get("output_size") is None
        if waits:
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        if name == "lift_fresh":
            self._from_python.append(result)
        return result


def host_waits(work: Work) -> int:
    """How often the host waits for the device in ``work``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


def launches(work: Work) -> dict[str, int]:
    """Kernels and copies that the device ran."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    events = (e for e in profiler.events() if e.device_type == DeviceType.CUDA)
    names = [event.name for event in events if not event.is_user_annotation]
    copies = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": len(names) - copies, "copies": copies}
