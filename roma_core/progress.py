"""Progress of a job: a bar on a terminal, lines in a log, messages to Dagster."""

from __future__ import annotations

import os
import sys
import time
from contextlib import ExitStack
from typing import Any, TextIO

from tqdm import tqdm

_LINE_INTERVAL_S = 5.0
_MESSAGE_INTERVAL_S = 1.0


class Progress:
    """A bar on a terminal, lines in a log, messages to Dagster. Use it as a context manager.

    ``shown``: a bar and nothing else, wherever it runs; or nothing at all.
    """

    def __init__(
        self,
        what: str,
        total_steps: int = 0,
        first_step: int = 0,
        unit: str = "step",
        log: TextIO | None = None,
        shown: bool | None = None,
    ) -> None:
        self.what, self.total_steps, self.first_step = what, total_steps, first_step
        self.unit, self._log, self._shown = unit, log or sys.stdout, shown
        self._stack = ExitStack()
        self._pipes: Any = None
        self._start = time.monotonic()
        self._last_line = self._last_message = float("-inf")
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if "DAGSTER_PIPES_CONTEXT" in os.environ:
            import dagster_pipes

            self._pipes = self._stack.enter_context(dagster_pipes.open_dagster_pipes())
        if self._shown is not None or sys.stderr.isatty():
            bar: Any = {"initial": self.first_step, "unit": f" {self.unit}"}
            self._bar = self._stack.enter_context(
                tqdm(desc=self.what, disable=self._shown is False, **bar)
            )
        return self

    def __exit__(self, *exception: object) -> None:
        # a stopped attempt must not report "closed" with its exception: the next one continues the run
        self._stack.close()

    def begin(self, total_steps: int, first_step: int) -> None:
        """Steps begin now; for work whose number of steps is known only then, 0 if not even then."""
        self.total_steps, self.first_step, self._start = total_steps, first_step, time.monotonic()

    def say(self, text: str) -> None:
        """Print one line, and send it to Dagster's log."""
        if self._shown is None:
            tqdm.write(f"{self.what}: {text}", file=self._log)
            self._log.flush()
        if self._pipes is not None:
            self._pipes.log.info(f"{self.what}: {text}")

    def eta_s(self, step: int) -> float:
        """Seconds left at the speed so far; infinite before the first step."""
        speed = (step - self.first_step) / max(time.monotonic() - self._start, 1e-9)
        return (self.total_steps - step) / speed if speed and self.total_steps else float("inf")

    def update(self, step: int, metrics: dict[str, float], *, force: bool = False) -> None:
        """Show a finished step and the newest ``metrics``; without ``force`` at most every second."""
        now = time.monotonic()
        eta_s = self.eta_s(step)
        metrics = {name: value for name, value in metrics.items() if name != "train/eta_s"}
        if self._bar is not None:
            self._bar.total = self.total_steps or None
            self._bar.update(step - self._bar.n)
            few = {k: v for k, v in metrics.items() if self.unit != "step" or "loss" in k}
            self._bar.set_postfix({k: format_number(v) for k, v in few.items()})
        elif force or now - self._last_line >= _LINE_INTERVAL_S:
            self._last_line = now
            shown = "  ".join(f"{k} {format_number(v)}" for k, v in metrics.items())
            place = f"{self.unit} {step}/{self.total_steps or '?'}"
            line = f"{self.what}: {place}  {shown}  ETA {eta_s:.0f} s"
            print(line, file=self._log, flush=True)
        if self._pipes is not None and (force or now - self._last_message >= _MESSAGE_INTERVAL_S):
            self._last_message = now
            position = {"step": step, "total_steps": self.total_steps, "eta_s": round(eta_s, 1)}
            self._pipes.report_custom_message(
                {"kind": "progress", "what": self.what} | position | metrics
            )


def format_number(number: float) -> str:
    """Four digits, but thousands in full: 12,120 and not 1.212e+04."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e12 else f"{number:.4g}"
