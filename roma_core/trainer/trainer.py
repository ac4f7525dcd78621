"""The training loop, on Accelerate: the same script for one process or many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from roma_core.job import Attempt, Interrupted, StopRequests
from roma_core.model.packing import PackedBatch
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.progress import Progress
from roma_core.trainer.checkpoint import Checkpointer, TrainState, load_best, load_newest
from roma_core.trainer.config import TrainerConfig, describe_changes, describe_resumable
from roma_core.trainer.dataloader import MapStyle, TrainLoader
from roma_core.trainer.defaults import PrimaryMetric
from roma_core.trainer.distributed import init_accelerator, init_group
from roma_core.trainer.evaluator import EarlyStopping, evaluate, unknown_metric
from roma_core.trainer.metrics import ThroughputMeter
from roma_core.trainer.optim import Model, labels_of, training_loss
from roma_core.trainer.sampler import make_sampler
from roma_core.trainer.step import NonFiniteLoss, TrainStep, raise_non_finite
from roma_core.trainer.trackers import RunLogger

__all__ = ["NonFiniteLoss", "Trainer", "TrainingEnd"]


@dataclass(frozen=True)
class TrainingEnd:
    """How a call of :meth:`Trainer.train` ended."""

    status: Literal["completed", "continue"]  # "continue" after a stop request and a checkpoint
    step: int  # finished optimiser steps
    metrics: dict[str, float]  # of the weights that the model is left with
    reason: str  # of the stop, or of early stopping
    elapsed_s: float  # training time over all attempts
    world_size: int
    weights_step: int = 0  # step of the weights that the model is left with


class Trainer:
    """Trains either model; resumes from the newest checkpoint of ``checkpoint_dir``, if there is one.

    Start the same script with ``python``, ``accelerate launch`` or ``torchrun``. ``progress`` takes the
    place of :class:`~roma_core.progress.Progress`.
    """

    def __init__(
        self,
        config: TrainerConfig | type[TrainerConfig] | None = None,
        progress: Callable[[str, int, int], Progress] | None = None,
    ) -> None:
        self.config = config() if isinstance(config, type) else config or TrainerConfig()
        self._progress = progress or Progress
        self._evaluate_callback: Callable[..., Any] | None = None
        self._post_train_hook: Callable[..., Any] | None = None

    def set_evaluate_callback(self, callback: Callable[..., Any]) -> None:
        """``callback(model, train_loss, test_dataset)`` runs after each evaluation, on every process.

        If it returns a dictionary of numbers, they are logged as ``eval/…`` too.
        """
        self._evaluate_callback = callback

    def set_post_train_hook(self, hook: Callable[..., Any]) -> None:
        """``hook(model, run, device)`` runs once after a completed training, on rank 0.

        ``run`` is the folder of the run.
        """
        self._post_train_hook = hook

    def train(
        self,
        train_dataset: MapStyle,
        test_dataset: MapStyle | None,
        model: Model,
        *,
        folder: Path | None = None,
        attempt: Attempt | None = None,
        what: str = "train",
    ) -> TrainingEnd:
        """Train to the end, or until a stop request.

        Args:
            model: moved to this process's device and trained in place.
            folder: of the run; ``metrics.jsonl`` goes there. ``checkpoint_dir`` by default.
            attempt: where to write heartbeats and check for a stop file, if a launcher watches.
            what: name of the training in progress messages.

        Raises:
            NonFiniteLoss: with the ids of the samples.
            ValueError: data, checkpoint and configuration do not match.
        """
        if len(train_dataset) == 0:
            raise ValueError("train_dataset is empty; there is nothing to train on")
        if isinstance(model, RoMAForClassification) and model.head is None:
            model.set_outputs(int(labels_of(train_dataset).max()) + 1)
        self.attempt, self.folder = attempt, folder or self.config.checkpoint_dir.absolute()
        with StopRequests(attempt.stop if attempt else None) as self.stops:
            self._set_up(train_dataset, test_dataset, model, what)
            with self.logger, self.checkpointer, self.loader, closing(self.train_step):
                status: Literal["completed", "continue"] = "completed"
                try:
                    self._train_to_end()
                    reason = self._complete(model)
                except Interrupted:
                    self._save()
                    self.checkpointer.wait()
                    status = "continue"
                    reason = self.stops.reason or "another process was asked to stop"
                    self.logger.say(f"asked to stop ({reason}); saved at step {self.step}")
                progress = (self.step, self.evaluation, reason, self._elapsed_s())
                end = TrainingEnd(status, *progress, self.group.size, self.weights_step)
        if status == "completed" and self._post_train_hook and self.group.is_main:
            self._post_train_hook(model, self.folder, self.accelerator.device)
        del self.train_step, self.loader, self.accelerator  # free the optimiser
        return end

    def _set_up(
        self, train_dataset: MapStyle, test_dataset: MapStyle | None, model: Model, what: str
    ) -> None:
        """Load the newest checkpoint, and create everything a run needs."""
        config = self.config
        self.group = group = init_group()
        self.accelerator = accelerator = init_accelerator(config, model)
        _check_settings(
            config, model, train_dataset, test_dataset, self._evaluate_callback is not None
        )
        loss = training_loss(model, config, train_dataset)

        checkpoint = load_newest(config.checkpoint_dir, group)
        self.resumed_from = checkpoint.path.name if checkpoint else ""
        state, tensors = (checkpoint.state, checkpoint.tensors) if checkpoint else (None, None)
        global_batch_size = state.global_batch_size if state else None
        self.sampler = make_sampler(config, train_dataset, group.size, global_batch_size)
        if getattr(model, "stem", None) is not None:  # its batch normalisation needs all lengths
            self.sampler.sorts = False
        self.total_steps = config.epochs * self.sampler.batches_per_epoch
        if state:
            _check_same_run(state, config, len(train_dataset), self.total_steps)
        self.first_world_size = (state and state.first_world_size) or group.size
        sizes = (self.total_steps, self.first_world_size)
        self.train_step = TrainStep(accelerator, group, model, loss, config, *sizes, tensors)
        if accelerator.scaler is not None and state and state.scaler:
            accelerator.scaler.load_state_dict(state.scaler)
        self.loader = TrainLoader(
            config, self.sampler, train_dataset, model.config, group, accelerator.device, self.stops
        )
        self.test_dataset = test_dataset
        self.step = self.weights_step = state.step if state else 0
        self.logger = RunLogger(
            self._progress(what, self.total_steps, self.step),
            self.folder,
            config,
            batches_per_epoch=self.sampler.batches_per_epoch,
            offset=state.metrics_offset if state else 0,
            is_main=group.is_main,
        )
        self.checkpointer = Checkpointer(config, self.logger, group)

        # step, loss and gradient norm of steps, still on the device: reading each would wait for it
        self.unread: list[tuple[int, Tensor, Tensor]] = []
        self.grad_norm = float("nan")
        self.n_empty_steps = 0  # since the run was resumed
        self.started, self.last_heartbeat = time.monotonic(), float("-inf")
        self.meter, self.elapsed_before_s = ThroughputMeter(), 0.0
        self.evaluation: dict[str, float] = {}
        self.evaluation_due = False
        self.early_stopping = EarlyStopping(
            config.best_metric_mode, config.early_stopping_min_delta, config.early_stopping_patience
        )
        if state:
            self.meter = ThroughputMeter(state.window_steps, state.window_loss)
            self.elapsed_before_s = state.elapsed_s
            self.evaluation, self.evaluation_due = dict(state.evaluation), state.evaluation_due
            self.early_stopping.best = state.best
            self.early_stopping.evaluations_since_best = state.evaluations_since_best
        self.evaluated_at = self.step if self.evaluation else -1

    def _train_to_end(self) -> None:
        """The loop: step, log, evaluate and save, until the last step or early stopping."""
        n_parameters = sum(p.numel() for p in self.train_step.model.parameters())
        self.logger.say(
            f"{f'resumed from {self.resumed_from} ' if self.resumed_from else ''}"
            f"{n_parameters:,} parameters, {self.sampler.n_samples} series, global batch "
            f"{self.sampler.global_batch_size} {self.sampler.unit}, {self.total_steps} steps, "
            f"{self.group.size} process(es){' (sharded)' if self.train_step.is_sharded else ''} "
            f"on {self.accelerator.device}"
        )
        batches = self.loader.steps(self.step)
        if self.evaluation_due:  # a stop request came before it ended
            self._evaluate_and_save()
        while self.step < self.total_steps and not self.early_stopping.should_stop:
            self._heartbeat()
            self.checkpointer.check()
            self._do_step(batches)
            if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                self._read_losses()
                if self.meter.steps:  # else all were passed over
                    meter, self.meter = self.meter, ThroughputMeter()
                    optimiser = {"train/lr": self.train_step.lr, "train/grad_norm": self.grad_norm}
                    self.logger.log_training(self.step, meter.metrics() | optimiser)
            self._evaluate_and_save()
        self.checkpointer.wait()
        if self.n_empty_steps:
            self.logger.say(f"{self.n_empty_steps} steps had nothing to hide and were passed over")

    def _complete(self, model: Model) -> str:
        """Leave the final weights in the model; returns the reason of an early end."""
        config, reason, self.weights_step = self.config, "", self.step
        if not self.evaluation:  # the last checkpoint was not evaluated
            self.evaluation = self._measure(float("nan"))
        if self.step < self.total_steps:
            reason = (
                f"early stopping: {self.early_stopping.evaluations_since_best} evaluations without a "
                f"better {config.best_metric} than {self.early_stopping.best}"
            )
            self.logger.say(f"{reason}; ended at step {self.step}")
        if config.final_weights == "last":
            self.train_step.finish()
            return reason
        best = load_best(config, self.group)
        if best is None:
            raise ValueError(
                f"final_weights=best: no checkpoint in {config.checkpoint_dir} was evaluated with "
                f"{config.best_metric}"
            )
        model.load_state_dict(best.tensors.get("ema", best.tensors["model"]))
        self.evaluation, self.weights_step = best.state.evaluation, best.state.step
        self.logger.say(f"weights of step {self.weights_step}, the best, are kept")
        return reason

    def _do_step(self, batches: Iterator[list[PackedBatch]]) -> None:
        """Do one optimiser step; Interrupted, on all processes, if one is asked to stop."""
        with self.meter.timed("waiting"):
            try:
                micro_batches = next(batches)
            except Interrupted:
                micro_batches = []  # other processes have theirs: all agree to stop in the next sum
        count = sum(map(self.train_step.model.loss_count, micro_batches))
        n_tokens = sum(batch.segments.total for batch in micro_batches)
        count, tokens, stop = self.group.sum([count, n_tokens, self.stops.requested()])
        if stop:
            raise Interrupted
        self.meter.tokens += tokens
        if not count:  # all processes agree, and again after a resume
            if not self.n_empty_steps:
                self.logger.say(
                    f"step {self.step + 1} has nothing to hide, its series have one token each; such "
                    f"steps are passed over"
                )
            self.n_empty_steps += 1
            self.step += 1
            return
        try:
            loss, norm = self.train_step(self.step, micro_batches, count)
        except NonFiniteLoss:
            raise_non_finite(self.folder, self.step, self.group.rank, micro_batches)
        self.unread.append((self.step, loss, norm))
        self.step += 1

    def _read_losses(self) -> None:
        """Read loss and norm of the steps since the last call, in one wait for the device.

        Called before anything of these steps is logged or saved: a step that was not finite is found
        here at the latest, and nothing after it is kept.
        """
        if not self.unread:
            return
        steps, *scalars = zip(*self.unread, strict=True)
        self.unread = []
        losses, norms = torch.stack([torch.stack(part).double() for part in scalars]).tolist()
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            if not self.train_step.is_finite(loss, norm):
                batch = next(self.loader.steps(step))
                raise_non_finite(self.folder, step, self.group.rank, batch, loss, norm)
        self.grad_norm = norms[-1]
        for loss in self.group.sum(losses):
            self.meter.steps += 1
            self.meter.loss += loss

    def _heartbeat(self) -> None:
        if self.attempt is None or not self.group.is_main:
            return
        if time.monotonic() - self.last_heartbeat >= self.config.heartbeat_interval_s:
            self.last_heartbeat = time.monotonic()
            self.attempt.beat(self.step)

    def _should_stop(self) -> bool:
        """Called between the batches of an evaluation."""
        self._heartbeat()
        return self.stops.requested()

    def _elapsed_s(self) -> float:
        return self.elapsed_before_s + time.monotonic() - self.started

    def _evaluate_and_save(self) -> None:
        """Evaluate and save if this step is due for it."""
        is_last = self.step == self.total_steps
        is_best = False
        with self.meter.timed("paused"):
            if self.evaluation_due or self.step % self.config.eval_every == 0 or is_last:
                self.evaluation_due = True
                train_loss = self.logger.latest.get("train/loss", float("nan"))
                if metrics := self._measure(train_loss):
                    self.evaluation, self.evaluated_at = metrics, self.step
                    is_best = self.early_stopping.update(metrics[self.config.best_metric])
                    self.logger.log(self.step, metrics)
                self.evaluation_due = False
            is_end = is_last or self.early_stopping.should_stop
            is_kept = is_best and self.config.keep_best > 0
            if self.step % self.config.save_every == 0 or is_kept or is_end:
                self._save()

    def _measure(self, train_loss: float) -> dict[str, float]:
        """``eval/…`` metrics, the same on every process; none without a test set.

        Raises Interrupted after a stop request, ValueError if ``best_metric`` is not among them.
        """
        dataset, callback = self.test_dataset, self._evaluate_callback
        if dataset is None or not len(dataset):
            return {}
        with self.train_step.evaluation_model() as model:
            metrics = evaluate(model, dataset, self.config, self.group, self._should_stop)
            if callback is not None:
                extra = callback(model, train_loss, dataset) or {}
                metrics |= {f"eval/{name}": float(value) for name, value in extra.items()}
        metrics = self.group.gather(metrics)[0]  # a callback's may differ between processes
        if self.config.best_metric not in metrics:
            raise ValueError(unknown_metric(self.config.best_metric, sorted(metrics)))
        return metrics

    def _save(self) -> None:
        self._read_losses()
        scaler = self.accelerator.scaler
        evaluation = self.evaluation if self.evaluated_at == self.step else {}
        state = TrainState(
            step=self.step,
            n_samples=self.sampler.n_samples,
            global_batch_size=self.sampler.global_batch_size,
            seed=self.config.random_seed,
            total_steps=self.total_steps,
            elapsed_s=self._elapsed_s(),
            world_size=self.group.size,
            first_world_size=self.first_world_size,
            settings=self.config.model_dump(mode="json"),
            scaler=None if scaler is None else dict(scaler.state_dict()),
            window_steps=self.meter.steps,
            window_loss=self.meter.loss,
            evaluation={k: v for k, v in evaluation.items() if math.isfinite(v)},
            evaluation_due=self.evaluation_due,
            best=self.early_stopping.best,
            evaluations_since_best=self.early_stopping.evaluations_since_best,
        )
        tensors = self.train_step.state_dict()
        self.checkpointer.save(state, tensors, self.train_step.model.config_document())


def _check_settings(
    config: TrainerConfig,
    model: Model,
    train_dataset: MapStyle,
    test_dataset: MapStyle | None,
    has_callback: bool,
) -> None:
    """Raises ValueError, naming the setting, if this model or these data do not support it."""
    if isinstance(model, RoMAForPreTraining):
        if config.freeze_encoder:
            raise ValueError(
                "freeze_encoder trains only a classifier's head; pretraining would learn nothing: "
                "unset ROMA_TRAINER_FREEZE_ENCODER"
            )
        lengths = torch.as_tensor(getattr(train_dataset, "lengths", [2]))
        if not model.config.mask_fractions[1] or lengths.max() < 2:
            raise ValueError(
                f"pretraining has no token to hide: it needs series of two or more tokens and a "
                f"mask_ratio above 0, which is {model.config.mask_ratio}"
            )
    if test_dataset is None or len(test_dataset) == 0:
        needs_evaluation = {
            "early_stopping_patience": config.early_stopping_patience is not None,
            "final_weights=best": config.final_weights == "best",
        }
        for name in (n for n, is_set in needs_evaluation.items() if is_set):
            raise ValueError(
                f"{name} needs series to evaluate on, but the validation split (test_dataset) has none; "
                f"raise validation_fraction of the data set, or leave the setting out"
            )
    elif not has_callback:
        known = ["eval/loss"]
        if isinstance(model, RoMAForClassification):
            is_regression = model.config.problem_type == "regression"
            names = ("r2",) if is_regression else get_args(PrimaryMetric)
            known += [f"eval/{name}" for name in names]
        if config.best_metric not in known:
            raise ValueError(unknown_metric(config.best_metric, known))


def _check_same_run(
    state: TrainState, config: TrainerConfig, n_samples: int, total_steps: int
) -> None:
    """Raises ValueError if a checkpoint is of another run, naming what differs and what may."""
    changed = {
        name: (state.settings[name], value)
        for name, value in config.model_dump(mode="json", exclude=set(config.resumable())).items()
        if name in state.settings and state.settings[name] != value
    }
    pairs = {
        "random_seed": (state.seed, config.random_seed),
        "size of the training set": (state.n_samples, n_samples),
        "total steps (epochs)": (state.total_steps, total_steps),
    }
    changed |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if changed:
        raise ValueError(
            f"{config.checkpoint_dir} belongs to another run: {describe_changes(changed)}; set it back, "
            f"or give another checkpoint_dir. {describe_resumable()}"
        )
