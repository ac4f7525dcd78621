"""Ends loader processes that do not answer; a stop request must not wait for a file system."""

from __future__ import annotations

import multiprocessing
import signal
from types import FrameType
from typing import Any


class LoaderProcesses:
    """The loader processes of a run, seen from the process that may have to end them."""

    def __init__(self) -> None:
        self._handler: Any = None

    def kill(self) -> None:
        """End them at once. They ignore SIGTERM, and the loader itself waits 5 s for each."""
        # the loader's handler would raise, in the middle of a save, that a process died
        self._handler = signal.signal(signal.SIGCHLD, _no_news)
        for child in multiprocessing.active_children():
            if child.daemon:
                child.kill()
                child.join()

    def forget(self) -> None:
        """Give the loader's handler back, when the loader is gone."""
        if self._handler is not None:
            signal.signal(signal.SIGCHLD, self._handler)
            self._handler = None


def _no_news(number: int, frame: FrameType | None) -> None:
    pass
