"""Exponential moving average of the weights; evaluation and the final model use it.

Learning rate as a pure function of the step.
Optimiser with weight decay on matrices only, and its state by parameter name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import shared_out_like


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak rate in step ``step`` (0 is the first): linear warm-up, then the schedule.

    The first step already moves: the factor rises from 1/w to 1 over the w warm-up steps. ``cosine``
    and ``linear`` then fall to 0 one step after the last.
    """
    warmup_steps = min(warmup_steps, total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown lr_schedule {schedule!r}; there are cosine, linear and constant")


NamedParameters = list[tuple[str, nn.Parameter]]


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: TrainerConfig
) -> torch.optim.Optimizer:
    """AdamW or SGD, fused; norms, biases, CLS and mask vectors do not decay.

    Every group has an ``lr_scale``, its share of the learning rate.
    """
    named = [(n, p) for n, p in parameters if p.requires_grad]
    scales = layer_scales([name for name, _ in named], config.layer_lr_decay or 1.0)
    by_kind: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        by_kind.setdefault((scales[name], parameter.ndim >= 2), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, **({} if decays else {"weight_decay": 0.0})}
        for (scale, decays), parameters in by_kind.items()
    ]
    arguments = {"lr": config.base_lr, **config.optimizer_args}
    if config.optimizer == "sgd":
        # the fused kernel knows no shards
        return torch.optim.SGD(groups, **{"fused": config.sharding == "none", **arguments})
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return torch.optim.AdamW(groups, **{"fused": True, **arguments})


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Share of the learning rate of each parameter: the nearer to the input, the smaller.

    What comes after the encoder has 1, the encoder's last block ``decay``, the one before it
    ``decay²``, and the embedding of the input one power more than the first block.
    """
    layers = {name: re.match(r"encoder\.layers\.(\d+)\.", name) for name in names}
    depth = max((int(found[1]) + 1 for found in layers.values() if found), default=0)
    powers = {}
    for name, found in layers.items():
        if found:
            powers[name] = depth - int(found[1])
        else:
            powers[name] = depth + 1 if name.startswith(("projection.", "cls")) else 0
    return {name: decay**power for name, power in powers.items()}


def freeze_all_but_head(model: nn.Module) -> None:
    """A linear probe: only the head's parameters get a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters
) -> Iterator[tuple[str, Tensor]]:
    """State tensors as ``<parameter>/<what>``, e.g. ``projection.weight/exp_avg``, as they lie."""
    for name, parameter in named:
        for what, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}/{what}", value


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: dict[str, Tensor]
) -> None:
    """Put back whole tensors with the names that :func:`optimizer_state` gave them.

    Raises:
        ValueError: the tensors are those of other parameters.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, what = key.rsplit("/", 1)
        by_name.setdefault(name, {})[what] = tensor
    known = {name for name, p in named if p.requires_grad}
    if by_name and set(by_name) != known:
        raise ValueError(
            f"the checkpoint's optimiser state does not fit the model: it lacks {sorted(known - set(by_name))} "
            f"and has {sorted(set(by_name) - known)} besides"
        )
    for name, parameter in named:
        if name in by_name:
            # fused kernels want the step count beside the parameter
            optimizer.state[parameter] = {
                what: shared_out_like(tensor, parameter).clone()
                for what, tensor in by_name[name].items()
            }


class EMA:
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
