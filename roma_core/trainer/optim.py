"""What is minimised, and how: training loss, optimiser, learning-rate schedule, average of weights."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.model.weights import named_state
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import MapStyle
from roma_core.trainer.distributed import shard_like

Model = RoMAForPreTraining | RoMAForClassification
Loss = Callable[[Tensor, Tensor], Tensor]
NamedParameters = list[tuple[str, nn.Parameter]]
log = logging.getLogger(__name__)


class EMA:
    """Exponential moving average of a model's weights: ``tensors``, by name, sharded as they are."""

    def __init__(self, model: nn.Module, decay: float, start: dict[str, Tensor] | None) -> None:
        """``start`` is the average of a checkpoint; None starts from the current weights."""
        self.model, self.decay = model, decay
        current = named_state(model)
        self._current = list(current.values())
        self.tensors = {
            name: (shard_like(start[name], p) if start else p.detach()).clone()
            for name, p in current.items()
        }

    def update(self, step: int) -> None:
        """Include the weights after a step; early steps weigh more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self.tensors.values(), self._current, strict=True))
        for of_weights in (True, False):  # running statistics are never sharded
            chosen = [(a, x.data) for a, x in pairs if isinstance(x, nn.Parameter) == of_weights]
            if chosen:
                average, now = zip(*chosen, strict=True)
                torch._foreach_lerp_(average, now, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the ``with`` block the model has the averaged weights, after it its own."""
        own = {name: p.detach().clone() for name, p in named_state(self.model).items()}
        self.model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            self.model.load_state_dict(own)


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Fraction of the peak rate in step ``step`` (0 is the first): linear warm-up, then the schedule.

    The factor rises from 1/w to 1 over the w warm-up steps. ``cosine`` and ``linear`` then fall to 0
    one step after the last.
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


def make_optimizer(parameters: NamedParameters, config: TrainerConfig) -> torch.optim.Optimizer:
    """AdamW or SGD, fused; norms, biases, CLS and mask vectors have no weight decay.

    Every group has an ``lr_scale``, its factor of the learning rate.
    """
    named = [(n, p) for n, p in parameters if p.requires_grad]
    scales = layer_scales([name for name, _ in named], config.layer_lr_decay or 1.0)
    for name in scales:
        if name.startswith("encoder."):
            scales[name] *= config.encoder_lr_scale
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
    blocks = {n: int(m[1]) for n in names if (m := re.match(r"encoder\.layers\.(\d+)\.", n))}
    depth = max(blocks.values(), default=-1) + 1
    powers = {n: depth + 1 if n.startswith(("stem.", "projection.", "cls")) else 0 for n in names}
    powers |= {name: depth - block for name, block in blocks.items()}
    return {name: decay**power for name, power in powers.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: dict[str, Tensor]
) -> None:
    """Load full tensors named as in a checkpoint; ValueError if they are of other parameters."""
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


def training_loss(model: Model, config: TrainerConfig, dataset: MapStyle) -> Loss:
    """The model's own loss, or cross entropy with label smoothing and class weights.

    Raises ValueError if the model is no classifier, or the weights do not match its classes.
    """
    settings = ("label_smoothing", "class_weights")
    names = " and ".join(name for name in settings if getattr(config, name) not in (0, None))
    if not names:
        return model.loss_fn
    if isinstance(model, RoMAForPreTraining):
        # one .env serves both trainings, so this is no error
        log.warning("pretraining has no classes and ignores %s", names)
        return model.loss_fn
    if model.config.problem_type != "classification":
        raise ValueError(
            f"{names} are for classification, but problem_type is {model.config.problem_type}; unset them"
        )
    n_classes = model.config.dim_output
    assert n_classes is not None  # the trainer has counted them
    weights = None
    if config.class_weights is not None:
        counts = np.bincount(labels_of(dataset), minlength=n_classes)
        weights = class_weights(config.class_weights, counts)

    def loss(logits: Tensor, label: Tensor) -> Tensor:
        each = F.cross_entropy(
            logits.float(), label, reduction="none", label_smoothing=config.label_smoothing
        )
        return each if weights is None else each * weights.to(each.device, non_blocking=True)[label]

    return loss


def class_weights(setting: str | list[float], counts: NDArray[np.int64]) -> Tensor:
    """Weight of every class, ``(n_classes,)`` float32, with a mean of 1 over the series.

    Args:
        setting: ``inverse_frequency``, or one number per class.
        counts: ``(n_classes,)`` training series of each class.

    Raises:
        ValueError: as many numbers as classes are needed, and a weight above 0 for one that occurs.
    """
    if isinstance(setting, str):
        weights = 1.0 / np.maximum(counts, 1)
    else:
        if len(setting) != len(counts):
            raise ValueError(
                f"class_weights has {len(setting)} numbers, but there are {len(counts)} classes; "
                f"give one per class, in the order of the data set's classes"
            )
        weights = np.asarray(setting, dtype=np.float64)
    mean = float((weights * counts).sum() / counts.sum())
    if mean == 0:
        raise ValueError("class_weights are 0 for every class that occurs in the training set")
    return torch.tensor(weights / mean, dtype=torch.float32)


def labels_of(dataset: Any) -> NDArray[np.int64]:
    """The class of every item, or of every token of every item, ``(n,)``; ValueError without."""
    items = map(dataset.__getitem__, range(len(dataset)))
    labels = [np.atleast_1d(np.asarray(item["label"])) for item in items if "label" in item]
    if len(labels) < len(dataset):
        raise ValueError(
            f"only {len(labels)} of {len(dataset)} training items have a label, but the classes "
            f"must be counted (dim_output was not given, or class_weights was)"
        )
    return np.concatenate(labels).astype(np.int64)
