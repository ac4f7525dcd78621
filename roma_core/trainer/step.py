"""One optimiser step: losses, optimiser, learning-rate schedule, clipping, and the average of weights."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from roma_core.files import write_bytes
from roma_core.hashing import hash_ints
from roma_core.model.packing import PackedBatch
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import MapStyle
from roma_core.trainer.distributed import (
    HostGroup,
    cpu_copies,
    fsdp_copy,
    full_tensor,
    no_gradient_sync,
    shard_like,
)

Model = RoMAForPreTraining | RoMAForClassification
Loss = Callable[[Tensor, Tensor], Tensor]
NamedParameters = list[tuple[str, nn.Parameter]]
log = logging.getLogger(__name__)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the samples of the step."""


class TrainStep:
    """Owns the model, its optimiser and the average of its weights; calling it does one step.

    Nothing in a step waits for the device, except the loss scaling of fp16.

    Attributes:
        model: the caller's. With ``sharding=fsdp`` an FSDP copy of it is trained, and ``model`` has
            the copy's weights inside :meth:`evaluation_model` and after :meth:`finish`.
        lr: learning rate of the last step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        group: HostGroup,
        model: Model,
        loss: Loss,
        config: TrainerConfig,
        total_steps: int,
        first_world_size: int,
        resume: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Prepare the model and its optimiser.

        Args:
            loss: to train with; evaluation uses the model's own.
            first_world_size: processes that began the run, for ``lr_scaling``.
            resume: tensors of a checkpoint, as :meth:`state_dict` returned them; None starts new.

        Raises:
            ValueError: ``resume`` is of another model.
        """
        self.accelerator, self.model, self.config = accelerator, model, config
        self.rank, self.world_size = group.rank, group.size
        self.total_steps = total_steps
        warmup = config.warmup_steps
        self.warmup_steps = math.ceil(total_steps / 10) if warmup is None else warmup
        self.peak_lr = config.base_lr * (first_world_size if config.lr_scaling else 1)
        self.lr = 0.0
        self.own_loss = model.loss_fn
        # on a CPU the check costs nothing, and weights are never updated by a loss that is not finite
        self.checks_every_step = accelerator.device.type == "cpu"
        self.is_sharded = config.sharding == "fsdp" and group.size > 1
        self.is_probe = config.freeze_encoder and isinstance(model, RoMAForClassification)
        if self.is_probe:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("head."))
        if resume:
            model.load_state_dict(resume["model"])
        if config.compile:
            model.compile_regions()
        self._trained = fsdp_copy(model, accelerator.device, group) if self.is_sharded else model
        self._trained.set_loss_fn(loss)
        self._named = list(self._trained.named_parameters())
        self._trainable = [p for _, p in self._named if p.requires_grad]
        optimizer = make_optimizer(self._named, config)
        if self.is_sharded:
            # shards are on their devices and need no other wrapper; this adds only the precision
            self._wrapped = accelerator.prepare_model(
                self._trained, device_placement=False, evaluation_mode=True
            )
            self._optimizer = accelerator.prepare_optimizer(optimizer)
            self._no_sync = functools.partial(no_gradient_sync, self._trained)
        else:
            self._wrapped, self._optimizer = accelerator.prepare(model, optimizer)
            self._no_sync = functools.partial(accelerator.no_sync, self._wrapped)
        self._ema: EMA | None = None
        if config.ema_decay is not None:
            self._ema = EMA(self._trained, config.ema_decay, resume.get("ema") if resume else None)
        if resume:
            load_optimizer_state(self._optimizer.optimizer, self._named, resume["optimizer"])

    def __call__(
        self, step: int, micro_batches: list[PackedBatch], count: float
    ) -> tuple[Tensor, Tensor]:
        """Do step ``step`` (0 is the first) on this process's micro-batches.

        Args:
            step: fixes the seed and the learning rate.
            count: number of terms the loss is a mean over, in all micro-batches of all processes.

        Returns:
            This process's part of the mean loss, and the gradient's norm before clipping, on the
            device; the parts of all processes add up to the loss.

        Raises:
            NonFiniteLoss: on a CPU, before the weights change; on other devices the caller checks
                the returned numbers with :meth:`is_finite`.
            ValueError: no token is hidden, or there are no labels.
        """
        if count == 0:
            raise ValueError(
                f"step {step} has nothing to learn from: no token of its series is hidden; "
                f"series need at least two tokens and mask_ratio must be above 0"
            )
        torch.manual_seed(hash_ints(self.config.random_seed, step, self.rank))
        self.lr = self.peak_lr * learning_rate_factor(
            self.config.lr_schedule, step, self.total_steps, self.warmup_steps
        )
        set_learning_rate(self._optimizer, self.lr)
        self._wrapped.train(not self.is_probe)  # a probe's features are those of evaluation
        if isinstance(self._trained, RoMAForClassification):
            self._trained.require_head().train()
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for i, batch in enumerate(micro_batches):
            fraction = self._trained.loss_count(batch) / count
            with nullcontext() if i + 1 == len(micro_batches) else self._no_sync():
                _, loss = self._wrapped(batch)
                if loss is None:
                    raise ValueError(
                        f"samples {batch.sample_ids.tolist()} give no loss: they have no label, or "
                        f"nothing to hide"
                    )
                # gradients are means over the processes, the loss is a sum
                self.accelerator.backward(loss * fraction * self.world_size)
            total += loss.detach().double() * fraction
        if self.config.gradient_clip is not None:
            norm = self.accelerator.clip_grad_norm_(self._trainable, self.config.gradient_clip)
        else:
            self.accelerator.unscale_gradients(self._optimizer)
            gradients = [p.grad for p in self._trainable if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        norm = full_tensor(norm)
        if self.checks_every_step and not self.is_finite(float(total), float(norm)):
            raise NonFiniteLoss
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._ema is not None:
            self._ema.update(step)
        return total, norm

    def loss_count(self, batches: list[PackedBatch]) -> float:
        """Number of terms the loss of these batches is a mean over: hidden tokens, series or tokens."""
        return sum(self.model.loss_count(batch) for batch in batches)

    def is_finite(self, loss: float, norm: float) -> bool:
        """Whether a step was valid. The norm is of all processes' gradients, so all agree on it."""
        if self.accelerator.scaler is not None:
            return math.isfinite(loss)  # fp16 overflows now and then; its scaler skips the step
        return math.isfinite(loss) and math.isfinite(norm)

    @contextmanager
    def evaluation_model(self) -> Iterator[Model]:
        """The model, with the weights and the loss of evaluation inside the ``with`` block."""
        if self.is_sharded:
            self._fill_model()
            self.model.to(self.accelerator.device)
            with self.accelerator.autocast():
                yield self.model
            self.model.cpu()
            return
        training_loss = self.model.loss_fn
        self.model.set_loss_fn(self.own_loss)
        try:
            with self._ema.applied() if self._ema else nullcontext():
                yield self.model
        finally:
            self.model.set_loss_fn(training_loss)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """CPU copies of what a checkpoint holds; empty dictionaries on other than the main process.

        Every process calls it: sharded tensors are gathered from all.
        """
        keep = self.accelerator.is_main_process
        optimizer_state = (
            (f"{name}/{what}", value)  # e.g. projection.weight/exp_avg
            for name, parameter in self._named
            for what, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        )
        tensors = {
            "model": cpu_copies(self._trained.state_dict().items(), keep),
            "optimizer": cpu_copies(optimizer_state, keep),
        }
        if self._ema is not None:
            tensors["ema"] = cpu_copies(self._ema.tensors.items(), keep)
        return tensors

    def finish(self) -> None:
        """Leave ``model`` with the weights that evaluation uses; every process calls it."""
        if self.is_sharded:
            self._fill_model()
        elif self._ema is not None:
            self.model.load_state_dict(self._ema.tensors)

    def close(self) -> None:
        """Return ``model`` to the caller: on the device, with its own loss."""
        self.model.set_loss_fn(self.own_loss)
        self.model.to(self.accelerator.device)

    @torch.no_grad()
    def _fill_model(self) -> None:
        """Copy the trained weights, or their average, to the unsharded model."""
        named = self._ema.tensors if self._ema else dict(self._named)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(full_tensor(named[name].detach()))


class EMA:
    """Exponential moving average of a model's weights.

    Attributes:
        tensors: by parameter name, on the model's device, sharded as its parameters are.
    """

    def __init__(self, model: nn.Module, decay: float, start: dict[str, Tensor] | None) -> None:
        """``start`` is the average of a checkpoint; None starts from the current weights."""
        self.model, self.decay = model, decay
        self.tensors = {
            name: (shard_like(start[name], p) if start else p.detach()).clone()
            for name, p in model.named_parameters()
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
    blocks = {n: int(m[1]) for n in names if (m := re.match(r"encoder\.layers\.(\d+)\.", n))}
    depth = max(blocks.values(), default=-1) + 1
    powers = {n: depth + 1 if n.startswith(("projection.", "cls")) else 0 for n in names}
    powers |= {name: depth - block for name, block in blocks.items()}
    return {name: decay**power for name, power in powers.items()}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, named: NamedParameters, tensors: dict[str, Tensor]
) -> None:
    """Load full tensors named as in :meth:`TrainStep.state_dict`.

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


def training_loss(model: Model, config: TrainerConfig, dataset: MapStyle) -> Loss:
    """The model's own loss, or cross entropy with label smoothing and class weights.

    Raises:
        ValueError: the model is no classifier, or the weights do not match its classes.
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
        return each if weights is None else each * weights.to(each.device)[label]

    return loss


def class_weights(setting: str | list[float], counts: NDArray[np.int64]) -> Tensor:
    """Weight of every class, ``(n_classes,)`` float32, scaled to a mean of 1 over the series.

    A loss that is a mean over series then keeps its scale, and does not depend on which series share
    a batch.

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
    """The class of every item, or of every token of every item, ``(n,)``.

    Raises:
        ValueError: an item has no label.
    """
    items = map(dataset.__getitem__, range(len(dataset)))
    labels = [np.atleast_1d(np.asarray(item["label"])) for item in items if "label" in item]
    if len(labels) < len(dataset):
        raise ValueError(
            f"only {len(labels)} of {len(dataset)} training items have a label, but the classes "
            f"must be counted (dim_output was not given, or class_weights was)"
        )
    return np.concatenate(labels).astype(np.int64)


def raise_non_finite(
    folder: Path,
    step: int,
    rank: int,
    micro_batches: list[PackedBatch],
    loss: float = float("nan"),
    norm: float = float("nan"),
) -> NoReturn:
    """End a run whose loss is not finite, and write its batches to a file.

    ``non_finite/step-…-rank-….safetensors`` holds, for micro-batch i, ``i/tokens`` (T, P),
    ``i/positions`` (T, D), ``i/lengths`` (B,), ``i/sample_ids`` (B,), and where there are any
    ``i/indices`` and ``i/labels``; in pretraining ``i/hidden_rows``. Its metadata holds step, loss
    and gradient norm.

    Raises:
        NonFiniteLoss: always; it names the samples and the file.
    """
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        parts = {
            "tokens": batch.tokens,
            "positions": batch.positions,
            "lengths": torch.tensor(batch.segments.lengths),
            "sample_ids": batch.sample_ids,
            "indices": batch.indices,
            "labels": batch.labels,
            "hidden_rows": None if batch.masked is None else batch.masked.hidden_rows,
        }
        tensors |= {
            f"{i}/{k}": v.cpu().contiguous().clone() for k, v in parts.items() if v is not None
        }
    path = folder / "non_finite" / f"step-{step:08d}-rank-{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(step), "loss": str(loss), "grad_norm": str(norm)}
    write_bytes(path, save(tensors, metadata=metadata))
    ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
    raise NonFiniteLoss(
        f"the loss is not finite in step {step} on process {rank}; sample ids {ids}. "
        f"Look at these series (roma data inspect; the batch is in {path}), lower base_lr, or set "
        f"gradient_clip"
    )
