"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate_factor(schedule: str, step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak rate in step ``step`` (0 is the first): linear warm-up, then the schedule.

    The first step already moves: the factor rises from 1/w to 1 over the w warm-up steps. ``cosine``
    and ``linear`` then fall to 0 one step after the last.
    """
    warmup_steps = min(warmup_steps, total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown lr_schedule {schedule!r}; there are cosine, linear and constant")
