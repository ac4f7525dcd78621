"""Writes checkpoints beside the training: the loop goes on while the disk works."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one write at a time, in order; a failed one is raised at the next call.

    The caller hands over copies: nothing a write reads may change any more.
    """

    def __init__(self, in_background: bool) -> None:
        """With ``in_background`` False a write is done when :meth:`write` returns."""
        self.in_background = in_background
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def write(self, action: Callable[[], None]) -> None:
        """Begin a write, after the one before it ended."""
        self.wait()
        self._pending = self._thread.submit(action)
        if not self.in_background:
            self.wait()

    def check(self) -> None:
        """Raise what a finished write raised; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
            Exception: what the write raised.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the write that has begun end; for the case that something else has failed already."""
        self._thread.shutdown(wait=True)
