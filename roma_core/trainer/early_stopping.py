"""Which evaluation was the best, and when to stop waiting for a better one. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Course:
    """How the watched metric went so far.

    Attributes:
        best: its best value; None before the first evaluation.
        evaluations_since: evaluations since then that brought no better one.
    """

    best: float | None = None
    evaluations_since: int = 0

    def after(self, value: float, mode: Mode, min_delta: float = 0.0) -> Course:
        """The course with one more evaluation; a value that is not finite never is the best."""
        if is_better(value, self.best, mode, min_delta):
            return Course(value, 0)
        return Course(self.best, self.evaluations_since + 1)

    def is_exhausted(self, patience: int | None) -> bool:
        """True when ``patience`` evaluations in a row brought nothing better; None never ends."""
        return patience is not None and self.evaluations_since >= patience


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """True if ``value`` beats ``best`` by more than ``min_delta``; anything finite beats None."""
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def kept_steps(
    steps: dict[int, float | None], newest: int | None, best: int, mode: Mode
) -> set[int]:
    """The checkpoints to keep.

    Args:
        steps: step of every checkpoint, with the watched metric measured there, or None.
        newest: how many of the newest to keep; None keeps all.
        best: how many of the best to keep besides; of equal ones the older.
        mode: whether a small or a large metric is good.
    """
    if newest is None:
        return set(steps)
    sign = 1 if mode == "min" else -1
    scored = [(sign * v, step) for step, v in steps.items() if v is not None and math.isfinite(v)]
    return set(sorted(steps)[-newest:]) | {step for _, step in sorted(scored)[:best]}
