"""The Transformer stack of encoder and decoder: pre-norm, bidirectional, no bias, no last norm.

The last block computes only the rows that are read (hidden tokens in pretraining, CLS in
classification). On CPU, large products go through oneDNN, and RMSNorm has a faster gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roma_core.model.attention import packed_attention, padded_attention
from roma_core.model.config import EncoderConfig
from roma_core.model.packing import Segments
from roma_core.model.positions import Rotations, rotate

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
MIN_ONEDNN_ROWS = 2048  # with fewer, the cost of the call outweighs the gain


def _onednn(x: Tensor, weight: Tensor, activation: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, activation, [], "")


def _suits_onednn(x: Tensor) -> bool:
    return (
        _ONEDNN
        and not torch.compiler.is_compiling()  # first: a program's sizes are not known yet
        and x.device.type == "cpu"
        and x.ndim == 2
        and x.shape[0] >= MIN_ONEDNN_ROWS
        and x.dtype != torch.float64
    )


@cache
def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this type here; 16 bits need AVX-512."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``(…, i)`` times ``(o, i)`` → ``(…, o)``; autocast is honoured."""
    if _suits_onednn(x) and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return _Linear.apply(x, weight) if torch.is_grad_enabled() else _onednn(x, weight)
    return F.linear(x, weight)


def linear_silu(x: Tensor, weight: Tensor) -> Tensor:
    """``silu(linear(x, weight))``, in one pass where no gradient is wanted."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if torch.is_grad_enabled() or not _suits_onednn(x) or not _onednn_computes(dtype):
        return F.silu(linear(x, weight))
    return _onednn(x.to(dtype), weight.to(dtype), "swish")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return grad_x, grad.t() @ x if ctx.needs_input_grad[1] else None


class RMSNorm(nn.Module):
    """``x / √(mean(x²) + eps) · gain`` over the last axis, in float32 or float64.

    The result has the type of the weights; under autocast the matrix product that follows casts it.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``(…, d)`` and the ``(o, d)`` weight of the product that follows; the gain is in one of them.

        It is in the weight where a gradient is compiled for a CPU: the gain's own gradient would be a sum
        over all rows, of which the compiler makes a second variant beyond 4,096.
        """
        exact = x if x.dtype == torch.float64 else x.float()
        gain = self.weight.to(exact.dtype)
        if x.is_cuda or not torch.is_grad_enabled():
            normed = F.rms_norm(exact, gain.shape, gain, self.eps)
        elif torch.compiler.is_compiling():
            normed = F.rms_norm(exact, gain.shape, None, self.eps)
            weight = weight * self.weight
        else:
            normed = _CpuRMSNorm.apply(exact, gain, self.eps)
        return normed.to(self.weight.dtype), weight


class _CpuRMSNorm(torch.autograd.Function):
    """The gradient through LayerNorm's fused kernel.

    With mean 0, LayerNorm's gradient for x is RMSNorm's less ``rstd · mean(gain · grad)``.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        rstd = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, rstd)
        return (x * rstd).mul_(gain)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, gain, rstd = ctx.saved_tensors
        grad_x, grad_gain, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, gain.shape, torch.zeros_like(rstd), rstd, gain, None, (True, True, False)
        )
        grad_x.add_((grad @ gain).unsqueeze(-1).mul_(rstd).div_(x.shape[-1]))
        return grad_x, grad_gain, None


Rows = Tensor | tuple[slice, slice]  # (R,) int64 of packed rows; series and tokens of padded ones


@dataclass(frozen=True)
class OutputRows:
    """The rows that the last block computes, series after series."""

    index: Tensor  # (R,) int64
    segments: Segments


