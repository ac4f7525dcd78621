"""All jobs under one root, as their folders tell; and how to end one from outside.

What a job used: computers, time, money, and how much of it went into the training.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Launcher, Price
from roma_pipelines.launching.outcome import newest_checkpoint, read_records
from roma_pipelines.launching.spec import AttemptRecord, JobSpec, Outcome
from roma_pipelines.launching.supervisor import (
    WATCHER_SILENT_S,
    Supervisor,
    is_watched,
    request_cancel,
)


def usage(outcome: Outcome, spec: JobSpec, price: Price | None) -> dict[str, Any]:
    """Plain values worth showing on the asset of a completed job.

    ``ran_s`` and ``queued_s`` are sums over all attempts; ``lost_s`` is what attempts ran without
    adding to the training: starting up, and steps behind the last checkpoint before an interruption.
    """
    ran_s = sum(map(_ran_s, outcome.attempts))
    facts: dict[str, Any] = {"ran_s": round(ran_s, 1)}
    facts["queued_s"] = round(sum(map(_queued_s, outcome.attempts)), 1)
    ends = [record.end for record in outcome.attempts if record.end]
    if nodes := sorted({end.nodes for end in ends if end.nodes}):
        facts["nodes"] = ", ".join(nodes)
    if spec.gpus_per_node:
        gpu_hours = ran_s / 3600 * spec.nodes * spec.gpus_per_node
        facts["gpu_hours"] = round(gpu_hours, 4)
        if price is not None:
            facts["cost"] = f"{gpu_hours * price.per_gpu_hour:.2f} {price.currency}"
    trained_s = outcome.result.facts.get("training_s") if outcome.result else None
    if isinstance(trained_s, int | float) and ran_s > 0:
        facts["lost_s"] = round(max(0.0, ran_s - trained_s), 1)
        facts["efficiency"] = round(min(1.0, trained_s / ran_s), 3)
    return facts


def _ran_s(record: AttemptRecord) -> float:
    if record.end is None:
        return 0.0
    if record.end.ran_s is not None:
        return record.end.ran_s
    return record.end.ended_at - (record.submitted_at or record.intended_at)  # nothing queues here


def _queued_s(record: AttemptRecord) -> float:
    if record.end is None or record.end.ran_s is None or record.submitted_at is None:
        return 0.0
    return max(0.0, record.end.ended_at - record.submitted_at - record.end.ran_s)


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One job, at the moment it was looked at.

    Attributes:
        watcher: content of ``watcher.json``; empty if nobody ever watched.
        watched: whether that watcher is alive.
        made_at: when its specification was written, seconds since the epoch.
    """

    folder: JobFolder
    spec: JobSpec
    records: tuple[AttemptRecord, ...]
    watcher: dict[str, Any]
    watched: bool
    made_at: float

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def asset(self) -> str:
        """What it makes: the asset's key, or the module."""
        return str(self.watcher.get("asset_key", "?"))

    @property
    def open_attempt(self) -> AttemptRecord | None:
        """The attempt that has no end yet."""
        return self.records[-1] if self.records and self.records[-1].end is None else None

    @property
    def is_to_go_on(self) -> bool:
        """Whether an attempt is not over, or another one is to follow: now, or once it is retried."""
        if not self.records:
            return self.watched
        end = self.records[-1].end
        return end is None or end.how == "continue"

    @property
    def status(self) -> str:
        """``completed``, ``failed``, ``cancelled``, ``continue``, ``running``, ``queued`` or ``new``."""
        if not self.records:
            return "new"
        last = self.records[-1]
        if last.end is not None:
            return last.end.how
        return "running" if self.folder.attempt(last.attempt).owner.exists() else "queued"

    @property
    def checkpoint(self) -> int | None:
        return newest_checkpoint(self.folder)


def read_job(path: Path) -> Job | None:
    """The job in this folder; None if there is none, or not yet.

    Raises:
        ValueError: a file of it cannot be understood.
        OSError: a file of it cannot be read, or the folder is being removed.
    """
    folder = JobFolder(path)
    if not folder.spec.exists():
        return None
    made_at = folder.spec.stat().st_mtime
    spec = JobSpec.model_validate(read_json(folder.spec, schema_version=1))
    watcher = read_json(folder.watcher, schema_version=1) if folder.watcher.exists() else {}
    attempts = tuple(read_records(folder))
    return Job(folder, spec, attempts, watcher, is_watched(watcher), made_at)


def all_jobs(root: Path) -> list[Job]:
    """All jobs under ``root``, the newest first; a warning names each that cannot be read."""
    jobs = [job for path in _folders(root) if (job := _readable_job(path))]
    return sorted(jobs, key=lambda job: job.made_at, reverse=True)


def _folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _readable_job(path: Path) -> Job | None:
    """One broken job must not hide all others, and one may be removed at any moment."""
    try:
        return read_job(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path.exists():
            what = " ".join(str(error).split())
            log.warning(
                "job folder %s cannot be read and is left out (%s); repair or remove it", path, what
            )
        return None


def find_job(root: Path, key: str) -> Job:
    """The job whose key begins so; no other job's files are read.

    Raises:
        ValueError: there is none, or several, or it cannot be read.
    """
    found = [path for path in _folders(root) if path.name.startswith(key)]
    found = [path for path in found if JobFolder(path).spec.exists()]
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"exactly one job of {root} should begin with {key!r}; there is {there}")
    try:
        job = read_job(found[0])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the job in {found[0]} cannot be read ({error}); repair or remove that folder"
        ) from error
    if job is None:
        raise ValueError(f"the job in {found[0]} was removed a moment ago")
    return job


def cancel(
    job: Job,
    by: str,
    launcher_of: Callable[[AttemptRecord], Launcher],
    wait_s: float = 120.0,
) -> str:
    """End a job whoever watches it; returns how it ended.

    A living watcher is asked, and makes no further attempt either; without one, this process takes
    the watch over and does it itself.

    Raises:
        RuntimeError: it is not over after ``wait_s``.
        NoAnswer: nobody watches it, and its target is away.
    """
    if not job.is_to_go_on:
        return job.status
    request_cancel(job.folder, by)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        now = read_job(job.folder.path)
        assert now is not None, "its spec is never removed"
        if not now.is_to_go_on:
            now.folder.cancel.unlink(missing_ok=True)  # it ended by itself at the same moment
            return now.status
        if not now.watched:
            config = read_json(job.folder.config)
            watcher = {k: v for k, v in job.watcher.items() if k in ("asset_key", "dagster_run_id")}
            launcher = launcher_of(now.records[-1])
            return Supervisor(launcher, job.folder, job.spec, config, watcher=watcher).run().status
        time.sleep(0.2)
    raise RuntimeError(f"job {job.key} is not over {wait_s:g} s after its watcher was asked")


def removable(jobs: list[Job], older_than_s: float) -> list[Job]:
    """Jobs that made nothing and ended so long ago: failed and cancelled ones.

    What a completed job made is what assets and models refer to; it stays. So does what a living
    watcher may still read or begin again; one silent for long is done with it.
    """
    now = time.time()

    def came_to_nothing(job: Job) -> bool:
        end = job.records[-1].end if job.records else None
        if end is None or end.how not in ("failed", "cancelled"):
            return False
        if job.watched and now - float(job.watcher["beat"]) < WATCHER_SILENT_S:
            return False
        return now - end.ended_at > older_than_s

    return [job for job in jobs if came_to_nothing(job)]


def remove(job: Job) -> None:
    """Remove the folder of a job."""
    shutil.rmtree(job.folder.path)
