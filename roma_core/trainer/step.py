"""One optimiser step: forward, backward, clip, step.

Finding a loss that became NaN or infinite, and what to look at then: the batch, as the model got it.
The loss a classifier is trained with, where it differs from the one it is judged by.
What learns: the model, its optimiser, and the average of its weights.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from roma_core.files import write_bytes
from roma_core.hashing import hash_ints
from roma_core.model.packing import PackedBatch
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.checkpoint import Checkpoint
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import MapStyle
from roma_core.trainer.distributed import (
    HostGroup,
    copies,
    gradients_kept_back,
    sharded_twin,
    whole,
)
from roma_core.trainer.optim import (
    EMA,
    freeze_all_but_head,
    learning_rate_factor,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the samples of the step."""


class DeferredScalars:
    """Numbers of steps that are still on the device, where reading each would wait for it."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """This process's part of a step's loss, and the gradient's norm."""
        self._steps.append((step, loss, norm))

    def read(self) -> list[tuple[int, float, float]]:
        """(step, loss, norm) of every step since the last call, in one wait for the device."""
        if not self._steps:
            return []
        steps, losses, norms = zip(*self._steps, strict=True)
        self._steps = []
        numbers = torch.stack([torch.stack(losses), torch.stack(norms).double()]).tolist()
        return list(zip(steps, *numbers, strict=True))


def refuse(
    folder: Path,
    step: int,
    rank: int,
    micro_batches: list[PackedBatch],
    loss: float = float("nan"),
    norm: float = float("nan"),
) -> NoReturn:
    """End a run whose loss is not finite.

    Raises:
        NonFiniteLoss: always; it names the samples, and the file that their batches were written to.
    """
    path = dump_batches(folder, step, rank, micro_batches, loss, norm)
    ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
    raise NonFiniteLoss(
        f"the loss is not finite in step {step} on process {rank}; sample ids {ids}. "
        f"Look at these series (roma data inspect; the batch is in {path}), lower base_lr, or set "
        f"gradient_clip"
    )


def dump_batches(
    folder: Path, step: int, rank: int, micro_batches: list[PackedBatch], loss: float, norm: float
) -> Path:
    """Write a process's micro-batches of a step; the path of the file.

    ``non_finite/step-…-rank-….safetensors`` holds, for micro-batch i, ``i/tokens`` (T, P),
    ``i/positions`` (T, D), ``i/lengths`` (B,), ``i/sample_ids`` (B,), and where there are any
    ``i/indices`` and ``i/labels``; in pretraining ``i/hidden_rows``. Its metadata say step, loss and
    gradient norm.
    """
    tensors: dict[str, torch.Tensor] = {}
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
    facts = {"step": str(step), "loss": str(loss), "grad_norm": str(norm)}
    write_bytes(path, save(tensors, metadata=facts))
    return path


Loss = Callable[[Tensor, Tensor], Tensor]
log = logging.getLogger(__name__)


