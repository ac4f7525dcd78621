"""Values of launching: a job's specification, the plan of an attempt, handles, states, outcomes.

A *job* is one folder (``roma_core.job``). It consists of *attempts*; an attempt ends completed,
continue (the next attempt resumes from its checkpoint), failed or cancelled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from roma_core.files import write_bytes
from roma_core.job import Attempt, JobFolder, Result
from roma_core.settings import Frozen


class JobSize(Frozen):
    """Processes of a job, and the resources of each attempt."""

    nodes: int = Field(1, gt=0, description="Nodes; the local target runs all processes on one.")
    processes_per_node: int = Field(1, gt=0, description="Training processes per node.")
    threads_per_process: int | None = Field(None, gt=0)
    """CPU threads per process; null: the cores of this computer shared by its processes, at most 8
    each, or OMP_NUM_THREADS; 1 on a cluster."""
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node; 0 trains on CPUs.")
    memory_gb: float | None = Field(None, gt=0, description="Per node; null: profile's default.")
    time_limit_min: int | None = Field(None, gt=0)
    """Minutes of one attempt; the job resumes in a new one. null: the profile's default."""

    @property
    def world_size(self) -> int:
        """Number of processes, as ``result.json`` must report it."""
        return self.nodes * self.processes_per_node


class JobSpec(JobSize):
    """What to run and the resources it needs; ``spec.json``.

    Holds no secrets and no values of environment variables.
    """

    schema_version: Literal[1] = 1
    key: str = Field(pattern=r"^[0-9a-f]{12,64}$", description="From job_key().")
    threads_per_process: int = Field(1, gt=0, description="CPU threads per process.")
    command: tuple[str, ...] = Field(min_length=1)
    """After `python`: a script or `-m module`, and arguments."""
    config_digest: str = Field(description="files.digest_of() of the resolved configuration.")
    runner: Literal["torchrun", "plain"] = "torchrun"
    """What starts the processes; plain: one process, no rendezvous."""
    env_names: tuple[str, ...] = Field((), description="Variables passed to it, secrets included.")

    def attempt_name(self, attempt: int) -> str:
        """Name of an attempt at a scheduler, whatever process submits it."""
        return f"roma-{self.key[:12]}-{attempt}"


@dataclass(frozen=True)
class Plan:
    """One attempt exactly as it is submitted, made without a clock, a file or a cluster."""

    spec: JobSpec
    folder: JobFolder
    attempt: int
    text: str  # a command line, a batch script or manifests
    content: Any = None  # arguments, manifests: the backend's form, where it is not the text

    @property
    def name(self) -> str:
        return self.spec.attempt_name(self.attempt)

    @property
    def files(self) -> Attempt:
        return self.folder.attempt(self.attempt)

    def write_script(self) -> Path:
        """Write the text to the attempt's folder."""
        script = self.files.script
        script.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(script, self.text.encode())
        return script


@dataclass(frozen=True)
class JobHandle:
    """A submitted attempt; ``external`` is the backend's own id and finds it after a restart."""

    plan: Plan
    external: dict[str, Any]


def id_of(external: Mapping[str, Any] | None) -> str:
    """A backend's id as text: ``job_id 7, profile leonardo``; empty without one."""
    return ", ".join(
        f"{name} {value}" for name, value in (external or {}).items() if name != "start"
    )


class Phase(StrEnum):
    """State of an attempt; each backend maps its own states to these in one table."""

    WAITING = "waiting"  # queued
    RUNNING = "running"
    ENDED_OK = "ended ok"  # the processes, or the scheduler, report success
    ENDED_BAD = "ended bad"  # a non-zero exit code, or a crash
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"  # killed, preempted, node lost, out of time: not the job's fault
    GONE = "gone"  # ended, and its exit state is no longer known
    OUT_OF_MEMORY = "out of memory"  # the next attempt would end the same way
    HUNG = "hung"  # cancelled by the supervisor because its heartbeat stopped
    UNKNOWN = "unknown"  # no answer or an unknown state: poll again; never taken for an end


@dataclass(frozen=True)
class JobState:
    """A phase and its reason as text: queue reason, exit code, signal."""

    phase: Phase
    reason: str = ""
    usage: Mapping[str, Any] = field(default_factory=dict)  # at the end: ran_s, nodes (names)
    # while it waits: queue_position, queue_length, expected_start
    queue: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.phase not in (Phase.WAITING, Phase.RUNNING, Phase.UNKNOWN)

    def __str__(self) -> str:
        return f"{self.phase} ({self.reason})" if self.reason else str(self.phase)


Status = Literal["completed", "continue", "failed", "cancelled"]


class End(Frozen):
    """How an attempt ended, after the outcome policy was applied."""

    status: Status
    reason: str
    checkpoint: int | None  # step of the newest checkpoint at that time
    ended_at: float  # seconds since the epoch
    ran_s: float | None = None  # without the time in the queue, where the target reports it
    nodes: str | None = None  # their names, as the target writes them


class AttemptRecord(Frozen):
    """``attempts/<n>.json``: the intent; then the external id; then the end."""

    schema_version: Literal[1] = 1
    attempt: int
    backend: str
    intended_at: float  # seconds since the epoch, as all times here
    external: dict[str, Any] | None = None
    submitted_at: float | None = None
    end: End | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended; ``result`` is not None exactly if it is completed."""

    status: Literal["completed", "failed", "cancelled"]
    key: str
    folder: str
    attempts: tuple[AttemptRecord, ...]
    result: Result | None
    reason: str
    log_tail: str = ""

    def metadata(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"job_key": self.key, "job_folder": self.folder}
        facts["attempts"] = len(self.attempts)
        if self.result is not None:
            facts["processes"] = str(self.result.world_size)  # a number would be drawn as a plot
        return facts


class JobFailed(RuntimeError):
    """The job ended without a result; the message has the reason and the end of the log."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        text = f"job {outcome.key} {outcome.status} in attempt {len(outcome.attempts)}"
        text += f": {outcome.reason}\nits folder: {outcome.folder}"
        end = f"\nend of its log:\n{outcome.log_tail}" if outcome.log_tail else ""
        super().__init__(text + end)


def job_key(asset_key: str, root: str) -> str:
    """Key of the job that materialises ``asset_key`` for the run ``root``: 20 hex digits."""
    return hashlib.sha256(f"{asset_key}\n{root}".encode()).hexdigest()[:20]


def root_of(
    run_id: str,
    tags: Mapping[str, str],
    tags_of: Callable[[str], Mapping[str, str] | None] = lambda run_id: None,
) -> str:
    """The Dagster run whose job this run adopts: itself, or the run that it retries, recursively.

    So *Re-execute all* makes a new job, and a later retry of *that* run finds the new job and not
    the oldest one of the family. ``tags_of`` returns the tags of another run, None if it was
    deleted; the tag ``dagster/root_run_id`` is used then.
    """
    from_failure = ("dagster/is_resume_retry", "dagster/is_asset_resume_retry")
    while (
        tags.get("dagster/retry_number", "").isdigit()  # by the daemon, whatever its strategy
        or any(tags.get(name) == "true" for name in from_failure)
    ):
        parent = tags.get("dagster/parent_run_id")
        parent_tags = tags_of(parent) if parent else None
        if parent is None or parent_tags is None:
            return tags.get("dagster/root_run_id", run_id)
        run_id, tags = parent, parent_tags
    return run_id
