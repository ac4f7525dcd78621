"""Time limits of tests, scaled by ``ROMA_TEST_TIME_SCALE`` so that a busy computer fails no test.

A limit says how long an idle computer needs at most; ``within`` multiplies it, by 5 unless the
variable says otherwise. Only failures wait that long: a test that passes ends as soon as it can.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

SCALE = float(os.environ.get("ROMA_TEST_TIME_SCALE", "5"))


def within(seconds: float) -> float:
    """``seconds`` of an idle computer, as a limit (in seconds) for this one."""
    return seconds * SCALE


def wait_until(condition: Callable[[], object], seconds: float, what: str = "condition") -> None:
    """Poll until ``condition()`` is true.

    Raises:
        AssertionError: it was still false after ``within(seconds)``.
    """
    end = time.monotonic() + within(seconds)
    while not condition():
        assert time.monotonic() < end, f"{what} was not met within {within(seconds):.0f} s"
        time.sleep(0.02)
