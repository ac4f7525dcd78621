"""SLURM's commands: run them, share one poll among all processes, read squeue's answer."""

from __future__ import annotations

import json
import os
import re
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

_ANSWER = "roma: answer"
_NOT_PASSED_ON = ("CUDA_VISIBLE_DEVICES", "TMPDIR", "XDG_")  # a node has its own, or none

_OWN = re.compile(  # SLURM's own error lines, without paths; others are notices of a site
    r"^(?:(?:sbatch|scontrol)\S*: (?:error|fatal)|slurm_\w+(?: error)?|allocation failure): "
    r"(?!.*accounting/QOS policy)(.*?)(?: /.*)?$",  # that of a policy follows one with its name
    re.MULTILINE,
)
_PASSING = re.compile(
    # slurmctld is away, restarts or gives way to its backup
    r"timed? ?out|unable to (contact|connect)|connection (refused|reset)|communication|zero bytes|"
    r"not responding|unexpected message|standby|message (send|receive) failure|shutting down|"
    # a service that it needs does not answer: the data base, munge, its disk
    r"database|without the db|munge|authentication|i/o error|"
    # it takes no job now: its own limits, those of the user or the account, a closed partition
    r"temporarily|try again|retry|rate limit|queue full|(max|grp)sub(mit)?jobs?|"
    r"partition not available",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    code: int
    output: str
    error: str

    @property
    def text(self) -> str:
        return " ".join(f"{self.error} {self.output}".split())

    @property
    def passes(self) -> bool:
        """Whether the same request may be answered otherwise a while later; the last line decides."""
        return any(_PASSING.search(line) for line in _OWN.findall(self.error)[-1:])


class Shell:
    """Runs SLURM's commands, on this computer or through ssh on one connection that is kept."""

    def __init__(self, ssh: str | None = None, timeout_s: float = 60.0) -> None:
        """``ssh``: host, as ssh names it; SLURM's own commands give up after some ten seconds."""
        self.ssh, self.timeout_s = ssh, timeout_s

    def run(self, *argv: str, environment: Mapping[str, str] | None = None) -> Answer:
        """Run a command to its end, with these variables besides those every job inherits.

        Raises:
            Unreachable: it took too long, or ssh could not connect; it may have been carried out.
            ValueError: there is no such command.
        """
        given = environment or {}
        command, stdin = list(argv), ""
        env: dict[str, str] | None = {
            **{k: v for k, v in inherited().items() if not k.startswith(_NOT_PASSED_ON)},
            **{k: v for k, v in os.environ.items() if k.startswith("SLURM_CONF")},
            **given,
        }
        if self.ssh is not None:  # variables travel on standard input, where ps does not show them
            exports = [f"export {name}={shlex.quote(value)}" for name, value in given.items()]
            sockets = Path(os.environ.get("XDG_RUNTIME_DIR", Path.home() / ".ssh"))
            command = [
                *("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
                *("-o", "ControlMaster=auto", "-o", "ControlPersist=10m"),
                *("-o", f"ControlPath={sockets}/roma-%C", self.ssh, "bash", "-s"),
            ]
            answer = f"echo {_ANSWER}; echo {_ANSWER} >&2; exec {shlex.join(argv)}"
            env, stdin = None, "\n".join([*exports, answer, ""])
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout_s,
                env=env,
                input=stdin,
            )
        except subprocess.TimeoutExpired as late:
            raise Unreachable(f"{argv[0]} did not answer within {self.timeout_s:g} s") from late
        except FileNotFoundError as missing:
            raise ValueError(
                f"there is no command {command[0]!r} on this computer; run on a login node of the "
                f"cluster, or name one as `ssh` in its profile"
            ) from missing
        if self.ssh is not None and done.returncode in (127, 255):
            text = f"ssh {self.ssh}: {' '.join(done.stderr.split())}"
            raise Unreachable(text) if done.returncode == 255 else ValueError(text)
        # what stands before is a banner, or the output of a login script
        output, error = (text.rpartition(f"{_ANSWER}\n")[2] for text in (done.stdout, done.stderr))
        return Answer(done.returncode, output, error)


# -- one poll for all jobs of all supervising processes ----------------------------------------

Jobs = dict[str, dict[str, str]]  # job id -> its fields
Positions = dict[str, tuple[int, int]]  # id of a waiting job -> its position, queue length


@dataclass(frozen=True)
class PollResult:
    """An answer of squeue, or why there is none; times are seconds since the epoch."""

    asked_at: float  # before the query
    interval_s: float  # how long it is new enough
    jobs: Jobs
    error: str = ""  # why there is no answer; jobs is then the last one received
    positions: Positions = field(default_factory=dict)
    positions_at: float = 0.0


class SharedPoll:
    """The last answer, in a file; asked for again when it is too old."""

    def __init__(
        self,
        folder: Path,
        ask: Callable[[PollResult], tuple[Jobs, Positions | None]],
        fastest_s: float,
        slowest_s: float,
    ) -> None:
        """``ask`` gets the last answer; it returns all jobs of this user and the queue positions of
        those that wait, None if it did not ask for them, and raises Unreachable.
        """
        self.folder, self.path, self.ask = folder, folder / "poll.json", ask
        self.fastest_s, self.slowest_s = fastest_s, max(fastest_s, slowest_s)

    def look(self, newer_than: float = 0.0) -> PollResult:
        """An answer that is new enough; one asked after ``newer_than`` if there may be one already."""
        result = self._read()
        if not self._due(result, newer_than):
            return result
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / "poll.lock", timeout=0):
                result = self._read()  # another process may have asked meanwhile
                return self._ask(result) if self._due(result, newer_than) else result
        except Timeout:
            return result

    def _due(self, result: PollResult, newer_than: float) -> bool:
        interval_s = self.fastest_s if result.asked_at < newer_than else result.interval_s
        # also due if the clock was set back
        return not result.asked_at <= time.time() < result.asked_at + interval_s

    def _ask(self, before: PollResult) -> PollResult:
        asked_at = time.time()
        try:
            (jobs, positions), error = self.ask(before), ""
        except Unreachable as away:
            jobs, positions, error = before.jobs, None, str(away)
        interval_s = self.fastest_s
        if not error and jobs == before.jobs:
            interval_s = min(max(before.interval_s, self.fastest_s) * 1.5, self.slowest_s)
        positions_at = asked_at
        if positions is None:
            positions, positions_at = before.positions, before.positions_at
        result = PollResult(asked_at, interval_s, jobs, error, positions, positions_at)
        aside = self.path.with_name(".poll.json")  # not synced: may be lost
        aside.write_text(json.dumps({"schema_version": 1, **vars(result)}))
        aside.replace(self.path)
        return result

    def _read(self) -> PollResult:
        try:
            document: dict[str, Any] = json.loads(self.path.read_text())
            if document.pop("schema_version") != 1:
                raise ValueError("another version")
            document["positions"] = {k: tuple(v) for k, v in document["positions"].items()}
            return PollResult(**document)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return PollResult(0.0, 0.0, {}, "not asked yet")  # lost or of another version


