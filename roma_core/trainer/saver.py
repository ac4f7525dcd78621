"""Saves a run: copies what a checkpoint holds at once, and writes it beside the training.

Writes checkpoints beside the training: the loop goes on while the disk works.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from roma_core.model.weights import config_document
from roma_core.trainer.checkpoint import Content, Retention, TrainState, save_checkpoint
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.distributed import HostGroup
from roma_core.trainer.run_logger import RunLogger
from roma_core.trainer.step import Learner


class AsyncWriter:
    """Runs one write at a time, in order; a failed one is raised at the next call.

    The caller hands over copies: nothing a write reads may change any more.
    """

    def __init__(self, in_background: bool) -> None:
        """With ``in_background`` False a write is done when :meth:`write` returns."""
        self.in_background = in_background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(self, action: Callable[[], None]) -> None:
        """Begin a write, after the one before it ended."""
        self.wait()
        self._pending = self._thread.submit(action)
        if not self.in_background:
            self.wait()

    def check(self) -> None:
        """Raise what a finished write raised; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
            Exception: what the write raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the write that has begun end; for the case that something else has failed already."""
        self._thread.shutdown(wait=True)


class Saver:
    """Commits checkpoints of one run; use it as a context manager."""

    def __init__(
        self, config: TrainerConfig, learner: Learner, report: RunLogger, ranks: HostGroup
    ) -> None:
        self.folder, self.learner, self.report, self.ranks = (
            config.checkpoint_dir,
            learner,
            report,
            ranks,
        )
        self.retention = Retention(
            config.max_checkpoints, config.keep_best, config.best_metric, config.best_metric_mode
        )
        self._writer = AsyncWriter(config.background_checkpoints)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def save(self, state: TrainState) -> None:
        """Begin to write a checkpoint. Called by every process; rank 0 writes.

        The records of the run up to now belong to it, and trackers hear of them once it is committed.

        Raises:
            OSError: the one before could not be written.
        """
        tensors = self.learner.tensors()
        if not self.ranks.is_main:
            return
        log, followers = self.report.log, self.report.followers
        content = Content(
            state.model_copy(update={"metrics_offset": log.offset}),
            tensors.model,
            config_document(self.learner.model),
            tensors.optimizer,
            tensors.ema,
        )

        def write() -> None:
            log.sync()
            save_checkpoint(self.folder, content, self.retention)
            followers.committed(content.state.metrics_offset)

        self._writer.write(write)

    def check(self) -> None:
        """Raise what a write that has ended raised; never waits."""
        self._writer.check()

    def wait(self) -> None:
        """Every process waits until the last checkpoint is committed."""
        self._writer.wait()
        self.ranks.wait()
