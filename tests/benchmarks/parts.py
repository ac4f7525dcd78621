"""The parts of a block that have a kernel of their own here, beside the framework's way.

    python -m tests.benchmarks.parts [--rows 7824]

Width 192, 3 heads; forward and backward in float32, one thread, CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from roma_core.model.encoder import RMSNorm, linear, linear_silu, packed_attention, padded_attention
from roma_core.model.packing import Segments
from roma_core.model.positions import RotaryEmbedding, rotate
from tests.benchmarks.timing import Clock, Work
from tests.benchmarks.workloads import _lengths


def both_ways(make: Callable[[], Tensor]) -> Work:
    def run() -> None:
        out = make()
        out.backward(torch.ones_like(out))

    return run


def forward_only(make: Callable[[], Tensor]) -> Work:
    return torch.no_grad()(make)


def halves(x: Tensor, rotations: Tensor) -> Tensor:
    cos, sin = rotations.unbind(-1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=7824)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    x, hidden = leaf(args.rows, 192), leaf(768, 192)
    norm = RMSNorm(192, 1e-12)
    heads = leaf(args.rows, 6, 64)
    rotations = RotaryEmbedding(64, [0], 0.75)(torch.rand(args.rows, 1) * 100)
    lengths = sorted(_lengths(64).tolist())
    segments, longest = Segments(lengths), max(lengths)
    q, k, v = (leaf(segments.total, 3, 64) for _ in range(3))
    padded = [leaf(64, longest, 3, 64) for _ in range(3)]
    valid = torch.arange(longest) < segments.sizes[:, None]

    pairs: Mapping[str, tuple[Work, Work]] = {
        "RMSNorm, both ways": (
            both_ways(lambda: F.rms_norm(x, (192,), norm.weight, 1e-12)),
            both_ways(lambda: norm(x)),
        ),
        "192 → 768, both ways": (
            both_ways(lambda: F.linear(x, hidden)),
            both_ways(lambda: linear(x, hidden)),
        ),
        "192 → 768 and SiLU, forward": (
            forward_only(lambda: F.silu(F.linear(x, hidden))),
            forward_only(lambda: linear_silu(x, hidden)),
        ),
        "rotation, both ways": (
            both_ways(lambda: halves(heads, rotations)),
            both_ways(lambda: rotate(heads, rotations)),
        ),
        f"attention, {len(lengths)} series of {lengths[0]}…{longest}, both ways": (
            both_ways(lambda: padded_attention(*padded, valid)),
            both_ways(lambda: packed_attention(q, k, v, segments, segments)),
        ),
    }
    print(f"{args.rows} rows, torch {torch.__version__}")
    for name, (theirs, ours) in pairs.items():
        t = Clock("cpu", 1).interleaved({"framework": theirs, "ours": ours}, args.repeats)
        a, b = t["framework"].median, t["ours"].median
        print(f"{name:<52} {a * 1e3:7.1f} ms  {b * 1e3:7.1f} ms  {a / b:5.2f} ×", flush=True)


if __name__ == "__main__":
    main()
