"""Attention over packed series, and over padded ones.

``packed_attention`` is one operator to the compiler. On CPU it calls the fused kernel once per run
of neighbouring series of equal length, on views and without a mask; on CUDA it is the variable-length
flash kernel (16-bit) or a padded call (32-bit). ``padded_attention`` holds nothing but standard
operators, so that an exported program runs anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from roma_core.model.packing import Segments


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
    fused = not q.is_cuda or (q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0)
    if dropout > 0 or not fused:
        return _padded_call(q, k, v, q_seg, k_seg, dropout)
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        seqlens = q_seg.cu_seqlens, k_seg.cu_seqlens
        longest = q_seg.max_seqlen, k_seg.max_seqlen
        heads = varlen_attn(q, k, v, *seqlens, *longest)
        assert isinstance(heads, Tensor)  # a tuple only if auxiliary outputs were asked for
        return heads
    exact = torch.float32 if q.requires_grad and q.dtype == torch.bfloat16 else q.dtype
    # in 16 bits the fused gradient is slower than in 32, the casts included
    out, _ = _cpu_attention(
        q.to(exact), k.to(exact), v.to(exact), q_seg.cu_seqlens, k_seg.cu_seqlens
    )
    return out.to(q.dtype)


# --- CPU: one fused call per run of equal lengths ---------------------------------------------


def _runs(q_seqlens: Tensor, k_seqlens: Tensor) -> Iterator[tuple[int, int, int, int, int]]:
    """(series, first query row, queries each, first key row, keys each) of every run of equal lengths."""
    q_rows, k_rows = q_seqlens.tolist(), k_seqlens.tolist()
    b, n_series = 0, len(q_rows) - 1
    while b < n_series:
        n_q, n_k = q_rows[b + 1] - q_rows[b], k_rows[b + 1] - k_rows[b]
        end = b + 1
        while end < n_series and (
            q_rows[end + 1] - q_rows[end] == n_q and k_rows[end + 1] - k_rows[end] == n_k
        ):
            end += 1
        if n_q:
            yield end - b, q_rows[b], n_q, k_rows[b], n_k
        b = end


def _view(x: Tensor, n: int, start: int, each: int) -> Tensor:
    """Rows of a run as ``(n, h, each, w)``, without a copy."""
    return x[start : start + n * each].unflatten(0, (n, each)).transpose(1, 2)


@torch.library.custom_op("roma::cpu_attention", mutates_args=())
def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, q_seqlens: Tensor, k_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    # the kernel reports its log-sum-exp in float32 for 16-bit inputs
    lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for n, q0, n_q, k0, n_k in _runs(q_seqlens, k_seqlens):
        run_out, run_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _view(q, n, q0, n_q), _view(k, n, k0, n_k), _view(v, n, k0, n_k)
        )
        _view(out, n, q0, n_q).copy_(run_out)
        _view(lse.unsqueeze(-1), n, q0, n_q).copy_(run_lse.unsqueeze(-1))
    return out, lse


@_cpu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, q_seqlens: Tensor, k_seqlens: Tensor):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=lse_dtype)


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
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    for n, q0, n_q, k0, n_k in _runs(q_seqlens, k_seqlens):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _view(grad, n, q0, n_q),
            _view(q, n, q0, n_q),
            _view(k, n, k0, n_k),
            _view(v, n, k0, n_k),
            _view(out, n, q0, n_q),
            _view(lse.unsqueeze(-1), n, q0, n_q).squeeze(-1),
            0.0,
            False,
        )
        _view(grad_q, n, q0, n_q).copy_(grads[0])
        _view(grad_k, n, k0, n_k).copy_(grads[1])
        _view(grad_v, n, k0, n_k).copy_(grads[2])
    return grad_q, grad_k, grad_v


@_cpu_attention_backward.register_fake
def _(grad, q, k, v, out, lse, q_seqlens, k_seqlens):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])  # q, k, v, out, lse, both seqlens


def _backward(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    return *_cpu_attention_backward(grad_out, *ctx.saved_tensors), None, None


_cpu_attention.register_autograd(_backward, setup_context=_save)


# --- padded call: dropout on any device, and 32-bit CUDA -------------------------------------


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