@cache
def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of ``Block``, compiled once for the blocks of all models."""
    # training and evaluation, encoder and decoder, with and without 16 bits: a variant each
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return torch.compile(method, dynamic=True)


class Attention(nn.Module):
    """The token-wise parts of self-attention: one product makes q, k and v, another mixes heads."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.width = config.nhead * config.head_width
        self.qkv = nn.Linear(config.d_model, 3 * self.width, bias=False)
        self.out = nn.Linear(self.width, config.d_model, bias=False)

    def _rotated(self, x: Tensor, rotations: Rotations) -> Tensor:
        if rotations is not None:
            x = rotate(x, rotations)
        return F.dropout(x, self.config.pos_drop_rate, self.training)

    def queries_keys_values(
        self, x: Tensor, weight: Tensor, rotations: Rotations, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(…, d)``, the weight of qkv → rotated q and k, and v, each ``(…, h, w)``.

        With ``rows``, an index of x and rotations, q is made for these rows alone.
        """
        nhead, heads = self.config.nhead, (-1, self.config.head_width)
        if rows is None:
            qkv = linear(x, weight).unflatten(-1, heads)
            qk, v = qkv.split((2 * nhead, nhead), dim=-2)
            q, k = self._rotated(qk, rotations).chunk(2, dim=-2)
            return q, k, v
        w_q, w_kv = weight.split((self.width, 2 * self.width))
        q = linear(x[rows], w_q).unflatten(-1, heads)
        k, v = linear(x, w_kv).unflatten(-1, heads).chunk(2, dim=-2)
        q = self._rotated(q, None if rotations is None else rotations[rows])
        return q, self._rotated(k, rotations), v

    def mix(self, heads: Tensor) -> Tensor:
        """``(…, h, w)`` → ``(…, d)``."""
        mixed = linear(heads.flatten(-2), self.out.weight)
        return F.dropout(mixed, self.config.attn_proj_drop_rate, self.training)


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to the residual stream.

    ``before`` and ``after`` attention are token-wise, and compiled by :meth:`Encoder.compile_regions`.
    """

    def __init__(self, config: EncoderConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.layer_norm_eps)
        self.w1 = nn.Linear(config.d_model, config.mlp_width, bias=False)
        self.w2 = nn.Linear(config.mlp_width, config.d_model, bias=False)
        self.hidden_drop_rate = config.hidden_drop_rate
        self.attn_drop_rate = config.attn_drop_rate
        self.drop_path_rate = drop_path_rate
        self.compiles = False

    def before(
        self, x: Tensor, rotations: Rotations, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(…, d)`` → q, k, v of ``(…, h, w)``; q for ``rows`` alone if they are given."""
        x, weight = self.attention_norm(x, self.attention.qkv.weight)
        return self.attention.queries_keys_values(x, weight, rotations, rows)

    def after(
        self, x: Tensor, heads: Tensor, scales: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """``(…, d)`` and attention's ``(…, h, w)`` → ``(…, d)``; ``scales`` are drop path's."""
        branch = self.attention.mix(heads)
        x = x + (branch if scales is None else branch * scales[0])
        branch = linear(linear_silu(*self.ffn_norm(x, self.w1.weight)), self.w2.weight)
        branch = F.dropout(branch, self.hidden_drop_rate, self.training)
        return x + (branch if scales is None else branch * scales[1])

    def _drop_path(self, segments: Segments) -> tuple[Tensor, Tensor] | None:
        """For each branch ``(T, 1)``: 0 for series that skip it, ``1 / keep`` for the others."""
        if not self.training or self.drop_path_rate == 0:
            return None
        keep = 1 - self.drop_path_rate
        kept = torch.rand(2, segments.count, device=segments.device) < keep
        attention, mlp = (kept / keep)[:, segments.ids, None]
        return attention, mlp

    def forward(
        self, x: Tensor, rotations: Rotations, segments: Segments, rows: OutputRows | None = None
    ) -> Tensor:
        """``(T, d)`` → ``(T, d)``, or ``(R, d)`` with ``rows``."""
        index = None if rows is None else rows.index
        before, after = Block.before, Block.after
        queried = segments if rows is None else rows.segments
        if self.compiles and 4 * queried.total > segments.total:  # else too few rows to bother
            before, after = _compiled(before), _compiled(after)
        q, k, v = before(self, x, rotations, index)
        dropout = self.attn_drop_rate if self.training else 0.0
        heads = packed_attention(q, k, v, queried, segments, dropout)
        return after(self, x if index is None else x[index], heads, self._drop_path(queried))

    def forward_padded(
        self, x: Tensor, rotations: Rotations, valid: Tensor, rows: Rows | None = None
    ) -> Tensor:
        """``(B, S, d)`` → ``(B, S, d)`` with ``(B, S)`` bool ``valid``; inference only."""
        heads = padded_attention(*self.before(x, rotations, rows), valid)
        return self.after(x if rows is None else x[rows], heads)


class Encoder(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        last = max(config.depth - 1, 1)
        self.layers = nn.ModuleList(
            Block(config, config.drop_path_rate * i / last) for i in range(config.depth)
        )

    def forward(
        self, x: Tensor, rotations: Rotations, segments: Segments, rows: OutputRows | None = None
    ) -> Tensor:
        """Encode packed rows: ``(T, d)`` → ``(T, d)``, or the ``(R, d)`` of ``rows``.

        ``rotations`` are ``(T, 1, w // 2, 2)`` float32, cosine and sine; None rotates nothing.
        """
        if not len(self.layers):
            return x if rows is None else x[rows.index]
        *body, last = self.layers
        for layer in body:
            x = layer(x, rotations, segments)
        return last(x, rotations, segments, rows)

    def compile_regions(self) -> None:
        """Compile the token-wise parts, once for all layers, lengths and copies of the model.

        A last block of which few rows are read, as of a classifier's CLS, is not compiled.

        Attention stays one operator between the regions, so lengths never cause a recompilation.
        The first step after this takes up to a minute; ``tests/benchmarks/model.py`` measures the gain.
        """
        for block in self.layers:
            assert isinstance(block, Block)
            block.compiles = True

    def forward_padded(
        self, x: Tensor, rotations: Rotations, valid: Tensor, rows: Rows | None = None
    ) -> Tensor:
        """``(B, S, d)`` → ``(B, S, d)``, or ``rows`` of it; for export, not for training."""
        for n, layer in enumerate(self.layers, start=1):
            assert isinstance(layer, Block)
            x = layer.forward_padded(x, rotations, valid, rows if n == len(self.layers) else None)
        return x


class Head(nn.Module):
    """Dropout, norm, linear: the output layer of both models."""

    def __init__(self, width: int, n_outputs: int, drop_rate: float, eps: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(drop_rate)
        self.norm = RMSNorm(width, eps)
        self.linear = nn.Linear(width, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.norm(self.drop(x), self.linear.weight)
        return F.linear(x, weight, self.linear.bias)


def initialise(module: nn.Module) -> None:
    """Biases 0, matrices of n inputs from N(0, 1/(3n)) cut at two σ, as PyTorch's default.

    With the published σ of 0.02 a narrow model needs hundreds of steps to grow.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            std = (3 * part.in_features) ** -0.5
            nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def initialise_vectors(*vectors: nn.Parameter | None) -> None:
    """CLS and mask vectors: N(0, 0.02²) cut at two σ; None where the model has none."""
    for vector in vectors:
        if vector is not None:
            nn.init.trunc_normal_(vector, std=0.02, a=-0.04, b=0.04)
