"""Where the metrics and messages of a run go: ``metrics.jsonl``, trackers, terminal and Dagster."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.metrics import MetricsLog
from roma_core.trainer.trackers import Trackers

_LINE_INTERVAL_S = 5.0
_MESSAGE_INTERVAL_S = 1.0


class Progress:
    """A bar on a terminal, lines in a log, messages to Dagster. Use it as a context manager."""

    def __init__(self, what: str, total_steps: int, first_step: int) -> None:
        self.what, self.total_steps, self.first_step = what, total_steps, first_step
        self._stack = ExitStack()
        self._pipes: Any = None
        self._start = time.monotonic()
        self._last_line = self._last_message = float("-inf")
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            import dagster_pipes

            self._pipes = self._stack.enter_context(dagster_pipes.open_dagster_pipes())
        if sys.stderr.isatty():
            self._bar = self._stack.enter_context(
                tqdm(total=self.total_steps, initial=self.first_step, desc=self.what, unit="step")
            )
        return self

    def __exit__(self, *exception: object) -> None:
        # a stopped attempt must not report "closed" with its exception: the next one continues the run
        self._stack.close()

    def say(self, text: str) -> None:
        """Print one line, and send it to Dagster's log."""
        tqdm.write(f"{self.what}: {text}", file=sys.stdout)
        sys.stdout.flush()
        if self._pipes is not None:
            self._pipes.log.info(f"{self.what}: {text}")

    def eta_s(self, step: int) -> float:
        """Seconds left at the speed so far; infinite before the first step."""
        speed = (step - self.first_step) / max(time.monotonic() - self._start, 1e-9)
        return (self.total_steps - step) / speed if speed else float("inf")

    def update(self, step: int, metrics: dict[str, float], *, force: bool = False) -> None:
        """Show a finished step and the newest ``metrics``; without ``force`` at most every second."""
        now = time.monotonic()
        eta_s = self.eta_s(step)
        metrics = {name: value for name, value in metrics.items() if name != "train/eta_s"}
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if "loss" in k})
        elif force or now - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = now
            shown = "  ".join(f"{k} {format_number(v)}" for k, v in metrics.items())
            print(
                f"{self.what}: step {step}/{self.total_steps}  {shown}  ETA {eta_s:.0f} s",
                flush=True,
            )
        if self._pipes is not None and (force or now - self._last_message >= _MESSAGE_INTERVAL_S):
            self._last_message = now
            position = {"step": step, "total_steps": self.total_steps, "eta_s": round(eta_s, 1)}
            self._pipes.report_custom_message(
                {"kind": "progress", "what": self.what} | position | metrics
            )


def format_number(number: float) -> str:
    """Four digits, but thousands in full: 12,120 and not 1.212e+04."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e12 else f"{number:.4g}"


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
