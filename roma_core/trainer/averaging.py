"""Exponential moving average of the weights; evaluation and the final model use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from roma_core.trainer.sharding import shared_out_like


class WeightAverage:
    """The average of a model's weights over its steps.

    Attributes:
        tensors: by parameter name, on the model's device, sharded as its parameters are.
    """

    def __init__(self, model: nn.Module, decay: float, start: dict[str, Tensor] | None) -> None:
        """``start`` is the average of a checkpoint; None begins with the present weights."""
        self.model, self.decay = model, decay
        self.tensors = {
            name: shared_out_like(start[name], parameter).clone()
            if start
            else parameter.detach().clone()
            for name, parameter in model.named_parameters()
        }

    def update(self, step: int) -> None:
        """Take in the weights of a step; early steps count more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [parameter.data for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the ``with`` block, its own after it."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self.model.load_state_dict(own)
