"""One optimiser step: forward, backward, clip, step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from roma_core.hashing import hash_ints
from roma_core.model.classification import RoMAForClassification
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.non_finite import NonFiniteLoss
from roma_core.trainer.optimizer import set_learning_rate
from roma_core.trainer.schedule import learning_rate_factor
from roma_core.trainer.sharding import whole


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
