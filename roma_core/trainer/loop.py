"""One call of ``Trainer.train``: the loop, and everything that lives no longer than it."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from roma_core.hashing import hash_ints
from roma_core.job import Attempt
from roma_core.model.classification import RoMAForClassification
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.model.weights import config_document, state_of
from roma_core.trainer.augmenting import augmentations_of
from roma_core.trainer.averaging import WeightAverage
from roma_core.trainer.batches import Collate, MapStyle, load
from roma_core.trainer.checkpoint import TrainState, load_newest, save_checkpoint
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.epoch_plan import Indices, plan_for
from roma_core.trainer.evaluating import classify, reconstruction_loss
from roma_core.trainer.followers import Followers
from roma_core.trainer.metrics_log import MetricsLog
from roma_core.trainer.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from roma_core.trainer.progress import Progress
from roma_core.trainer.schedule import learning_rate_factor
from roma_core.trainer.stopping import StopRequests

Model = RoMAForPreTraining | RoMAForClassification


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message names the samples of the step."""


@dataclass(frozen=True)
class TrainingEnd:
    """How a call of :meth:`Trainer.train` ended.

    Attributes:
        status: ``completed``, or ``continue`` if a stop request ended it early (it has saved).
        step: finished optimiser steps.
        metrics: of the last evaluation.
        reason: of the stop.
    """

    status: str
    step: int
    metrics: dict[str, float]
    reason: str = ""
    elapsed_s: float = 0.0  # training time over all attempts
    world_size: int = 1
    is_main_process: bool = True


