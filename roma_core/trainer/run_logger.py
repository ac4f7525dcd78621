"""What a run tells: ``metrics.jsonl``, the trackers that follow it, and people.

Every process has a :class:`Report`, so that the loop need not ask which one it is; only the main
process's says anything.

Telling people how far a run is: a bar on a terminal, lines in a log, messages to Dagster.
"""

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
from roma_core.trainer.trackers import Followers

_LINE_EVERY_S = 5.0
_MESSAGE_EVERY_S = 1.0


class Progress:
    """Progress of one run; use it as a context manager."""

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
        # a stopped or failed attempt must not report "closed" with its exception: the next one goes on
        self._stack.close()

    def say(self, text: str) -> None:
        """One line for people, in the log and in Dagster's."""
        tqdm.write(f"{self.what}: {text}", file=sys.stdout)
        sys.stdout.flush()
        if self._pipes is not None:
            self._pipes.log.info(f"{self.what}: {text}")

    def eta_s(self, step: int) -> float:
        """Seconds that are left, if it goes on as so far; infinite before the first step."""
        speed = (step - self.first_step) / max(time.monotonic() - self._start, 1e-9)
        return (self.total_steps - step) / speed if speed else float("inf")

    def update(self, step: int, metrics: dict[str, float], *, force: bool = False) -> None:
        """Show a finished step; ``metrics`` are the newest ones, by name."""
        now = time.monotonic()
        eta_s = self.eta_s(step)
        metrics = {name: value for name, value in metrics.items() if name != "train/eta_s"}
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items() if "loss" in k})
        elif force or now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            shown = "  ".join(f"{k} {as_people_read(v)}" for k, v in metrics.items())
            print(
                f"{self.what}: step {step}/{self.total_steps}  {shown}  ETA {eta_s:.0f} s",
                flush=True,
            )
        if self._pipes is not None and (force or now - self._last_message >= _MESSAGE_EVERY_S):
            self._last_message = now
            self._pipes.report_custom_message(
                {
                    "kind": "progress",
                    "what": self.what,
                    "step": step,
                    "total_steps": self.total_steps,
                    "eta_s": round(eta_s, 1),
                    **{name: float(value) for name, value in metrics.items()},
                }
            )


def as_people_read(number: float) -> str:
    """Four digits, but thousands whole: 12,120 and not 1.212e+04."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e12 else f"{number:.4g}"


class RunLogger:
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

    def __enter__(self) -> RunLogger:
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
