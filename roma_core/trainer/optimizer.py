"""Optimiser with weight decay on matrices only, and its state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from roma_core.trainer.config import TrainerConfig

NamedParameters = list[tuple[str, nn.Parameter]]


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: TrainerConfig
) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD; norms, biases, CLS and mask vectors do not decay."""
    named = [(n, p) for n, p in parameters if p.requires_grad]
    decayed = [p for _, p in named if p.ndim >= 2]
    others = [p for _, p in named if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    arguments = {"lr": config.base_lr, **config.optimizer_args}
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, **arguments)
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    return torch.optim.AdamW(groups, **{"fused": True, **arguments})


def optimizer_state(optimizer: torch.optim.Optimizer, named: NamedParameters) -> dict[str, Tensor]:
    """State tensors as ``<parameter>/<what>``, on CPU, e.g. ``projection.weight/exp_avg``."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous().clone()
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_state` gave.

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
                what: tensor.to(parameter.device).clone() for what, tensor in by_name[name].items()
            }