class TrainingRun:
    """From the newest checkpoint, if there is one, to the end or a stop request."""

    def __init__(
        self,
        config: TrainerConfig,
        train_dataset: MapStyle,
        test_dataset: MapStyle | None,
        model: Model,
        folder: Path | None,
        attempt: Attempt | None,
        what: str,
        stops: StopRequests,
        evaluate_callback: Callable[..., Any] | None,
    ) -> None:
        self.config, self.model, self.attempt, self.what = config, model, attempt, what
        self.evaluate_callback = evaluate_callback
        self.train_dataset, self.test_dataset, self.stops = train_dataset, test_dataset, stops
        # without cpu=True, several processes on a computer without GPU would each train alone
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision
        )
        self.rank, self.world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.world_size != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
            raise RuntimeError(
                f"the launcher started {launched} processes, but they formed groups of {self.world_size}; "
                f"each would train alone. Check the rendezvous address and the launcher's flags"
            )
        if threads := config.threads or (None if self.accelerator.device.type == "cuda" else 1):
            torch.set_num_threads(threads)
        self.checkpoints = config.checkpoint_dir
        self.folder = folder or self.checkpoints.absolute()
        if config.label_smoothing and isinstance(model, RoMAForClassification):
            smoothed = partial(
                F.cross_entropy, reduction="none", label_smoothing=config.label_smoothing
            )
            model.set_loss_fn(smoothed)

        checkpoint = load_newest(self.checkpoints)
        state = checkpoint.state if checkpoint else None
        frozen = state.global_batch_size if state else None
        self.plan = plan_for(config, train_dataset, self.world_size, frozen)
        self.total_steps = config.epochs * self.plan.batches_per_epoch
        if state:
            self._check_same_run(state)
        self.step = state.step if state else 0
        self.elapsed_before = state.elapsed_s if state else 0.0
        self.warmup_steps = (
            math.ceil(self.total_steps / 10) if config.warmup_steps is None else config.warmup_steps
        )
        self.peak_lr = config.base_lr * (self.world_size if config.lr_scaling else 1)
        self.named = list(model.named_parameters())
        if checkpoint:
            model.load_state_dict(checkpoint.model)
        if config.compile:
            model.compile_regions()
        optimizer = make_optimizer(self.named, config)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.average: WeightAverage | None = None
        if config.ema_decay is not None:
            start = checkpoint.ema if checkpoint else None
            self.average = WeightAverage(model, config.ema_decay, start)
        if checkpoint:
            load_optimizer_state(self.optimizer.optimizer, self.named, checkpoint.optimizer)
            if self.accelerator.scaler is not None and checkpoint.state.scaler:
                self.accelerator.scaler.load_state_dict(checkpoint.state.scaler)
        self.resumed_from = checkpoint.path if checkpoint else None
        self.metrics_offset = state.metrics_offset if state else 0
        self.started = time.monotonic()
        self.last_beat = float("-inf")
        self.shown: dict[str, float] = {}
        self.evaluated: dict[str, float] = {}

    def _check_same_run(self, state: TrainState) -> None:
        same = {
            "random_seed": (self.config.random_seed, state.seed),
            "size of the training set": (len(self.train_dataset), state.n_samples),
            "total steps (epochs)": (self.total_steps, state.total_steps),
        }
        for name, (now, then) in same.items():
            if now != then:
                raise ValueError(
                    f"{self.checkpoints} belongs to another run: its {name} is {then}, now it is {now}; "
                    f"set it back, or give another checkpoint_dir"
                )

    def run(self) -> TrainingEnd:
        """The loop."""
        main = self.accelerator.is_main_process
        self.log = MetricsLog(self.folder / "metrics.jsonl", self.metrics_offset) if main else None
        self.followers = Followers.of_environment(self.folder, self.config) if main else None
        self.progress = Progress(self.what, self.total_steps, self.step) if main else None
        try:
            if self.progress:
                self.progress.__enter__()
                self.progress.say(self._first_words())
            if self.followers:
                self.followers.start(self.metrics_offset)
            return self._loop()
        finally:
            if self.progress:
                self.progress.__exit__(None, None, None)
            if self.followers:
                self.followers.close()
            if self.log:
                self.log.close()

    def _first_words(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        origin = f"resumed from {self.resumed_from.name} " if self.resumed_from else ""
        return (
            f"{origin}{n:,} parameters, {self.plan.n_samples} series, global batch {self.plan.global_batch_size} {self.plan.unit}, "
            f"{self.total_steps} steps, {self.world_size} process(es) on {self.accelerator.device}"
        )

    def _loop(self) -> TrainingEnd:
        batches = self._global_batches(self.step)
        window = _Window()
        while self.step < self.total_steps:
            self._beat()
            loaded = time.monotonic()
            micro_batches = next(batches)
            window.waited_s += time.monotonic() - loaded
            tokens = sum(batch.segments.total for batch in micro_batches)
            count, n_tokens, stop = self._sum_over_ranks(
                sum(self.model.loss_count(batch) for batch in micro_batches),
                tokens,
                self.stops.requested(),
            )
            if stop:
                return self._stopped()
            loss, norm = self._step(micro_batches, count)
            self.step += 1
            window.add(loss, norm, n_tokens)
            last = self.step == self.total_steps
            if self.step % self.config.log_every == 0 or last:
                self._log_training(window)
                window = _Window()
            if self.step % self.config.eval_every == 0 or last:
                self._evaluate()
            if self.step % self.config.save_every == 0 or last:
                self._save()
        if not self.evaluated:  # killed between the last checkpoint and the result
            self.evaluated = self._measured()
        return self._end("completed")

    def _stopped(self) -> TrainingEnd:
        self._save()
        reason = self.stops.reason or "another process was asked to stop"
        if self.progress:
            self.progress.say(f"asked to stop ({reason}); saved at step {self.step}")
        return self._end("continue", reason)

    def _end(self, status: str, reason: str = "") -> TrainingEnd:
        if status == "completed" and self.average is not None:
            self.model.load_state_dict(self.average.tensors)  # what was evaluated is what is kept
        return TrainingEnd(
            status=status,
            step=self.step,
            metrics=self.evaluated,
            reason=reason,
            elapsed_s=self._elapsed_s(),
            world_size=self.world_size,
            is_main_process=self.accelerator.is_main_process,
        )

    def _elapsed_s(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    # --- one step ---------------------------------------------------------------------------

    def _global_batches(self, first_step: int) -> Iterator[list[PackedBatch]]:
        """This process's micro-batches of each step, from ``first_step`` to the end."""
        augmentations = augmentations_of(
            self.config, self.model.config.n_channels, self.train_dataset
        )
        # one loader for all epochs, which may be a batch or more ahead of the steps
        steps, ahead = itertools.tee(self._shares(first_step))
        loaded = load(
            self.train_dataset,
            ((epoch, indices) for epoch, share in ahead for indices in share),
            Collate(self.model.config, self.config.random_seed, augmentations),
            self.config.num_dataset_workers,
            pin=self.accelerator.device.type == "cuda",
        )
        for _, share in steps:
            yield [next(loaded).to(self.accelerator.device) for _ in share]

    def _shares(self, first_step: int) -> Iterator[tuple[int, list[Indices]]]:
        """Epoch and sample indices of this process's micro-batches, step after step."""
        first_epoch, first = divmod(first_step, self.plan.batches_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            for batch in self.plan.epoch(epoch)[first if epoch == first_epoch else 0 :]:
                yield epoch, self.plan.share(batch, self.rank, self.world_size)

    def _sum_over_ranks(self, *numbers: float) -> list[float]:
        """One small reduction per step: loss count, tokens, stop requests."""
        if self.world_size == 1:
            return [float(n) for n in numbers]
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.accelerator.device)
        dist.all_reduce(sums)
        return sums.tolist()

    def _step(self, micro_batches: list[PackedBatch], count: float) -> tuple[Tensor, Tensor]:
        """Forward, backward, clip, step. The loss is a mean over ``count`` terms of all ranks."""
        if count == 0:
            raise ValueError(
                f"step {self.step} has nothing to learn from: no token of its series is hidden; "
                f"series need at least two tokens and mask_ratio must be above 0"
            )
        torch.manual_seed(hash_ints(self.config.random_seed, self.step, self.rank))
        lr = self.peak_lr * learning_rate_factor(
            self.config.lr_schedule, self.step, self.total_steps, self.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.wrapped.train()
        total = torch.zeros((), dtype=torch.float64)
        for i, batch in enumerate(micro_batches):
            share = self.model.loss_count(batch) / count
            if i + 1 < len(micro_batches):
                with self.accelerator.no_sync(self.wrapped):
                    total += self._backward(batch, share)
            else:
                total += self._backward(batch, share)
        if self.config.gradient_clip is not None:
            norm = self.accelerator.clip_grad_norm_(
                self.wrapped.parameters(), self.config.gradient_clip
            )
        else:
            norm = torch.nn.utils.get_total_norm(
                [p.grad for _, p in self.named if p.grad is not None]
            )
        if not math.isfinite(float(total)):
            self._refuse_non_finite(micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.step)
        return total, norm

    def _backward(self, batch: PackedBatch, share: float) -> Tensor:
        """Backward of one micro-batch's part of the global mean; gradients average over ranks."""
        _, loss = self.wrapped(batch)
        if loss is None:
            raise ValueError(
                f"samples {batch.sample_ids.tolist()} give no loss: they have no label, or nothing to hide"
            )
        self.accelerator.backward(loss * share * self.world_size)
        return loss.detach().double().cpu() * share

    def _refuse_non_finite(self, micro_batches: list[PackedBatch]) -> None:
        ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
        raise NonFiniteLoss(
            f"the loss is not finite in step {self.step} on process {self.rank}; sample ids {ids}. "
            f"Look at these series (roma data inspect), lower base_lr, or set gradient_clip"
        )

    # --- between steps ----------------------------------------------------------------------

    def _beat(self) -> None:
        if self.attempt is None or not self.accelerator.is_main_process:
            return
        if time.monotonic() - self.last_beat >= self.config.heartbeat_every_s:
            self.last_beat = time.monotonic()
            self.attempt.beat(self.step)

    def _log_training(self, window: _Window) -> None:
        loss = self._sum_over_ranks(float(window.loss))[0] / window.steps
        if self.log is None or self.progress is None:
            return
        seconds = time.monotonic() - window.started
        metrics = {
            "train/loss": loss,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/grad_norm": float(window.norm),
            "train/tokens_per_s": window.n_tokens / seconds,
            "train/data_wait_share": window.waited_s / seconds,
        }
        self._record(metrics)
        self.progress.update(self.step, self.shown, force=self.step == self.total_steps)

    def _record(self, metrics: dict[str, float]) -> None:
        if self.log is not None:
            self.shown |= metrics
            self.log.append(self.step, self.step / self.plan.batches_per_epoch, metrics)

    def _evaluate(self) -> None:
        self.evaluated = self._measured()
        if self.evaluated:
            self._record(self.evaluated)
            if self.progress:
                self.progress.update(self.step, self.shown, force=True)

    def _measured(self) -> dict[str, float]:
        """Metrics on the test set, on all processes alike; empty without one."""
        if self.test_dataset is None or len(self.test_dataset) == 0:
            return {}
        arguments = (
            self.test_dataset,
            Collate(self.model.config, self.config.random_seed),
            self.config.batch_size,
            self.rank,
            self.world_size,
        )
        with self.average.applied() if self.average else nullcontext():
            if isinstance(self.model, RoMAForPreTraining):
                metrics = {"eval/loss": reconstruction_loss(self.model, *arguments)}
            else:
                outputs = classify(self.model, *arguments)
                metrics = {"eval/loss": outputs.loss}
                if outputs.labels is not None and outputs.labels.ndim == 1:
                    right = outputs.logits.argmax(1) == outputs.labels
                    metrics["eval/accuracy"] = float(right.mean())
            if self.evaluate_callback is not None:
                loss = self.shown.get("train/loss", float("nan"))
                extra = self.evaluate_callback(self.model, loss, self.test_dataset)
                metrics |= {f"eval/{k}": float(v) for k, v in (extra or {}).items()}
        return metrics

    def _save(self) -> None:
        """Commit a checkpoint; the other ranks wait, so that none runs ahead of a failed save."""
        if self.accelerator.is_main_process:
            assert self.log is not None and self.followers is not None
            scaler = self.accelerator.scaler
            state = TrainState(
                step=self.step,
                n_samples=self.plan.n_samples,
                global_batch_size=self.plan.global_batch_size,
                seed=self.config.random_seed,
                total_steps=self.total_steps,
                metrics_offset=self.log.offset,
                elapsed_s=self._elapsed_s(),
                world_size=self.world_size,
                scaler=None if scaler is None else dict(scaler.state_dict()),
            )
            save_checkpoint(
                self.checkpoints,
                state,
                state_of(self.model),
                config_document(self.model),
                optimizer_state(self.optimizer.optimizer, self.named),
                self.average.on_cpu() if self.average else None,
                self.config.max_checkpoints,
            )
            self.followers.committed(self.log.offset)
        self.accelerator.wait_for_everyone()


class _Window:
    """Sums over the steps since the last record."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.steps = 0
        self.n_tokens = self.waited_s = 0.0
        self.loss: Tensor | float = 0.0
        self.norm: Tensor | float = 0.0

    def add(self, loss: Tensor, norm: Tensor, n_tokens: float) -> None:
        self.steps += 1
        self.loss = self.loss + loss
        self.norm = norm
        self.n_tokens += n_tokens
