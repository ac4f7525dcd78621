"""What learns: the model, its optimiser, and the average of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from roma_core.model.classification import RoMAForClassification
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.model.weights import state_of
from roma_core.trainer.averaging import WeightAverage
from roma_core.trainer.checkpoint import Checkpoint
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.losses import Loss
from roma_core.trainer.optimizer import (
    freeze_all_but_head,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from roma_core.trainer.step import TrainStep


@dataclass(frozen=True)
class Tensors:
    """Copies of everything that learning changed, on CPU, by name."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None


class Learner:
    """Steps forward, can be judged, and can be written down.

    Attributes:
        model: the caller's, trained in place.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: RoMAForPreTraining | RoMAForClassification,
        loss: Loss,
        config: TrainerConfig,
        total_steps: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        """Start as the model is, or as a checkpoint has it.

        Args:
            accelerator: stands for this process among the others.
            loss: to train with; the model's own is what it is judged by.
            total_steps: of the whole run, which the learning rate depends on.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        self.accelerator, self.model = accelerator, model
        self.loss, self.own_loss = loss, model.loss_fn
        if config.freeze_encoder and isinstance(model, RoMAForClassification):
            freeze_all_but_head(model)
        self._named = list(model.named_parameters())
        if checkpoint:
            model.load_state_dict(checkpoint.model)
        if config.compile:
            model.compile_regions()
        wrapped, self.optimizer = accelerator.prepare(model, make_optimizer(self._named, config))
        self.average: WeightAverage | None = None
        if config.ema_decay is not None:
            start = checkpoint.ema if checkpoint else None
            self.average = WeightAverage(model, config.ema_decay, start)
        if checkpoint:
            load_optimizer_state(self.optimizer.optimizer, self._named, checkpoint.optimizer)
            if accelerator.scaler is not None and checkpoint.state.scaler:
                accelerator.scaler.load_state_dict(checkpoint.state.scaler)
        self._step = TrainStep(accelerator, model, wrapped, self.optimizer, config, total_steps)

    @property
    def lr(self) -> float:
        """Learning rate of the last step."""
        return self._step.lr

    @property
    def scaler_state(self) -> dict[str, Any] | None:
        """Of fp16's loss scaling; None without."""
        scaler = self.accelerator.scaler
        return None if scaler is None else dict(scaler.state_dict())

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The model has the loss to train with inside the ``with`` block, its own after it."""
        self.model.set_loss_fn(self.loss)
        try:
            yield
        finally:
            self.model.set_loss_fn(self.own_loss)

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
        self.model.set_loss_fn(self.own_loss)
        with self.average.applied() if self.average else nullcontext():
            yield self.model
        self.model.set_loss_fn(self.loss)

    def tensors(self) -> Tensors:
        """What a checkpoint holds. The main process alone may ask for it."""
        return Tensors(
            state_of(self.model),
            optimizer_state(self.optimizer.optimizer, self._named),
            self.average.on_cpu() if self.average else None,
        )

    def finish(self) -> None:
        """Leave the model with the weights that were judged last."""
        if self.average is not None:
            self.model.load_state_dict(self.average.tensors)
