"""Attention among the tokens of each series, packed or padded.

``packed_attention`` is one operator to the compiler. On CPU it takes neighbouring series of equal length
together, on views and without a mask; on a GPU it calls the packed kernel. ``padded_attention`` holds
nothing but standard operators, so that an exported program runs anywhere.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from roma_core.model.packing import Segments

log = logging.getLogger(__name__)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """``(B, S, h, w)`` queries, keys, values with ``(B, S)`` bool ``valid`` keys → ``(B, S, h, w)``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, h, S, w)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :]).transpose(
        1, 2
    )


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_seg: Segments, k_seg: Segments, dropout: float = 0.0
) -> Tensor:
    """Every query attends to the keys of its own series, of which each has at least one.

    ``(Tq, h, w)`` queries, ``(Tk, h, w)`` keys and values → ``(Tq, h, w)``, all of one dtype.
    """
    fused = not q.is_cuda or _runs_packed(q.device, q.dtype, q.shape[-1], dropout > 0)
    if dropout > 0 or not fused:
        return _padded_call(q, k, v, q_seg, k_seg, dropout)
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        seqlens = q_seg.cu_seqlens, k_seg.cu_seqlens
        longest = q_seg.max_seqlen, k_seg.max_seqlen
        heads = varlen_attn(q, k, v, *seqlens, *longest)
        assert isinstance(heads, Tensor)  # a tuple only if auxiliary outputs were asked for
        return heads
    # the gradient is computed in 32 bits; without matrix units, so is what it is taken of
    casts = q.requires_grad and q.dtype == torch.bfloat16 and not has_matrix_units()
    exact = torch.float32 if casts else q.dtype
    out, _ = _cpu_attention(
        q.to(exact), k.to(exact), v.to(exact), q_seg.cu_seqlens, k_seg.cu_seqlens
    )
    return out.to(q.dtype)


@cache
def has_matrix_units() -> bool:
    """Whether this processor multiplies 16-bit matrices by AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def _runs_packed(device: torch.device, dtype: torch.dtype, width: int, drops: bool) -> bool:
    """Whether a GPU's fused kernel computes heads of this width; logged once for each case."""
    fits = torch.cuda.get_device_capability(device) >= (8, 0) and width in range(8, 257, 8)
    if fits and dtype in (torch.bfloat16, torch.float16) and not drops:
        log.info("attention on %s in %s: packed, by varlen_attn", device, dtype)
        return True
    what = f"attention on {device} in {dtype} with heads {width} wide{' and dropout' * drops}"
    log.warning(
        f"{what} pads series to the longest of a batch; to be packed it needs 16 bits "
        f"(ROMA_TRAINER_MIXED_PRECISION=bf16), head widths of a multiple of 8 up to 256, attn_drop_rate=0 "
        f"and compute capability 8.0"
    )
    return False


_Run = tuple[int, int, int]  # neighbouring series of equal lengths; queries and keys of each


def _runs(q_seqlens: Tensor, k_seqlens: Tensor) -> list[_Run]:
    lengths = zip(q_seqlens.diff().tolist(), k_seqlens.diff().tolist(), strict=True)
    return [(len(list(run)), *each) for each, run in itertools.groupby(lengths)]


def _each(runs: list[_Run], *sides: tuple[Tensor, int]) -> Iterator[tuple[Tensor, ...]]:
    """Of every run its part of each tensor, whose side is 1 for queries and 2 for keys."""
    return zip(*(_split(x, runs, side) for x, side in sides), strict=True)


def _split(x: Tensor, runs: list[_Run], side: int) -> list[Tensor]:
    """``(T, h, w)`` → ``(n, h, each, w)`` of every run, without a copy; side 1: queries, 2: keys."""
    rows = x.transpose(0, 1)[None].split([run[0] * run[side] for run in runs], dim=2)
    return [
        part if run[0] == 1 else part[0].unflatten(1, (run[0], run[side])).transpose(0, 1)
        for part, run in zip(rows, runs, strict=True)
    ]


@torch.library.custom_op("roma::cpu_attention", mutates_args=())
def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, q_seqlens: Tensor, k_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Also gives the log-sum-exp of the scores, ``(T, h, 1)``, in float32 for 16-bit inputs."""
    out, lse = _empty_outputs(q)
    runs = _runs(q_seqlens, k_seqlens)
    sides = (q, 1), (k, 2), (v, 2), (out, 1), (lse, 1)
    for *inputs, run_out, run_lse in _each(runs, *sides):
        if run_out.numel():
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs)
            run_out.copy_(found[0])
            run_lse.copy_(found[1].unsqueeze(-1))
    return out, lse


def _empty_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((*q.shape[:2], 1), dtype=lse_dtype)


@_cpu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Tensor, k_seqlens: Tensor):
    return _empty_outputs(q)


@torch.library.custom_op("roma::cpu_attention_backward", mutates_args=())
def _cpu_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_seqlens: Tensor,
    k_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    runs = _runs(q_seqlens, k_seqlens)
    sides = (grad, 1), (q, 1), (k, 2), (v, 2), (out, 1), (lse, 1)
    of_grads = (grads[0], 1), (grads[1], 2), (grads[2], 2)
    # the fused gradient in 16 bits is slower than in 32, the casts included
    exact = torch.float32 if q.dtype == torch.bfloat16 else q.dtype
    for *inputs, run_lse, grad_q, grad_k, grad_v in _each(runs, *sides, *of_grads):
        if not grad_q.numel():  # keys that nobody asked for
            grad_k.zero_()
            grad_v.zero_()
            continue
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.to(exact) for x in inputs), run_lse.squeeze(-1), 0.0, False
        )
        for target, run_grad in zip((grad_q, grad_k, grad_v), found, strict=True):
            target.copy_(run_grad)
    return grads


@_cpu_attention_backward.register_fake
def _(grad, q, k, v, out, lse, q_seqlens, k_seqlens):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])  # q, k, v, out, lse, both seqlens


def _backward(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    return *_cpu_attention_backward(grad_out, *ctx.saved_tensors), None, None


_cpu_attention.register_autograd(_backward, setup_context=_save)


def _pad(x: Tensor, segments: Segments) -> Tensor:
    """``(T, h, w)`` → ``(B, h, longest, w)``, zeros past the end."""
    out = x.new_zeros(segments.count, segments.max_seqlen, *x.shape[1:])
    return out.index_put((segments.ids, segments.index_in_series), x).transpose(1, 2)


def _padded_call(
    q: Tensor, k: Tensor, v: Tensor, q_seg: Segments, k_seg: Segments, dropout: float
) -> Tensor:
    index = torch.arange(k_seg.max_seqlen, device=k.device)
    valid = index < k_seg.sizes[:, None]  # (B, S)
    out = F.scaled_dot_product_attention(
        _pad(q, q_seg),
        _pad(k, k_seg),
        _pad(v, k_seg),
        attn_mask=valid[:, None, None, :],
        dropout_p=dropout,
    )
    return out.transpose(1, 2)[q_seg.ids, q_seg.index_in_series]
