"""Where the metrics of a run go: ``metrics.jsonl``, trackers, and the progress that is shown."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from roma_core.progress import Progress
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.metrics import MetricsLog
from roma_core.trainer.trackers import Trackers


class RunLogger:
    """Logs the metrics of one run; a context manager.

    Every process has one; only the main process's logs, and has ``metrics_log`` and ``trackers``.
    """

    def __init__(
        self,
        progress: Progress,
        folder: Path,
        config: TrainerConfig,
        *,
        batches_per_epoch: int,
        offset: int,
        is_main: bool,
    ) -> None:
        """``offset`` bytes of ``metrics.jsonl`` in ``folder`` belong to the steps finished so far."""
        self._progress, self.folder, self.config = progress, folder, config
        self.batches_per_epoch, self.first_offset, self.is_main = batches_per_epoch, offset, is_main
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self._stack = ExitStack()

    def __enter__(self) -> RunLogger:
        if not self.is_main:
            return self
        with ExitStack() as stack:
            self.metrics_log = MetricsLog(self.folder / "metrics.jsonl", self.first_offset)
            stack.callback(self.metrics_log.close)
            self.trackers = Trackers.from_environment(self.folder, self.config)
            stack.callback(self.trackers.close)
            stack.enter_context(self._progress)
            self.trackers.start(self.first_offset)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """Print one line."""
        if self.is_main:
            self._progress.say(text)

    def log_training(self, step: int, metrics: dict[str, float]) -> None:
        """Log training metrics, with epoch and remaining time."""
        position = {
            "train/epoch": step / self.batches_per_epoch,
            "train/eta_s": self._progress.eta_s(step),
        }
        self.log(step, metrics | position, show=step == self._progress.total_steps)

    def log(self, step: int, metrics: dict[str, float], *, show: bool = True) -> None:
        """Log metrics; without ``show`` the terminal has them at most every few seconds."""
        if self.is_main:
            self.latest |= metrics
            self.metrics_log.append(step, step / self.batches_per_epoch, metrics)
            self._progress.update(step, self.latest, force=show)
