"""Matrix products without bias, on CPU by the kernel library that suits our shapes.

``F.linear`` in float32 goes to MKL. oneDNN, which the framework carries too and uses for 16 bits,
can apply SiLU before the result leaves the cache, and was a tenth faster at tall inputs and narrow
weights on the one processor measured. ``python -m tests.benchmarks.parts`` prints it for this one.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
_SMALLEST = 2048  # rows below which a call's own cost matters more


def _onednn(x: Tensor, weight: Tensor, then: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, then, [], "")


def _suits_onednn(x: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and x.device.type == "cpu"
        and x.ndim == 2
        and x.shape[0] >= _SMALLEST
        and x.dtype != torch.float64
        and not torch.compiler.is_compiling()
    )


@cache
def _onednn_computes(dtype: torch.dtype) -> bool:
    """Whether this processor has what oneDNN needs for the type; without AVX-512 not for 16 bits."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``(…, i)`` times ``(o, i)`` → ``(…, o)``; autocast is honoured."""
    if _suits_onednn(x) and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        if torch.is_grad_enabled():
            product: Tensor = _Linear.apply(x, weight)
            return product
        return _onednn(x, weight)
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
