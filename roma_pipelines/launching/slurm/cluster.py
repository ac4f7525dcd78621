"""What ``squeue`` says: its lines, and where in the line a job stands.

Runs a scheduler's commands, on this computer or through ssh on one connection that is kept.
One question to a scheduler for all jobs of all supervising processes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from roma_pipelines.launching.launcher import Unreachable, inherited
from roma_pipelines.launching.spec import JobState, Phase

_KEPT_FOR = "10m"
_OF_THIS_COMPUTER = ("CUDA_VISIBLE_DEVICES", "TMPDIR", "XDG_")  # a node has its own, or none


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    output: str
    error: str

    @property
    def text(self) -> str:
        """Both outputs as one line for people."""
        return " ".join(f"{self.error} {self.output}".split())


class Shell:
    """Where a scheduler's commands run."""

    def __init__(self, ssh: str | None = None, timeout_s: float = 60.0) -> None:
        """
        Args:
            ssh: host, as ssh knows it; None: this computer.
            timeout_s: how long a command may take; SLURM's own give up after some ten seconds.
        """
        self.ssh, self.timeout_s = ssh, timeout_s

    def run(self, *argv: str, environment: Mapping[str, str] | None = None) -> Answer:
        """Run a command to its end.

        Args:
            environment: variables of the command beside those every job inherits.

        Raises:
            NoAnswer: it took too long, or ssh did not get there; it may have been carried out.
            ValueError: there is no such command here.
        """
        try:
            if self.ssh is None:
                return self._here(argv, {**_ours(), **(environment or {})})
            return self._there(argv, environment or {})
        except subprocess.TimeoutExpired as error:
            raise Unreachable(f"{argv[0]} gave no answer within {self.timeout_s:g} s") from error

    def _here(self, argv: tuple[str, ...], environment: Mapping[str, str]) -> Answer:
        try:
            done = subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"there is no command {argv[0]!r} on this computer; run on a login node of the "
                f"cluster, or name one as `ssh` in its profile"
            ) from error
        return Answer(done.returncode, done.stdout, done.stderr)

    def _there(self, argv: tuple[str, ...], environment: Mapping[str, str]) -> Answer:
        lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
        script = "\n".join([*lines, f"exec {shlex.join(argv)}", ""])
        sockets = Path(os.environ.get("XDG_RUNTIME_DIR", Path.home() / ".ssh"))
        done = subprocess.run(
            [
                *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
                *("-o", "ControlMaster=auto", "-o", f"ControlPersist={_KEPT_FOR}"),
                *("-o", f"ControlPath={sockets}/roma-%C", self.ssh or "", "bash", "-s"),
            ],
            input=script,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=self.timeout_s,
        )
        if done.returncode == 255:  # ssh's own
            raise Unreachable(f"ssh {self.ssh}: {' '.join(done.stderr.split())}")
        if done.returncode == 127:
            raise ValueError(f"ssh {self.ssh}: {' '.join(done.stderr.split())}")
        return Answer(done.returncode, done.stdout, done.stderr)


def _ours() -> dict[str, str]:
    """This process's environment as SLURM's commands and the job may see it."""
    kept = {k: v for k, v in os.environ.items() if k.startswith("SLURM_CONF")}
    variables = {k: v for k, v in inherited().items() if not k.startswith(_OF_THIS_COMPUTER)}
    return variables | kept


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
        except Unreachable as away:
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


_COLUMNS = ("state", "starts", "nodes", "reason", "partition", "user", "priority")
SQUEUE = ("squeue", "-h", "-t", "all", "-o", "%i|%T|%S|%N|%r|%P|%u|%Q|%Z|%j")
"""The question; with ``--me`` about one's own jobs. Folder and name come last: they may hold a bar."""

_NOT_IN_LINE = frozenset(  # reasons of jobs that no free node would start
    ["Dependency", "DependencyNeverSatisfied", "JobHeldUser", "JobHeldAdmin", "BeginTime"]
)


def rows_of(output: str) -> Jobs:
    """squeue's lines by job id."""
    found = {}
    for line in output.splitlines():
        job, *values, rest = line.split("|", 8)
        folder, _, name = rest.rpartition("|")
        found[job] = {**dict(zip(_COLUMNS, values, strict=True)), "folder": folder, "name": name}
    return found


def ours_of(rows: Jobs) -> Jobs:
    """Those this project submitted, without what changes all the time and so would look like news."""
    return {
        job: {column: value for column, value in row.items() if column != "priority"}
        for job, row in rows.items()
        if row["name"].startswith("roma-")
    }


def places_in_queue(rows: Jobs, wanted: Iterable[str]) -> Places:
    """(place, of how many) of the wanted jobs that wait, among those that wait for the same nodes.

    Jobs stand in line by priority; those that are held, or wait for a time or another job, do not.
    """
    waiting = [
        (job, frozenset(row["partition"].split(",")))
        for job, row in sorted(rows.items(), key=lambda item: -int(item[1]["priority"]))
        if row["state"] == "PENDING" and row["reason"] not in _NOT_IN_LINE
    ]
    lines: dict[str, dict[str, int]] = {}  # place by job, of all that share a partition of these
    places = {}
    for job in wanted:
        named = rows[job]["partition"]
        if named not in lines:
            ours = frozenset(named.split(","))
            line = [other for other, theirs in waiting if theirs & ours]
            lines[named] = {other: place for place, other in enumerate(line, start=1)}
        if job in lines[named]:
            places[job] = (lines[named][job], len(lines[named]))
    return places


def waiting(job: str, row: Mapping[str, str], place: tuple[int, int] | None) -> JobState:
    """Why a job waits, behind how many, and until when, as far as SLURM says."""
    said = f"job {job} waits: {row['reason']}"
    queue: dict[str, Any] = {}
    if place is not None:
        queue |= {"queue_position": place[0], "queue_length": place[1]}
        said += f", {place[0]} of {place[1]} in the queue"
    if row["starts"] not in ("", "N/A"):
        queue["expected_start"] = row["starts"]
        said += f", expected to start {row['starts']}"
    return JobState(Phase.WAITING, said, queue=queue)
