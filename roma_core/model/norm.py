"""RMSNorm without bias, ``x / √(mean(x²) + eps) · gain``, and a fast gradient of it on CPU.

The framework's own has a fused gradient on GPU and none on CPU, where it is pieced together from a
dozen passes over memory; ``python -m tests.benchmarks.parts`` prints what that costs.

At a row of zeros the slope is 1/√eps, a million with the published eps, and in a series of zeros every
norm of a stack stands there: their product is more than float32 holds. A bias of the input that starts at
0 leads there in the first step. The gradient passes such rows with a slope of 1 instead; what comes out
is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Normalises the last axis; reductions are in float32, or float64 for float64 input.

    The result has the type of the weights whatever comes in; under autocast it is cast to the type
    that the matrix product behind it wants.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """``(…, width)`` → ``(…, width)``."""
        exact = x if x.dtype == torch.float64 else x.float()
        gain = self.weight.to(exact.dtype)
        if not torch.is_grad_enabled():
            normed = F.rms_norm(exact, gain.shape, gain, self.eps)
        elif x.is_cuda or torch.compiler.is_compiling():
            size = torch.linalg.vector_norm(exact.detach(), dim=-1, keepdim=True)
            undone = torch.where(size == 0, self.eps**0.5, 1.0)  # a slope of 1/√eps
            same = _ScaledGradient.apply(exact, undone)
            normed = F.rms_norm(same, gain.shape, gain, self.eps)
        else:
            normed = _CpuRMSNorm.apply(exact, gain, self.eps)
        return normed.to(self.weight.dtype)


class _ScaledGradient(torch.autograd.Function):
    """The same numbers; their gradient times ``scale``, one for each row."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (scale,) = ctx.saved_tensors
        return grad * scale, None


class _CpuRMSNorm(torch.autograd.Function):
    """The gradient by way of LayerNorm's fused kernel.

    With a mean of 0, LayerNorm's gradient for x is RMSNorm's less ``rstd · mean(gain · grad)``, and
    those for the gain are equal.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        is_zero = square == 0
        rstd = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gain, rstd.masked_fill(is_zero, 1.0))
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