def training_loss(
    model: RoMAForPreTraining | RoMAForClassification, config: TrainerConfig, dataset: MapStyle
) -> Loss:
    """The model's own loss, or cross entropy with smoothing and weights.

    Raises:
        ValueError: the model does not classify, or the weights do not fit its classes.
    """
    wishes = {
        "label_smoothing": config.label_smoothing > 0,
        "class_weights": config.class_weights is not None,
    }
    wished = [name for name, wish in wishes.items() if wish]
    if not wished:
        return model.loss_fn
    if isinstance(model, RoMAForPreTraining):
        # one .env serves both trainings, so this is no error
        log.warning("pretraining has no classes and takes no notice of %s", " and ".join(wished))
        return model.loss_fn
    if model.config.problem_type != "classification":
        raise ValueError(
            f"{' and '.join(wished)} are for classification, but problem_type is "
            f"{model.config.problem_type}; unset them"
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


def class_weights(wanted: str | list[float], counts: NDArray[np.int64]) -> Tensor:
    """Weight of every class, ``(n_classes,)`` float32, scaled to a mean of 1 over the series.

    A loss that is a mean over series then keeps its size, and does not depend on which series share
    a batch.

    Args:
        wanted: ``inverse_frequency``, or one number per class.
        counts: ``(n_classes,)`` training series of each class.

    Raises:
        ValueError: as many numbers as classes are needed, and a weight above 0 for what occurs.
    """
    if isinstance(wanted, str):
        weights = 1.0 / np.maximum(counts, 1)
    else:
        if len(wanted) != len(counts):
            raise ValueError(
                f"class_weights has {len(wanted)} numbers, but there are {len(counts)} classes; "
                f"give one per class, in the order of the data set's classes"
            )
        weights = np.asarray(wanted, dtype=np.float64)
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


class TrainStep:
    """Calling it does step ``step`` (0 is the first) on this process's micro-batches.

    Nothing in it waits for the device, but for fp16, whose loss scaling does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: RoMAForPreTraining | RoMAForClassification,
        wrapped: nn.Module,
        optimizer: AcceleratedOptimizer,
        config: TrainerConfig,
        total_steps: int,
        accumulating: Callable[[], AbstractContextManager[Any]],
        first_world_size: int,
    ) -> None:
        """``wrapped`` is ``model`` as :meth:`Accelerator.prepare` gave it back.

        Inside ``accumulating()`` gradients stay in the process. ``first_world_size`` processes began
        the run; the learning rate stays theirs.
        """
        self.accelerator, self.model, self.wrapped = accelerator, model, wrapped
        self.optimizer, self.config, self.total_steps = optimizer, config, total_steps
        self.accumulating = accumulating
        self.warmup_steps = (
            math.ceil(total_steps / 10) if config.warmup_steps is None else config.warmup_steps
        )
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.peak_lr = config.base_lr * (first_world_size if config.lr_scaling else 1)
        self.lr = 0.0
        # on a CPU looking costs nothing, and the weights are never touched by what is not finite
        self.looks_at_once = accelerator.device.type == "cpu"

    def __call__(
        self, step: int, micro_batches: list[PackedBatch], count: float
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            step: index of the step; it fixes the seed and the learning rate.
            micro_batches: of this process.
            count: what the loss is a mean over: terms of all micro-batches of all processes.

        Returns:
            This process's part of the mean loss, and the gradient's norm before clipping, on the
            device; the parts of all processes add up to the loss.

        Raises:
            NonFiniteLoss: on a CPU at once; elsewhere whoever reads the numbers must look.
            ValueError: there is nothing to learn from.
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
        set_learning_rate(self.optimizer, self.lr)
        self._to_training_mode()
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for i, batch in enumerate(micro_batches):
            share = self.model.loss_count(batch) / count
            if i + 1 < len(micro_batches):
                with self.accumulating():
                    total += self._backward(batch, share)
            else:
                total += self._backward(batch, share)
        norm = self._clip()
        if self.looks_at_once and not self.is_finite(float(total), float(norm)):
            raise NonFiniteLoss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def is_finite(self, loss: float, norm: float) -> bool:
        """Whether a step did no harm. The norm is of all processes' gradients, so all agree on it."""
        if self.accelerator.scaler is not None:
            return math.isfinite(loss)  # fp16 overflows now and then; its scaler skips the step
        return math.isfinite(loss) and math.isfinite(norm)

    def _to_training_mode(self) -> None:
        if self.config.freeze_encoder and isinstance(self.model, RoMAForClassification):
            self.wrapped.eval()  # features of a probe are those that evaluation sees
            self.model.head_of().train()
        else:
            self.wrapped.train()

    def _backward(self, batch: PackedBatch, share: float) -> Tensor:
        """Backward of one micro-batch's part of the global mean; gradients average over ranks."""
        _, loss = self.wrapped(batch)
        if loss is None:
            raise ValueError(
                f"samples {batch.sample_ids.tolist()} give no loss: they have no label, or nothing to hide"
            )
        self.accelerator.backward(loss * share * self.world_size)
        return loss.detach().double() * share

    def _clip(self) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.config.gradient_clip is not None:
            return whole(self.accelerator.clip_grad_norm_(parameters, self.config.gradient_clip))
        self.accelerator.unscale_gradients(self.optimizer)
        return whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))