# -- squeue's answer -------------------------------------------------------------------------

_COLUMNS = ("state", "starts", "nodes", "reason", "partition", "user", "priority")
MARK = "roma|"
"""Begins our lines in an answer; others are notices of a site's wrappers."""
SQUEUE = ("squeue", "-h", "-t", "all", "-o", f"{MARK}%i|%T|%S|%N|%r|%P|%u|%Q|%Z|%j")
"""The query; with ``--me`` for one's own jobs. Folder and name come last: they may hold a bar."""

_NOT_IN_QUEUE = frozenset(  # reasons of pending jobs that no free node would start
    ["Dependency", "DependencyNeverSatisfied", "JobHeldUser", "JobHeldAdmin", "BeginTime"]
)


def marked(output: str, n: int) -> list[list[str]]:
    """The fields of each of our lines; Unreachable if one has fewer than n: it was cut short."""
    rows = [line.partition(MARK)[2].split("|") for line in output.splitlines() if MARK in line]
    if short := [row for row in rows if len(row) < n]:
        raise Unreachable(f"expected {n} fields, got {'|'.join(short[0])!r}")
    return rows


def parse_squeue(output: str) -> Jobs:
    """The jobs of an answer to SQUEUE; raises Unreachable if it is cut short."""
    found, n = {}, len(_COLUMNS)
    for job, *fields in marked(output, n + 3):
        columns = dict(zip(_COLUMNS, fields, strict=False))
        found[job] = {**columns, "folder": "|".join(fields[n:-1]), "name": fields[-1]}
    return found


def own_jobs(rows: Jobs) -> Jobs:
    """Jobs of this project, without the priority, which changes all the time."""
    return {
        job: {column: value for column, value in row.items() if column != "priority"}
        for job, row in rows.items()
        if row["name"].startswith("roma-")
    }


def queue_positions(rows: Jobs, wanted: Iterable[str]) -> Positions:
    """(position, queue length) of the wanted jobs, among those that wait for the same partitions.

    Jobs queue by priority; those that are held, or wait for a time or another job, do not count.
    """
    pending = [
        (job, set(row["partition"].split(",")))
        for job, row in sorted(rows.items(), key=lambda item: -int(item[1]["priority"]))
        if row["state"] == "PENDING" and row["reason"] not in _NOT_IN_QUEUE
    ]
    positions = {}
    for job in wanted:
        ours = set(rows[job]["partition"].split(","))
        queue = [other for other, theirs in pending if theirs & ours]
        if job in queue:
            positions[job] = (queue.index(job) + 1, len(queue))
    return positions


def waiting(job: str, row: Mapping[str, str], position: tuple[int, int] | None) -> JobState:
    """State of a waiting job: reason, queue position, expected start, as far as SLURM says."""
    text = f"job {job} waits: {row['reason']}"
    queue: dict[str, Any] = {}
    if position is not None:
        queue |= {"queue_position": position[0], "queue_length": position[1]}
        text += f", {position[0]} of {position[1]} in the queue"
    if row["starts"] not in ("", "N/A"):
        queue["expected_start"] = row["starts"]
        text += f", expected to start {row['starts']}"
    return JobState(Phase.WAITING, text, queue=queue)


def minutes(text: str) -> float:
    """``1-02:30:00`` or ``30:00``, as SLURM writes durations, in minutes; others are infinite."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        return float("inf")
    days, hours, whole, seconds = (int(part or 0) for part in found.groups())
    return (days * 24 + hours) * 60 + whole + seconds / 60
