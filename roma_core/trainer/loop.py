"""One call of ``Trainer.train``: the loop, and everything that lives no longer than it."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from roma_core.job import Attempt
from roma_core.model.classification import RoMAForClassification
from roma_core.model.packing import PackedBatch
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.model.weights import config_document, state_of
from roma_core.trainer.augmenting import augmentations_of
from roma_core.trainer.averaging import WeightAverage
from roma_core.trainer.batches import Collate, MapStyle, load
from roma_core.trainer.checkpoint import (
    Content,
    Retention,
    TrainState,
    load_best,
    load_newest,
    save_checkpoint,
)
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.early_stopping import Course
from roma_core.trainer.epoch_plan import Indices, plan_for
from roma_core.trainer.evaluating import classify, reconstruction_loss
from roma_core.trainer.followers import Followers
from roma_core.trainer.loader_processes import LoaderProcesses
from roma_core.trainer.losses import training_loss
from roma_core.trainer.metrics_log import MetricsLog
from roma_core.trainer.non_finite import NonFiniteLoss, dump_batches
from roma_core.trainer.optimizer import (
    freeze_all_but_head,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
)
from roma_core.trainer.progress import Progress
from roma_core.trainer.ranks import Ranks
from roma_core.trainer.step import TrainStep
from roma_core.trainer.stopping import Interrupted, StopRequests
from roma_core.trainer.window import Window
from roma_core.trainer.writing import BackgroundWriter

Model = RoMAForPreTraining | RoMAForClassification
_LOADER_POLL_S = 1.0  # how often a wait for loader processes looks for stop requests


@dataclass(frozen=True)
class TrainingEnd:
    """How a call of :meth:`Trainer.train` ended.

    Attributes:
        status: ``completed``, or ``continue`` if a stop request ended it early (it has saved).
        step: finished optimiser steps.
        metrics: of the last evaluation.
        reason: of the stop, or of an early end.
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
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"{self.accelerator.distributed_type} was asked for at launch, but checkpoints here hold "
                f"whole tensors by name: a sharded model cannot be resumed on another number of "
                f"processes. Launch without it; a RoMA of 100 M parameters fits any GPU"
            )
        self.ranks = Ranks(self.rank, self.world_size)
        if self.world_size != (launched := int(os.environ.get("WORLD_SIZE", "1"))):
            raise RuntimeError(
                f"the launcher started {launched} processes, but they formed groups of {self.world_size}; "
                f"each would train alone. Check the rendezvous address and the launcher's flags"
            )
        if threads := config.threads or (None if self.accelerator.device.type == "cuda" else 1):
            torch.set_num_threads(threads)
        self.checkpoints = config.checkpoint_dir
        self.folder = folder or self.checkpoints.absolute()
        self._check_wishes()
        self.own_loss = model.loss_fn
        self.loss = training_loss(model, config, train_dataset)
        if config.freeze_encoder and isinstance(model, RoMAForClassification):
            freeze_all_but_head(model)

        checkpoint = load_newest(self.checkpoints)
        state = checkpoint.state if checkpoint else None
        frozen = state.global_batch_size if state else None
        self.plan = plan_for(config, train_dataset, self.world_size, frozen)
        self.total_steps = config.epochs * self.plan.batches_per_epoch
        if state:
            self._check_same_run(state)
        self.step = state.step if state else 0
        self.elapsed_before = state.elapsed_s if state else 0.0
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
        self.train_step = TrainStep(
            self.accelerator, model, self.wrapped, self.optimizer, config, self.total_steps
        )
        self.resumed_from = checkpoint.path if checkpoint else None
        self.metrics_offset = state.metrics_offset if state else 0
        self.started = time.monotonic()
        self.last_beat = float("-inf")
        self.shown: dict[str, float] = {}
        self.retention = Retention(
            config.max_checkpoints, config.keep_best, config.best_metric, config.best_metric_mode
        )
        # steps whose numbers nobody has read yet: index, this process's loss, gradient norm
        self.unread: list[tuple[int, Tensor, Tensor]] = []
        self.norm = float("nan")
        self.window = Window(state.window_steps, state.window_loss) if state else Window()
        self.evaluated: dict[str, float] = dict(state.evaluation) if state else {}
        self.evaluated_at = self.step if self.evaluated else -1
        self.evaluation_due = state.evaluation_due if state else False
        self.course = Course(state.best, state.evaluations_since_best) if state else Course()

    def _check_wishes(self) -> None:
        """Refuse what this model or these data cannot give."""
        if self.config.freeze_encoder and isinstance(self.model, RoMAForPreTraining):
            raise ValueError(
                "freeze_encoder trains a classifier's head alone; pretraining would learn nothing: "
                "unset ROMA_TRAINER_FREEZE_ENCODER"
            )
        needs_evaluation = {
            "early_stopping_patience": self.config.early_stopping_patience is not None,
            "final_weights=best": self.config.final_weights == "best",
        }
        if self.test_dataset is None or len(self.test_dataset) == 0:
            for name in (n for n, wished in needs_evaluation.items() if wished):
                raise ValueError(f"{name} needs a test_dataset with series to evaluate on")
        elif self.evaluate_callback is None:
            known = ["eval/loss"]
            if isinstance(self.model, RoMAForClassification):
                judged = self.model.config.problem_type == "classification"
                known += ["eval/accuracy"] if judged else []
            if self.config.best_metric not in known:
                raise ValueError(_no_such_metric(self.config.best_metric, known))

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
        self.writer = BackgroundWriter(self.config.background_checkpoints)
        self.loader_processes = LoaderProcesses()
        self.model.set_loss_fn(self.loss)
        try:
            if self.progress:
                self.progress.__enter__()
                self.progress.say(self._first_words())
            if self.followers:
                self.followers.start(self.metrics_offset)
            return self._loop()
        except Interrupted:
            return self._stopped()
        finally:
            self.model.set_loss_fn(self.own_loss)
            self.loader_processes.forget()
            self.writer.close()
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
        if self.evaluation_due:  # a stop request came before it ended
            self._evaluate_and_save()
        while self.step < self.total_steps and not self._is_out_of_patience():
            self._beat()
            self.writer.check()
            micro_batches = self._next_of(batches)
            tokens = sum(batch.segments.total for batch in micro_batches)
            count, n_tokens, stop = self.ranks.sum(
                [
                    sum(self.model.loss_count(batch) for batch in micro_batches),
                    tokens,
                    self.stops.requested(),
                ]
            )
            if stop:
                raise Interrupted
            self._step(micro_batches, count)
            self.window.tokens += n_tokens
            if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                self._log_training()
            self._evaluate_and_save()
        self._keep_what_is_written()
        if not self.evaluated:  # a checkpoint of an older version does not tell
            self.evaluated = self._measured()
        reason = ""
        if self.step < self.total_steps:
            reason = (
                f"early stopping: {self.course.evaluations_since} evaluations without a better "
                f"{self.config.best_metric} than {self.course.best}"
            )
            if self.progress:
                self.progress.say(f"{reason}; ended at step {self.step}")
        return self._end("completed", reason)

    def _next_of(self, batches: Iterator[list[PackedBatch]]) -> list[PackedBatch]:
        """The next step's micro-batches; none if a stop request ended the wait for them."""
        with self.window.waiting():
            try:
                return next(batches)
            except Interrupted:
                return []  # the others have theirs: let all agree to stop

    def _is_out_of_patience(self) -> bool:
        return self.course.is_exhausted(self.config.early_stopping_patience)

    def _evaluate_and_save(self) -> None:
        """What is due after a finished step."""
        last = self.step == self.total_steps
        is_best = False
        if self.evaluation_due or self.step % self.config.eval_every == 0 or last:
            self.evaluation_due = True
            best = self.course.best
            with self.window.paused():
                self._evaluate()
            self.evaluation_due = False
            is_best = self.course.best != best and self.config.keep_best > 0
        ends = last or self._is_out_of_patience()
        if self.step % self.config.save_every == 0 or is_best or ends:
            with self.window.paused():
                self._save()

    def _stopped(self) -> TrainingEnd:
        self._save()
        self._keep_what_is_written()
        reason = self.stops.reason or "another process was asked to stop"
        if self.progress:
            self.progress.say(f"asked to stop ({reason}); saved at step {self.step}")
        return self._end("continue", reason)

    def _end(self, status: str, reason: str = "") -> TrainingEnd:
        if status == "completed" and self.config.final_weights == "best":
            self._take_best()
        elif status == "completed" and self.average is not None:
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

    def _take_best(self) -> None:
        found = load_best(self.checkpoints, self.config.best_metric, self.config.best_metric_mode)
        if found is None:
            raise ValueError(
                f"final_weights=best: no checkpoint in {self.checkpoints} was evaluated with "
                f"{self.config.best_metric}"
            )
        self.model.load_state_dict(found.model if found.ema is None else found.ema)
        self.evaluated = found.state.evaluation
        if self.progress:
            self.progress.say(f"weights of step {found.state.step}, the best, are kept")

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
            patience_s=_LOADER_POLL_S,
        )
        for _, share in steps:
            yield [self._awaited(loaded).to(self.accelerator.device) for _ in share]

    def _shares(self, first_step: int) -> Iterator[tuple[int, list[Indices]]]:
        """Epoch and sample indices of this process's micro-batches, step after step."""
        first_epoch, first = divmod(first_step, self.plan.batches_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            for batch in self.plan.epoch(epoch)[first if epoch == first_epoch else 0 :]:
                yield epoch, self.plan.share(batch, self.rank, self.world_size)

    def _awaited(self, loaded: Iterator[PackedBatch]) -> PackedBatch:
        """The next micro-batch; :class:`Interrupted` if a stop request comes first."""
        while not self.stops.requested():
            try:
                return next(loaded)
            except RuntimeError as error:
                if "timed out" not in str(error):  # the loader's word for "not yet"
                    raise
        if self.config.num_dataset_workers:
            self.loader_processes.kill()
        raise Interrupted

    def _step(self, micro_batches: list[PackedBatch], count: float) -> None:
        try:
            loss, norm = self.train_step(self.step, micro_batches, count)
        except NonFiniteLoss:
            self._refuse_non_finite(self.step, float("nan"), float("nan"), micro_batches)
            raise
        self.unread.append((self.step, loss, norm))
        self.step += 1
        if self.average is not None:
            self.average.update(self.step - 1)

    def _read_losses(self) -> None:
        """Read the numbers of the steps since the last time, in one wait for the device.

        Called before anything of these steps is recorded or saved: a step that was not finite is
        found here, at the latest, and nothing after it is kept.
        """
        if not self.unread:
            return
        steps, losses, norms = zip(*self.unread, strict=True)
        self.unread = []
        read = torch.stack([torch.stack(losses), torch.stack(norms).double()]).tolist()
        for step, loss, norm in zip(steps, *read, strict=True):
            if not self.train_step.is_finite(loss, norm):
                self._refuse_non_finite(step, loss, norm, next(self._global_batches(step)))
        self.norm = read[1][-1]
        for loss in self.ranks.sum(read[0]):
            self.window.add(loss)

    def _refuse_non_finite(
        self, step: int, loss: float, norm: float, micro_batches: list[PackedBatch]
    ) -> None:
        path = dump_batches(self.folder, step, self.rank, micro_batches, loss, norm)
        ids = [int(i) for batch in micro_batches for i in batch.sample_ids]
        raise NonFiniteLoss(
            f"the loss is not finite in step {step} on process {self.rank}; sample ids {ids}. "
            f"Look at these series (roma data inspect; the batch is in {path}), lower base_lr, or set "
            f"gradient_clip"
        )

    # --- between steps ----------------------------------------------------------------------

    def _beat(self) -> None:
        if self.attempt is None or not self.accelerator.is_main_process:
            return
        if time.monotonic() - self.last_beat >= self.config.heartbeat_every_s:
            self.last_beat = time.monotonic()
            self.attempt.beat(self.step)

    def _log_training(self) -> None:
        self._read_losses()
        window, self.window = self.window, Window()
        if self.progress is None:
            return
        metrics = window.metrics() | {
            "train/lr": self.train_step.lr,
            "train/grad_norm": self.norm,
            "train/epoch": self.step / self.plan.batches_per_epoch,
            "train/eta_s": self.progress.eta_s(self.step),
        }
        self._record(metrics)
        self.progress.update(self.step, self.shown, force=self.step == self.total_steps)

    def _record(self, metrics: dict[str, float]) -> None:
        if self.log is not None:
            self.shown |= metrics
            self.log.append(self.step, self.step / self.plan.batches_per_epoch, metrics)

    def _evaluate(self) -> None:
        measured = self._measured()
        if not measured:
            return
        watched = self.config.best_metric
        if watched not in measured:
            raise ValueError(_no_such_metric(watched, sorted(measured)))
        self.evaluated, self.evaluated_at = measured, self.step
        self.course = self.course.after(
            measured[watched], self.config.best_metric_mode, self.config.early_stopping_min_delta
        )
        self._record(measured)
        if self.progress:
            self.progress.update(self.step, self.shown, force=True)

    def _keeps_going(self) -> bool:
        """Asked between the batches of an evaluation."""
        self._beat()
        return not self.stops.requested()

    def _measured(self) -> dict[str, float]:
        """Metrics on the test set, on all processes alike; empty without one."""
        if self.test_dataset is None or len(self.test_dataset) == 0:
            return {}
        arguments = (
            self.test_dataset,
            Collate(self.model.config, self.config.random_seed),
            self.config.batch_size,
            self.ranks,
            self._keeps_going,
        )
        self.model.set_loss_fn(self.own_loss)
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
        self.model.set_loss_fn(self.loss)
        return self.ranks.gather(metrics)[0]  # a callback may differ; all act on the same numbers

    def _save(self) -> None:
        """Copy what a checkpoint holds, and write it beside the training."""
        self._read_losses()
        if not self.accelerator.is_main_process:
            return
        assert self.log is not None and self.followers is not None
        log, followers, scaler = self.log, self.followers, self.accelerator.scaler
        here = self.evaluated if self.evaluated_at == self.step else {}
        content = Content(
            TrainState(
                step=self.step,
                n_samples=self.plan.n_samples,
                global_batch_size=self.plan.global_batch_size,
                seed=self.config.random_seed,
                total_steps=self.total_steps,
                metrics_offset=log.offset,
                elapsed_s=self._elapsed_s(),
                world_size=self.world_size,
                scaler=None if scaler is None else dict(scaler.state_dict()),
                window_steps=self.window.steps,
                window_loss=self.window.loss,
                evaluation={k: v for k, v in here.items() if math.isfinite(v)},
                evaluation_due=self.evaluation_due,
                best=self.course.best,
                evaluations_since_best=self.course.evaluations_since,
            ),
            state_of(self.model),
            config_document(self.model),
            optimizer_state(self.optimizer.optimizer, self.named),
            self.average.on_cpu() if self.average else None,
        )

        def write() -> None:
            log.sync()
            save_checkpoint(self.checkpoints, content, self.retention)
            followers.committed(content.state.metrics_offset)

        self.writer.write(write)

    def _keep_what_is_written(self) -> None:
        """Every process waits until the last checkpoint is committed."""
        self.writer.wait()
        self.ranks.wait()


def _no_such_metric(wanted: str, given: list[str]) -> str:
    return (
        f"best_metric is {wanted}, but an evaluation of this model gives {', '.join(given)}; name one "
        f"of these, or give it in the evaluate callback"
    )
