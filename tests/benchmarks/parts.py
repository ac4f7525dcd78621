"""The parts of a block that have a kernel of their own here, beside the framework's way.

    python -m tests.benchmarks.parts [--rows 7824]

Width 192, 3 heads; forward and backward in float32, one thread, CPU time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from roma_core.model.attention import packed_attention, padded_attention
from roma_core.model.encoder import RMSNorm, linear, linear_silu
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


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention_bodies(q_seg: Segments, k_seg: Segments) -> dict[str, Attention]:
    """Ways from ``(T, h, w)`` queries, keys and values to the same outputs, on any device."""
    mask = document_mask(q_seg, k_seg)
    flex = flex_attention
    if q_seg.device.type == "cuda":  # uncompiled it holds all scores
        flex = torch.compile(flex_attention, dynamic=True)

    def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        longest = torch.arange(k_seg.max_seqlen, device=k.device)
        valid = longest < k_seg.sizes[:, None]
        where = q_seg.ids, q_seg.index_in_series
        return padded_attention(*map(pad, (q, k, v), (q_seg, k_seg, k_seg)), valid)[where]

    def jagged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (nested(x, s) for x, s in zip((q, k, v), (q_seg, k_seg, k_seg), strict=True))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).values()

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return flex(q, k, v, block_mask=mask)[0].transpose(0, 1)

    return {
        "ours": lambda q, k, v: packed_attention(q, k, v, q_seg, k_seg),
        "padded": padded,
        "jagged": jagged,
        "flex": masked,
    }


def pad(x: Tensor, segments: Segments) -> Tensor:
    """``(T, h, w)`` → ``(B, longest, h, w)``."""
    out = x.new_zeros(segments.count, segments.max_seqlen, *x.shape[1:])
    return out.index_put((segments.ids, segments.index_in_series), x)


def nested(x: Tensor, segments: Segments) -> Tensor:
    """``(T, h, w)`` → a jagged tensor ``(B, h, length, w)``."""
    shortest, longest = min(segments.lengths), segments.max_seqlen
    return torch.nested.nested_tensor_from_jagged(
        x, segments.cu_seqlens, min_seqlen=shortest, max_seqlen=longest
    ).transpose(1, 2)


def document_mask(q_seg: Segments, k_seg: Segments, size: int = 128) -> BlockMask:
    """Each block of queries visits only the blocks with keys of its series; made on the host."""
    ids = np.repeat(np.arange(q_seg.count), q_seg.lengths)
    first, last = ids[::size], ids[np.minimum(np.arange(size, len(ids) + size, size), len(ids)) - 1]
    ends = np.cumsum(k_seg.lengths)
    start = (ends - k_seg.lengths)[first] // size
    n = -(-ends[last] // size) - start
    column = np.arange(-(-k_seg.total // size))
    index = np.where(column < n[:, None], start[:, None] + column, 0)
    blocks = (torch.from_numpy(a.astype(np.int32)[None, None]).to(q_seg.device) for a in (n, index))
    q_ids, k_ids = q_seg.ids, k_seg.ids
    return BlockMask.from_kv_blocks(
        *blocks,
        BLOCK_SIZE=size,
        mask_mod=lambda b, h, q, k: q_ids[q] == k_ids[k],
        seq_lengths=(q_seg.total, k_seg.total),
    )


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
        "RMSNorm and 192 → 768, both ways": (
            both_ways(lambda: F.linear(F.rms_norm(x, (192,), norm.weight, 1e-12), hidden)),
            both_ways(lambda: F.linear(*norm(x, hidden))),
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
