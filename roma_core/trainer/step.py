"""One optimiser step, and the batches of one whose loss is not finite."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import Tensor, nn

from roma_core.files import write_bytes
from roma_core.hashing import hash_ints
from roma_core.model.packing import PackedBatch, Segments
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.weights import named_state
from roma_core.trainer import distributed, optim
from roma_core.trainer.config import TrainerConfig


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient became NaN or infinite; the message names the samples of the step."""


class TrainStep:
    """Owns the model, its optimiser and the average of its weights; calling it does one step.

    Nothing in a step waits for the device, except the loss scaling of fp16. With ``sharding=fsdp`` an
    FSDP copy is trained; ``model``, the caller's, has its weights inside :meth:`evaluation_model` and
    after :meth:`finish`. ``lr`` is the learning rate of the last step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        group: distributed.HostGroup,
        model: optim.Model,
        loss: optim.Loss,
        config: TrainerConfig,
        total_steps: int,
        first_world_size: int,
        resume: dict[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Prepare the model and its optimiser.

        Args:
            loss: to train with; evaluation uses the model's own.
            first_world_size: processes that began the run, for ``lr_scaling``.
            resume: tensors of a checkpoint of this model, as :meth:`state_dict` returned them.
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
        self._trained = (
            distributed.fsdp_copy(model, accelerator.device, group) if self.is_sharded else model
        )
        self._trained.set_loss_fn(loss)
        self._named = list(self._trained.named_parameters())
        self._trainable = [p for _, p in self._named if p.requires_grad]
        optimizer = optim.make_optimizer(self._named, config)
        if self.is_sharded:
            # shards are on their devices and need no other wrapper; this adds only the precision
            self._wrapped = accelerator.prepare_model(
                self._trained, device_placement=False, evaluation_mode=True
            )
            self._optimizer = accelerator.prepare_optimizer(optimizer)
            self._no_sync = functools.partial(distributed.no_gradient_sync, self._trained)
        else:
            self._wrapped, self._optimizer = accelerator.prepare(model, optimizer)
            self._no_sync = functools.partial(accelerator.no_sync, self._wrapped)
        state = named_state(self._trained).values()
        self._statistics = [x for x in state if not isinstance(x, nn.Parameter)]
        self._ema: optim.EMA | None = None
        if config.ema_decay is not None:
            self._ema = optim.EMA(
                self._trained, config.ema_decay, resume.get("ema") if resume else None
            )
        if resume:
            optim.load_optimizer_state(self._optimizer.optimizer, self._named, resume["optimizer"])

    def __call__(
        self, step: int, micro_batches: list[PackedBatch], count: float
    ) -> tuple[Tensor, Tensor]:
        """Do step ``step`` (0 is the first), which fixes seed and learning rate.

        Args:
            count: terms the loss is a mean over, in all micro-batches of all processes; at least 1. A
                micro-batch without any, of which pretraining can hide nothing, is left out.

        Returns:
            This process's part of the mean loss, and the gradient's norm before clipping, on the
            device; the parts of all processes add up to the loss.

        Raises:
            NonFiniteLoss: on a CPU, before the weights change; on other devices the caller checks
                the returned numbers with :meth:`is_finite`.
            ValueError: there are no labels.
        """
        torch.manual_seed(hash_ints(self.config.random_seed, step, self.rank))
        self.lr = self.peak_lr * optim.learning_rate_factor(
            self.config.lr_schedule, step, self.total_steps, self.warmup_steps
        )
        optim.set_learning_rate(self._optimizer, self.lr)
        self._wrapped.train(not self.is_probe)  # a probe's features are those of evaluation
        if isinstance(self._trained, RoMAForClassification):
            self._trained.require_head().train()
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        fractions = [(b, n / count) for b in micro_batches if (n := self.model.loss_count(b))]
        if not fractions:  # every process must take part in the exchange of gradients
            fractions = [(_with_hidden_copy(micro_batches[0]), 0.0)]
        for i, (batch, fraction) in enumerate(fractions, start=1):
            with nullcontext() if i == len(fractions) else self._no_sync():
                _, loss = self._wrapped(batch)
                if loss is None:
                    raise ValueError(f"samples {batch.sample_ids.tolist()} have no label")
                # gradients are means over the processes, the loss is a sum
                self.accelerator.backward(loss * fraction * self.world_size)
            total += loss.detach().double() * fraction
        if self.config.gradient_clip is not None:
            norm = self.accelerator.clip_grad_norm_(self._trainable, self.config.gradient_clip)
        else:
            self.accelerator.unscale_gradients(self._optimizer)
            gradients = [p.grad for p in self._trainable if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
        norm = distributed.full_tensor(norm)
        if self.checks_every_step and not self.is_finite(float(total), float(norm)):
            raise NonFiniteLoss
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._statistics and self.world_size > 1:  # each process had its own batch
            distributed.overwrite_from_main(self._statistics)
        if self._ema is not None:
            self._ema.update(step)
        return total, norm

    def is_finite(self, loss: float, norm: float) -> bool:
        """Whether a step was valid. The norm is of all processes' gradients, so all agree on it."""
        if self.accelerator.scaler is not None:
            return math.isfinite(loss)  # fp16 overflows now and then; its scaler skips the step
        return math.isfinite(loss) and math.isfinite(norm)

    @contextmanager
    def evaluation_model(self) -> Iterator[optim.Model]:
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
        """CPU copies for a checkpoint, on the main process; every process calls it."""
        keep = self.accelerator.is_main_process
        optimizer_state = (
            (f"{name}/{what}", value)  # e.g. projection.weight/exp_avg
            for name, parameter in self._named
            for what, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        )
        tensors = {
            "model": distributed.cpu_copies(self._trained.state_dict().items(), keep),
            "optimizer": distributed.cpu_copies(optimizer_state, keep),
        }
        if self._ema is not None:
            tensors["ema"] = distributed.cpu_copies(self._ema.tensors.items(), keep)
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
        named = self._ema.tensors if self._ema else named_state(self._trained)
        for name, tensor in named_state(self.model).items():
            tensor.copy_(distributed.full_tensor(named[name].detach()))


def _with_hidden_copy(batch: PackedBatch) -> PackedBatch:
    """A batch of which nothing can be hidden, with a hidden copy of its first token."""
    first, *others = batch.segments.lengths
    longer = replace(
        batch,
        tokens=torch.cat((batch.tokens[:1], batch.tokens)),
        positions=torch.cat((batch.positions[:1], batch.positions)),
        segments=Segments((first + 1, *others), batch.segments.device),
        token_index=None,
    )
    index = torch.arange(longer.segments.total, device=batch.segments.device)
    return longer.with_mask(index == 0)


def raise_non_finite(
    folder: Path,
    step: int,
    rank: int,
    micro_batches: list[PackedBatch],
    loss: float = float("nan"),
    norm: float = float("nan"),
) -> NoReturn:
    """Raise NonFiniteLoss with the samples of a step, and write its micro-batches to a file.

    ``non_finite/step-…-rank-….safetensors`` holds their arrays as ``i/tokens``, ``i/lengths``, …, and
    step, loss and gradient norm as metadata.
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
