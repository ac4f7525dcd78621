"""One question to a scheduler for all jobs of all supervising processes.

``poll.json`` holds the last answer. Whoever finds it too old takes the lock and asks; the others go
on with what is there. Nothing changed: the next question comes later, up to the slowest interval.
Places in the queue change all the time and are no news in that sense; they are part of a question
now and then, as whoever asks sees fit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from roma_pipelines.launching.launcher import NoAnswer

_SLOWER = 1.5
_SEEN_FOR_S = 0.1  # one look at the file serves all jobs of a process that are watched in turn


Jobs = dict[str, dict[str, str]]
Places = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Poll:
    """An answer, or why there was none.

    Attributes:
        asked_at: seconds since the epoch, before the question was asked.
        interval_s: how long it is new enough.
        jobs: what the scheduler said of each job, by its id.
        error: why there is no answer; ``jobs`` is then the last one there was.
        places: (place, of how many) of jobs that wait, by their id.
        placed_at: when these were asked for, seconds since the epoch.
    """

    asked_at: float
    interval_s: float
    jobs: Jobs
    error: str = ""
    places: Places = field(default_factory=dict)
    placed_at: float = 0.0


NEVER = Poll(0.0, 0.0, {}, "nobody asked yet")


class SharedPoll:
    """The last answer, asked for again when it is too old."""

    def __init__(
        self,
        folder: Path,
        ask: Callable[[Poll], tuple[Jobs, Places | None]],
        fastest_s: float,
        slowest_s: float,
    ) -> None:
        """
        Args:
            folder: of this scheduler, the same for all processes that share the question.
            ask: is given the last answer; all jobs of this user, by id, and places of those that
                wait, None if it did not ask for them; raises NoAnswer if the scheduler is away.
        """
        self.folder, self.ask = folder, ask
        self.fastest_s, self.slowest_s = fastest_s, max(fastest_s, slowest_s)
        self._read_from: tuple[int, int] | None = None
        self._last = NEVER
        self._looked_at = float("-inf")

    @property
    def path(self) -> Path:
        return self.folder / "poll.json"

    def look(self, newer_than: float = 0.0) -> Poll:
        """An answer that is new enough; one asked after ``newer_than`` if there may be one already."""
        poll = self._read()
        if not self._due(poll, newer_than):
            return poll
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "poll.lock", timeout=0):
                poll = self._read(anew=True)  # another one may have asked meanwhile
                return self._ask(poll) if self._due(poll, newer_than) else poll
        except Timeout:
            return poll

    def _due(self, poll: Poll, newer_than: float) -> bool:
        interval_s = self.fastest_s if poll.asked_at < newer_than else poll.interval_s
        return not poll.asked_at <= time.time() < poll.asked_at + interval_s  # clocks are set, too

    def _ask(self, before: Poll) -> Poll:
        asked_at = time.time()
        try:
            (jobs, places), error = self.ask(before), ""
        except NoAnswer as away:
            jobs, places, error = before.jobs, None, str(away)
        if error or jobs != before.jobs:
            interval_s = self.fastest_s
        else:
            interval_s = min(max(before.interval_s, self.fastest_s) * _SLOWER, self.slowest_s)
        placed = (before.places, before.placed_at) if places is None else (places, asked_at)
        poll = Poll(asked_at, interval_s, jobs, error, *placed)
        document = {"schema_version": 1, **vars(poll)}
        aside = self.path.with_name(".poll.json")
        aside.write_text(json.dumps(document))  # not synced: losing it costs one question
        aside.replace(self.path)
        self._looked_at = float("-inf")
        return poll

    def _read(self, anew: bool = False) -> Poll:
        now = time.monotonic()
        if not anew and now - self._looked_at < _SEEN_FOR_S:
            return self._last
        self._looked_at = now
        self._last = self._read_file()
        return self._last

    def _read_file(self) -> Poll:
        try:
            status = self.path.stat()
            mark = (status.st_ino, status.st_mtime_ns)
            if mark != self._read_from:
                document: dict[str, Any] = json.loads(self.path.read_text())
                if document.pop("schema_version") != 1:
                    return NEVER
                self._read_from = mark
                document["places"] = {k: tuple(v) for k, v in document["places"].items()}
                return Poll(**document)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return NEVER  # lost or of another version: ask anew
        return self._last