@dataclass(frozen=True)
class Tensors:
    """Copies of everything that learning changed, on CPU, by name."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None


class Learner:
    """Steps forward, can be judged, and can be written down.

    Attributes:
        model: the caller's. Not sharded, it is what learns. Sharded, a twin of it learns, and the model
            has the twin's weights inside :meth:`judged` and after :meth:`finish`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        ranks: HostGroup,
        model: RoMAForPreTraining | RoMAForClassification,
        loss: Loss,
        config: TrainerConfig,
        total_steps: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Start as the model is, or as a checkpoint has it.

        Args:
            accelerator, ranks: stand for this process among the others.
            loss: to train with; the model's own is what it is judged by.
            total_steps: of the whole run, which the learning rate depends on.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        self.accelerator, self.model = accelerator, model
        self.own_loss = model.loss_fn
        state = checkpoint.state if checkpoint else None
        self.first_world_size = (state and state.first_world_size) or ranks.size
        # over one process there is nothing to share out
        self.is_sharded = config.sharding == "full" and ranks.size > 1
        if config.freeze_encoder and isinstance(model, RoMAForClassification):
            freeze_all_but_head(model)
        if checkpoint:
            model.load_state_dict(checkpoint.model)
        if config.compile:
            model.compile_regions()
        self._twin = sharded_twin(model, accelerator.device, ranks) if self.is_sharded else model
        self._twin.set_loss_fn(loss)
        self._named = list(self._twin.named_parameters())
        optimizer = make_optimizer(self._named, config)
        if self.is_sharded:
            # shards are placed, and need no other wrapper; this adds the precision alone
            wrapped = accelerator.prepare_model(
                self._twin, device_placement=False, evaluation_mode=True
            )
            self.optimizer = accelerator.prepare_optimizer(optimizer)
            accumulating = functools.partial(gradients_kept_back, self._twin)
        else:
            wrapped, self.optimizer = accelerator.prepare(model, optimizer)
            accumulating = functools.partial(accelerator.no_sync, wrapped)
        self.average: EMA | None = None
        if config.ema_decay is not None:
            start = checkpoint.ema if checkpoint else None
            self.average = EMA(self._twin, config.ema_decay, start)
        if checkpoint:
            load_optimizer_state(self.optimizer.optimizer, self._named, checkpoint.optimizer)
            if accelerator.scaler is not None and checkpoint.state.scaler:
                accelerator.scaler.load_state_dict(checkpoint.state.scaler)
        self._step = TrainStep(
            accelerator,
            self._twin,
            wrapped,
            self.optimizer,
            config,
            total_steps,
            accumulating,
            self.first_world_size,
        )

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self._step.lr

    @property
    def scaler_state(self) -> dict[str, Any] | None:
        """Of fp16's loss scaling; None without."""
        scaler = self.accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    def close(self) -> None:
        """Give the model back to its owner: on the device, with its own loss."""
        self.model.set_loss_fn(self.own_loss)
        self.model.to(self.accelerator.device)

    def count(self, batches: list[PackedBatch]) -> float:
        """What the loss of these batches is a mean over: hidden tokens, series or tokens."""
        return sum(self.model.loss_count(batch) for batch in batches)

    def step(
        self, step: int, micro_batches: list[PackedBatch], count: float
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step; see :class:`~roma_core.trainer.step.TrainStep`."""
        numbers = self._step(step, micro_batches, count)
        if self.average is not None:
            self.average.update(step)
        return numbers

    def is_finite(self, loss: float, norm: float) -> bool:
        """Whether a step with these numbers did no harm."""
        return self._step.is_finite(loss, norm)

    @contextmanager
    def judged(self) -> Iterator[RoMAForPreTraining | RoMAForClassification]:
        """The model, with the weights and the loss it is judged by inside the ``with`` block."""
        if self.is_sharded:
            self._fill_model()
            self.model.to(self.accelerator.device)
            with self.accelerator.autocast():
                yield self.model
            self.model.cpu()
            return
        training_loss = self.model.loss_fn
        self.model.set_loss_fn(self.own_loss)
        with self.average.applied() if self.average else nullcontext():
            yield self.model
        self.model.set_loss_fn(training_loss)

    def tensors(self) -> Tensors:
        """What a checkpoint holds; nothing on other processes than the main one.

        Every process calls it: sharded tensors are put together from all.
        """
        keep = self.accelerator.is_main_process
        average = self.average
        return Tensors(
            copies(self._twin.state_dict().items(), keep),
            copies(optimizer_state(self.optimizer.optimizer, self._named), keep),
            None if average is None else copies(average.tensors.items(), keep),
        )

    def finish(self) -> None:
        """Leave the model with the weights that were judged last; every process calls it."""
        if self.is_sharded:
            self._fill_model()
        elif self.average is not None:
            self.model.load_state_dict(self.average.tensors)

    @torch.no_grad()
    def _fill_model(self) -> None:
        """Give the whole model the twin's weights, or their average."""
        named = self.average.tensors if self.average else dict(self._named)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(whole(named[name].detach()))
