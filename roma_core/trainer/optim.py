"""Optimiser, learning-rate schedule, and exponential moving average (EMA) of the weights."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import shard_like


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Fraction of the peak rate in step ``step`` (0 is the first): linear warm-up, then the schedule.

    The factor rises from 1/w to 1 over the w warm-up steps. ``cosine``
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
    """AdamW or SGD, fused; norms, biases, CLS and mask vectors have no weight decay.

    Every group has an ``lr_scale``, its factor of the learning rate.
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
        # the fused kernel does not support shards
        return torch.optim.SGD(groups, **{"fused": config.sharding == "none", **arguments})
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return torch.optim.AdamW(groups, **{"fused": True, **arguments})


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Factor of the learning rate of each parameter: the nearer to the input, the smaller.

    Parameters after the encoder have 1, the encoder's last block ``decay``, the one before it
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
    """Linear probe: only the head's parameters get a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))


def optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters
) -> Iterator[tuple[str, Tensor]]:
    """State tensors as ``<parameter>/<what>``, e.g. ``projection.weight/exp_avg``, not copied."""
    for name, parameter in named:
        for what, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}/{what}", value


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: dict[str, Tensor]
) -> None:
    """Load full tensors named as by :func:`optimizer_state`.

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
            f"the checkpoint's optimiser state does not match the model: it lacks {sorted(known - set(by_name))} "
            f"and has unknown {sorted(set(by_name) - known)}"
        )
    for name, parameter in named:
        if name in by_name:
            # fused kernels need the step count on the parameter's device
            optimizer.state[parameter] = {
                what: shard_like(tensor, parameter).clone()
                for what, tensor in by_name[name].items()
            }


class EMA:
    """Exponential moving average of a model's weights.

    Attributes:
        tensors: by parameter name, on the model's device, sharded as its parameters are.
    """

    def __init__(self, model: nn.Module, decay: float, start: dict[str, Tensor] | None) -> None:
        """``start`` is the average of a checkpoint; None starts from the current weights."""
        self.model, self.decay = model, decay
        self.tensors = {
            name: shard_like(start[name], parameter).clone()
            if start
            else parameter.detach().clone()
            for name, parameter in model.named_parameters()
        }

    def update(self, step: int) -> None:
        """Include the weights after a step; early steps weigh more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [parameter.data for parameter in self.model.parameters()]
        torch._foreach_lerp_(list(self.tensors.values()), current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the ``with`` block the model has the averaged weights, after it its own."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self.model.load_state_dict(own)
