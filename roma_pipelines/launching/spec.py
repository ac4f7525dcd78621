"""What launching talks about: a job's specification, handle, state, attempts and outcome.

Values only. A *job* runs on some computer or cluster and is one folder (``roma_core.job``); it is
made of *attempts*, and an attempt ends completed, continue, failed or cancelled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from roma_core.job import Result


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobSpec(_Document):
    """What to run and what it needs; ``spec.json``. Holds no secret and no value of the environment."""

    schema_version: Literal[1] = 1
    key: str = Field(pattern=r"^[0-9a-f]{12,64}$", description="From job_key().")
    command: tuple[str, ...] = Field(
        min_length=1,
        description="What every process runs, after `python`: a script or `-m module`, arguments.",
    )
    config_digest: str = Field(description="files.digest_of() of the resolved configuration.")
    starter: Literal["torchrun", "plain"] = Field(
        "torchrun", description="What starts the processes; plain: one process, no rendezvous."
    )
    nodes: int = Field(1, gt=0, description="Computers.")
    processes_per_node: int = Field(1, gt=0, description="Training processes on each.")
    threads_per_process: int = Field(1, gt=0, description="CPU threads of each process.")
    gpus_per_node: int = Field(0, ge=0, description="GPUs on each computer; 0 hides those there.")
    memory_gb: float | None = Field(None, gt=0, description="Memory per node, GB; None: no limit.")
    time_limit_min: int | None = Field(
        None, gt=0, description="Time of one attempt, minutes; None: the target's own limit."
    )
    env_names: tuple[str, ...] = Field(
        (), description="Names of environment variables handed on to the job, secrets included."
    )

    @property
    def name(self) -> str:
        """Name of the job at a scheduler, without the attempt's number."""
        return f"roma-{self.key[:12]}"

    @property
    def world_size(self) -> int:
        """Processes in all, as ``result.json`` must report them."""
        return self.nodes * self.processes_per_node


class Phase(StrEnum):
    """Where an attempt stands; each backend maps what it sees to one of these in one table."""

    WAITING = "waiting"  # queued
    RUNNING = "running"
    ENDED_OK = "ended ok"  # the processes, or the scheduler, report success
    ENDED_BAD = "ended bad"  # a non-zero exit code, or a crash
    CANCELLED = "cancelled"  # ended on somebody's demand
    INTERRUPTED = (
        "interrupted"  # killed, preempted, node lost, out of time: not the job's own doing
    )
    GONE = "gone"  # ended, and nobody can say any more how
    OUT_OF_MEMORY = "out of memory"  # killed for it: the next attempt would end the same way
    HUNG = "hung"  # ended by the supervisor, because the heartbeat stopped
    UNKNOWN = "unknown"  # no answer, or a word nobody knows: ask again; never taken for an end


_NOT_ENDED = frozenset({Phase.WAITING, Phase.RUNNING, Phase.UNKNOWN})


@dataclass(frozen=True)
class JobState:
    """A phase, and why, in words for people: queue reason, exit code, signal.

    An end may carry ``usage``: ``ran_s``, seconds it ran, and ``nodes``, where. A wait may carry
    ``queue``: ``queue_position``, ``queue_length`` and ``expected_start``.
    """

    phase: Phase
    reason: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)
    queue: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.phase not in _NOT_ENDED

    def __str__(self) -> str:
        return f"{self.phase} ({self.reason})" if self.reason else str(self.phase)


@dataclass(frozen=True)
class JobHandle:
    """Enough to find one attempt again after a restart; ``external`` is the backend's own."""

    folder: str  # path of the job folder
    attempt: int
    backend: str
    external: dict[str, Any]


def id_of(external: Mapping[str, Any] | None) -> str:
    """What people need of a backend's own id: ``job_id 7, site leonardo``; empty without one."""
    return ", ".join(
        f"{name} {value}" for name, value in (external or {}).items() if name != "start"
    )


class End(_Document):
    """How an attempt ended, as judged."""

    how: Literal["completed", "continue", "failed", "cancelled"]
    reason: str
    checkpoint: int | None  # step of the newest checkpoint at that time
    ended_at: float  # seconds since the epoch
    ran_s: float | None = None  # without the time in the queue, where the target tells
    nodes: str | None = None  # their names, as the target writes them


class AttemptRecord(_Document):
    """``attempts/<n>.json``: the intent; then what it became; then its end."""

    schema_version: Literal[1] = 1
    attempt: int
    backend: str
    intended_at: float  # seconds since the epoch, as all times here
    external: dict[str, Any] | None = None
    submitted_at: float | None = None
    end: End | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a job; ``result`` is there exactly if it is completed."""

    status: Literal["completed", "failed", "cancelled"]
    key: str
    folder: str
    attempts: tuple[AttemptRecord, ...]
    result: Result | None
    reason: str
    log_tail: str = ""

    def metadata(self) -> dict[str, Any]:
        """Plain values worth showing on the asset."""
        facts: dict[str, Any] = {"job_key": self.key, "job_folder": self.folder}
        facts["attempts"] = len(self.attempts)
        if self.result is not None:
            facts["processes"] = str(self.result.world_size)  # a number would be drawn as a plot
            ends = ("_low", "_high")  # of intervals: too many rows for a page
            facts |= {k: v for k, v in self.result.metrics.items() if not k.endswith(ends)}
        return facts


class JobFailed(RuntimeError):
    """The job ended without a result; the message has the reason and the end of the log."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        lines = [
            f"job {outcome.key} {outcome.status} in attempt {len(outcome.attempts)}: {outcome.reason}",
            f"its folder: {outcome.folder}",
        ]
        if outcome.log_tail:
            lines += ["end of its log:", outcome.log_tail]
        super().__init__("\n".join(lines))


def job_key(asset_key: str, root: str) -> str:
    """Name of the job that makes ``asset_key`` for the run ``root``: 20 hex digits."""
    return hashlib.sha256(f"{asset_key}\n{root}".encode()).hexdigest()[:20]


_RETRY_MARKS = {  # tags Dagster puts on a run that goes on with what another left
    "dagster/is_resume_retry": lambda value: value == "true",  # re-executed from failure
    "dagster/is_asset_resume_retry": lambda value: value == "true",
    "dagster/retry_number": lambda value: value.isdigit(),  # by the daemon, whatever the strategy
}


def root_of(
    run_id: str,
    tags: Mapping[str, str],
    tags_of: Callable[[str], Mapping[str, str] | None] = lambda run_id: None,
) -> str:
    """The Dagster run whose job this run is to find.

    Itself, unless it retries another one; then that one's, and so on. So *Re-execute all* makes a
    new job, and a later retry of *that* run finds the new job and not the oldest of the family.

    Args:
        tags: the run's tags.
        tags_of: tags of another run by its id, None if it is gone; without an answer the family's
            root (tag ``dagster/root_run_id``) stands in.
    """
    while any(name in tags and is_set(tags[name]) for name, is_set in _RETRY_MARKS.items()):
        parent = tags.get("dagster/parent_run_id")
        parent_tags = tags_of(parent) if parent else None
        if parent is None or parent_tags is None:
            return tags.get("dagster/root_run_id", run_id)
        run_id, tags = parent, parent_tags
    return run_id
