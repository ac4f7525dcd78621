"""What learns: the model, its optimiser, and the average of its weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from roma_core.model.classification import RoMAForClassification
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
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
from roma_core.trainer.ranks import Ranks
from roma_core.trainer.sharding import copies, gradients_kept_back, sharded_twin, whole
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
        model: the caller's. Not sharded, it is what learns. Sharded, a twin of it learns, and the model
            has the twin's weights inside :meth:`judged` and after :meth:`finish`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        ranks: Ranks,
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
        self.average: WeightAverage | None = None
        if config.ema_decay is not None:
            start = checkpoint.ema if checkpoint else None
            self.average = WeightAverage(self._twin, config.ema_decay, start)
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
