"""A guard against lost speed that needs no peer: how much of a step is matrix products at full rate."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.timing import Clock
from tests.benchmarks.workloads import Setting, make


@pytest.mark.slow
def test_a_pretraining_step_reaches_a_quarter_of_the_matmul_rate():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        clock = Clock("cpu", 1)
        workload = make("W2", Setting(torch.float32, batch=16, compiled=False), only="ours")
        rate = clock.matmul_rate(torch.float32)
        seconds = clock.interleaved(workload.contenders, repeats=3)["ours"].low
    finally:
        torch.set_num_threads(threads)
    share = workload.flops / seconds / rate  # about a half on an idle computer
    assert share > 0.25, f"{share:.0%} of {rate / 1e9:.0f} GFLOP/s"
