"""What a run tells: ``metrics.jsonl``, the trackers that follow it, and people.

Every process has a :class:`Report`, so that the loop need not ask which one it is; only the main
process's says anything.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.followers import Followers
from roma_core.trainer.metrics_log import MetricsLog
from roma_core.trainer.progress import Progress


class Report:
    """The voice of one run; use it as a context manager.

    Attributes:
        shown: the newest value of every metric.
    """

    def __init__(
        self,
        what: str,
        folder: Path,
        config: TrainerConfig,
        *,
        total_steps: int,
        batches_per_epoch: int,
        first_step: int,
        offset: int,
        speaks: bool,
    ) -> None:
        """
        Args:
            what: name of the training.
            folder: of the run.
            first_step: finished steps at the start.
            offset: bytes of ``metrics.jsonl`` that belong to them.
            speaks: whether this is the main process.
        """
        self.what, self.folder, self.config, self.offset = what, folder, config, offset
        self.total_steps, self.first_step = total_steps, first_step
        self.batches_per_epoch, self.speaks = batches_per_epoch, speaks
        self.shown: dict[str, float] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Report:
        if not self.speaks:
            return self
        with ExitStack() as stack:
            self.log = MetricsLog(self.folder / "metrics.jsonl", self.offset)
            stack.callback(self.log.close)
            self.followers = Followers.of_environment(self.folder, self.config)
            stack.callback(self.followers.close)
            self.progress = Progress(self.what, self.total_steps, self.first_step)
            stack.enter_context(self.progress)
            self.followers.start(self.offset)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """One line for people."""
        if self.speaks:
            self.progress.say(text)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of a step."""
        if self.speaks:
            self.shown |= metrics
            self.log.append(step, step / self.batches_per_epoch, metrics)

    def record_training(self, step: int, metrics: dict[str, float]) -> None:
        """Append what training cost and gave, with where it is and how long it has to go."""
        if self.speaks:
            place = {
                "train/epoch": step / self.batches_per_epoch,
                "train/eta_s": self.progress.eta_s(step),
            }
            self.record(step, metrics | place)
            self.show(step, force=step == self.total_steps)

    def show(self, step: int, *, force: bool) -> None:
        """Let people see how far the run is; without ``force`` only now and then."""
        if self.speaks:
            self.progress.update(step, self.shown, force=force)
