"""Stop requests: a signal or a stop file asks the run to save and end with "continue"."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_S = 0.5


class Interrupted(Exception):
    """A stop request was seen in the middle of something that can be done again later."""


class StopRequests:
    """Notes requests of this process; ranks agree on them where they reduce the loss count.

    As a context manager it takes over SIGTERM, SIGINT and SIGUSR1, in the main thread only. A
    second SIGINT interrupts at once. One inside another takes over what the outer one noted, so a
    program can begin to listen before it imports what training needs.
    """

    _innermost: StopRequests | None = None

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.reason = ""
        self._previous: dict[int, object] = {}
        self._outer: StopRequests | None = None
        self._last_poll = float("-inf")

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
            self._outer, StopRequests._innermost = StopRequests._innermost, self
            if self._outer is not None:
                self.reason = self._outer.reason
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous:
            StopRequests._innermost = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == name:
            raise KeyboardInterrupt
        self.reason = name

    def requested(self) -> bool:
        """True once somebody asked; looks for the stop file at most twice a second."""
        if not self.reason and self.stop_file is not None:
            now = time.monotonic()
            if now - self._last_poll >= _POLL_S:
                self._last_poll = now
                if self.stop_file.exists():
                    self.reason = "stop file"
        return bool(self.reason)
