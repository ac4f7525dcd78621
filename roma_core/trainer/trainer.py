"""The training loop, on Accelerate: one process or many, one script everywhere.

What is refused before the first step: wishes that model or data cannot fulfil, and other runs.
One call of ``Trainer.train``: from the newest checkpoint, if there is one, to the end or a stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_core.job import Attempt
from roma_core.model.packing import PackedBatch
from roma_core.model.prediction import RoMAForClassification
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.trainer.checkpoint import EarlyStopping, TrainState, load_best, load_newest
from roma_core.trainer.config import RESUMABLE, TrainerConfig, told, what_may_change
from roma_core.trainer.dataloader import MapStyle, TrainLoader
from roma_core.trainer.distributed import HostGroup, Interrupted, StopRequests, join
from roma_core.trainer.evaluator import Evaluator, no_such_metric
from roma_core.trainer.metrics import ThroughputMeter
from roma_core.trainer.run_logger import RunLogger
from roma_core.trainer.sampler import plan_for
from roma_core.trainer.saver import Saver
from roma_core.trainer.step import (
    DeferredScalars,
    Learner,
    NonFiniteLoss,
    labels_of,
    refuse,
    training_loss,
)


def check_wishes(
    config: TrainerConfig,
    model: RoMAForPreTraining | RoMAForClassification,
    test_dataset: MapStyle | None,
    has_callback: bool,
) -> None:
    """Refuse what this model or these data cannot give.

    Raises:
        ValueError: naming the setting.
    """
    if config.freeze_encoder and isinstance(model, RoMAForPreTraining):
        raise ValueError(
            "freeze_encoder trains a classifier's head alone; pretraining would learn nothing: "
            "unset ROMA_TRAINER_FREEZE_ENCODER"
        )
    needs_evaluation = {
        "early_stopping_patience": config.early_stopping_patience is not None,
        "final_weights=best": config.final_weights == "best",
    }
    if test_dataset is None or len(test_dataset) == 0:
        for name in (n for n, wished in needs_evaluation.items() if wished):
            raise ValueError(f"{name} needs a test_dataset with series to evaluate on")
    elif not has_callback:
        known = ["eval/loss"]
        if isinstance(model, RoMAForClassification):
            judged = model.config.problem_type == "classification"
            known += ["eval/accuracy"] if judged else []
        if config.best_metric not in known:
            raise ValueError(no_such_metric(config.best_metric, known))


def check_same_run(
    state: TrainState, config: TrainerConfig, n_samples: int, total_steps: int
) -> None:
    """Refuse to continue from a checkpoint of another run.

    Raises:
        ValueError: naming what differs, and what may.
    """
    now = config.model_dump(mode="json")
    changed = {
        name: (state.settings[name], value)
        for name, value in now.items()
        if name not in RESUMABLE and name in state.settings and state.settings[name] != value
    }
    facts = {
        "random_seed": (state.seed, config.random_seed),
        "size of the training set": (state.n_samples, n_samples),
        "total steps (epochs)": (state.total_steps, total_steps),
    }
    changed |= {name: pair for name, pair in facts.items() if pair[0] != pair[1]}
    if changed:
        raise ValueError(
            f"{config.checkpoint_dir} belongs to another run: {told(changed)}; set it back, or give "
            f"another checkpoint_dir. {what_may_change()}"
        )


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
    """Sets the parts up, and runs them."""

    def __init__(
        self,
        config: TrainerConfig,
        train_dataset: MapStyle,
        test_dataset: MapStyle | None,
        model: RoMAForPreTraining | RoMAForClassification,
        folder: Path | None,
        attempt: Attempt | None,
        what: str,
        stops: StopRequests,
        evaluate_callback: Callable[..., Any] | None,
    ) -> None:
        self.config, self.attempt, self.stops = config, attempt, stops
        self.accelerator = join(config)
        self.ranks = HostGroup(self.accelerator.process_index, self.accelerator.num_processes)
        self.folder = folder or config.checkpoint_dir.absolute()
        check_wishes(config, model, test_dataset, evaluate_callback is not None)
        loss = training_loss(model, config, train_dataset)

        checkpoint = load_newest(config.checkpoint_dir)
        state = checkpoint.state if checkpoint else None
        frozen = state.global_batch_size if state else None
        self.plan = plan_for(config, train_dataset, self.ranks.size, frozen)
        self.total_steps = config.epochs * self.plan.batches_per_epoch
        if state:
            check_same_run(state, config, len(train_dataset), self.total_steps)
        self.learner = Learner(
            self.accelerator, self.ranks, model, loss, config, self.total_steps, checkpoint
        )
        device = self.accelerator.device
        self.feed = TrainLoader(
            config, self.plan, train_dataset, model.config, self.ranks, device, stops
        )
        self.evaluator = Evaluator(
            config, self.learner, test_dataset, self.ranks, self._keeps_going, evaluate_callback
        )
        self.step = state.step if state else 0
        self.report = RunLogger(
            what,
            self.folder,
            config,
            total_steps=self.total_steps,
            batches_per_epoch=self.plan.batches_per_epoch,
            first_step=self.step,
            offset=state.metrics_offset if state else 0,
            speaks=self.ranks.is_main,
        )
        self.saver = Saver(config, self.learner, self.report, self.ranks)
        self.resumed_from = checkpoint.path.name if checkpoint else ""
        self.started, self.elapsed_before = time.monotonic(), state.elapsed_s if state else 0.0
        self.last_beat = float("-inf")
        self.unread, self.norm = DeferredScalars(), float("nan")
        self.window = (
            ThroughputMeter(state.window_steps, state.window_loss) if state else ThroughputMeter()
        )
        self.evaluated: dict[str, float] = dict(state.evaluation) if state else {}
        self.evaluated_at = self.step if self.evaluated else -1
        self.evaluation_due = state.evaluation_due if state else False
        self.course = (
            EarlyStopping(state.best, state.evaluations_since_best) if state else EarlyStopping()
        )

    def run(self) -> TrainingEnd:
        """Train to the end, or until a stop request."""
        with self.report, self.saver, self.feed, closing(self.learner):
            self.report.say(self._first_words())
            try:
                return self._loop()
            except Interrupted:
                return self._stopped()

    def _first_words(self) -> str:
        n = sum(p.numel() for p in self.learner.model.parameters())
        origin = f"resumed from {self.resumed_from} " if self.resumed_from else ""
        shared = " sharing them" if self.learner.is_sharded else ""
        return (
            f"{origin}{n:,} parameters, {self.plan.n_samples} series, global batch {self.plan.global_batch_size} {self.plan.unit}, "
            f"{self.total_steps} steps, {self.ranks.size} process(es){shared} on {self.accelerator.device}"
        )

    def _loop(self) -> TrainingEnd:
        batches = self.feed.steps(self.step)
        if self.evaluation_due:  # a stop request came before it ended
            self._evaluate_and_save()
        while self.step < self.total_steps and not self._is_out_of_patience():
            self._beat()
            self.saver.check()
            micro_batches = self._next_of(batches)
            tokens = sum(batch.segments.total for batch in micro_batches)
            count, n_tokens, stop = self.ranks.sum(
                [self.learner.count(micro_batches), tokens, self.stops.requested()]
            )
            if stop:
                raise Interrupted
            self._step(micro_batches, count)
            self.window.tokens += n_tokens
            if self.step % self.config.log_every == 0 or self.step == self.total_steps:
                self._log_training()
            self._evaluate_and_save()
        self.saver.wait()
        if not self.evaluated:  # a checkpoint of an older version does not tell
            self.evaluated = self.evaluator.measure(float("nan"))
        reason = ""
        if self.step < self.total_steps:
            reason = (
                f"early stopping: {self.course.evaluations_since} evaluations without a better "
                f"{self.config.best_metric} than {self.course.best}"
            )
            self.report.say(f"{reason}; ended at step {self.step}")
        if self.config.final_weights == "best":
            self._take_best()
        else:
            self.learner.finish()
        return self._end("completed", reason)

    def _stopped(self) -> TrainingEnd:
        self._save()
        self.saver.wait()
        reason = self.stops.reason or "another process was asked to stop"
        self.report.say(f"asked to stop ({reason}); saved at step {self.step}")
        return self._end("continue", reason)

    def _end(self, status: str, reason: str) -> TrainingEnd:
        return TrainingEnd(
            status=status,
            step=self.step,
            metrics=self.evaluated,
            reason=reason,
            elapsed_s=self._elapsed_s(),
            world_size=self.ranks.size,
            is_main_process=self.ranks.is_main,
        )

    def _take_best(self) -> None:
        metric, folder = self.config.best_metric, self.config.checkpoint_dir
        found = load_best(folder, metric, self.config.best_metric_mode)
        if found is None:
            raise ValueError(
                f"final_weights=best: no checkpoint in {folder} was evaluated with {metric}"
            )
        self.learner.model.load_state_dict(found.model if found.ema is None else found.ema)
        self.evaluated = found.state.evaluation
        self.report.say(f"weights of step {found.state.step}, the best, are kept")

    # --- one step ---------------------------------------------------------------------------

    def _next_of(self, batches: Iterator[list[PackedBatch]]) -> list[PackedBatch]:
        """The next step's micro-batches; none if a stop request ended the wait for them."""
        with self.window.waiting():
            try:
                return next(batches)
            except Interrupted:
                return []  # the others have theirs: let all agree to stop

    def _step(self, micro_batches: list[PackedBatch], count: float) -> None:
        try:
            loss, norm = self.learner.step(self.step, micro_batches, count)
        except NonFiniteLoss:
            refuse(self.folder, self.step, self.ranks.rank, micro_batches)
        self.unread.add(self.step, loss, norm)
        self.step += 1

    def _read_losses(self) -> None:
        """Read the numbers of the steps since the last time, in one wait for the device.

        Called before anything of these steps is recorded or saved: a step that was not finite is
        found here, at the latest, and nothing after it is kept.
        """
        read = self.unread.read()
        for step, loss, norm in read:
            if not self.learner.is_finite(loss, norm):
                batch = next(self.feed.steps(step))
                refuse(self.folder, step, self.ranks.rank, batch, loss, norm)
            self.norm = norm
        if read:
            for loss in self.ranks.sum([loss for _, loss, _ in read]):
                self.window.add(loss)

    # --- between steps ----------------------------------------------------------------------

    def _beat(self) -> None:
        if self.attempt is None or not self.ranks.is_main:
            return
        if time.monotonic() - self.last_beat >= self.config.heartbeat_interval_s:
            self.last_beat = time.monotonic()
            self.attempt.beat(self.step)

    def _keeps_going(self) -> bool:
        """Asked between the batches of an evaluation."""
        self._beat()
        return not self.stops.requested()

    def _is_out_of_patience(self) -> bool:
        return self.course.is_exhausted(self.config.early_stopping_patience)

    def _elapsed_s(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def _log_training(self) -> None:
        self._read_losses()
        window, self.window = self.window, ThroughputMeter()
        cost = {"train/lr": self.learner.lr, "train/grad_norm": self.norm}
        self.report.record_training(self.step, window.metrics() | cost)

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

    def _evaluate(self) -> None:
        measured = self.evaluator.measure(self.report.shown.get("train/loss", float("nan")))
        if not measured:
            return
        self.evaluated, self.evaluated_at = measured, self.step
        self.course = self.course.after(
            measured[self.config.best_metric],
            self.config.best_metric_mode,
            self.config.early_stopping_min_delta,
        )
        self.report.record(self.step, measured)
        self.report.show(self.step, force=True)

    def _save(self) -> None:
        self._read_losses()
        here = self.evaluated if self.evaluated_at == self.step else {}
        self.saver.save(
            TrainState(
                step=self.step,
                n_samples=self.plan.n_samples,
                global_batch_size=self.plan.global_batch_size,
                seed=self.config.random_seed,
                total_steps=self.total_steps,
                elapsed_s=self._elapsed_s(),
                world_size=self.ranks.size,
                first_world_size=self.learner.first_world_size,
                settings=self.config.model_dump(mode="json"),
                scaler=self.learner.scaler_state,
                window_steps=self.window.steps,
                window_loss=self.window.loss,
                evaluation={k: v for k, v in here.items() if math.isfinite(v)},
                evaluation_due=self.evaluation_due,
                best=self.course.best,
                evaluations_since_best=self.course.evaluations_since,
            )
        )


__all__ = ["NonFiniteLoss", "Trainer", "TrainingEnd"]


class Trainer:
    """Trains either model; resumes by itself from the newest checkpoint of ``checkpoint_dir``.

    Start the same script with ``python``, ``accelerate launch`` or ``torchrun``.
    """

    def __init__(self, config: TrainerConfig | type[TrainerConfig] | None = None) -> None:
        self.config = config() if isinstance(config, type) else config or TrainerConfig()
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
        model: RoMAForPreTraining | RoMAForClassification,
        *,
        folder: Path | None = None,
        attempt: Attempt | None = None,
        what: str = "train",
    ) -> TrainingEnd:
        """Train to the end, or until a stop request.

        Args:
            train_dataset, test_dataset: items as :class:`~roma_core.trainer.dataloader.MapStyle` says.
            model: moved to this process's device and trained in place.
            folder: of the run; ``metrics.jsonl`` goes there. ``checkpoint_dir`` by default.
            attempt: where to beat and to look for a stop file, if a launcher watches.
            what: name of the training in progress messages.

        Raises:
            NonFiniteLoss: with the ids of the samples.
            ValueError: data, checkpoint and configuration do not fit each other.
        """
        if len(train_dataset) == 0:
            raise ValueError("train_dataset is empty; there is nothing to train on")
        if isinstance(model, RoMAForClassification) and model.head is None:
            model.set_outputs(int(labels_of(train_dataset).max()) + 1)
        with StopRequests(attempt.stop if attempt else None) as stops:
            run = TrainingRun(
                self.config,
                train_dataset,
                test_dataset,
                model,
                folder,
                attempt,
                what,
                stops,
                self._evaluate_callback,
            )
            end = run.run()
        if end.status == "completed" and self._post_train_hook and run.accelerator.is_main_process:
            self._post_train_hook(model, run.folder, run.accelerator.device)
        return end
