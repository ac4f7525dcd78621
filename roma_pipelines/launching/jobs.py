"""All jobs under one root, as their folders tell; and how to end one from outside."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_core.attempt import is_running
from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.launching.job import AttemptRecord, JobSpec
from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.supervisor import Supervisor, newest_checkpoint, request_cancel

WATCHER_SILENT_S = 60.0
"""A watcher on another computer that has not said for so long that it is alive is dead."""


@dataclass(frozen=True)
class Job:
    """One job, at the moment it was looked at.

    Attributes:
        watcher: content of ``watcher.json``; empty if nobody ever watched.
        watched: whether that watcher is alive.
    """

    folder: JobFolder
    spec: JobSpec
    records: tuple[AttemptRecord, ...]
    watcher: dict[str, Any]
    watched: bool

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


def is_watched(watcher: dict[str, Any]) -> bool:
    """Whether the process that wrote ``watcher.json`` still lives."""
    if not watcher:
        return False
    if watcher.get("host", socket.gethostname()) == socket.gethostname():
        return is_running(watcher["pid"], watcher["start"])
    return time.time() - float(watcher["beat"]) < WATCHER_SILENT_S


def read_job(path: Path) -> Job | None:
    """The job in this folder; None if there is none, or not yet."""
    folder = JobFolder(path)
    if not folder.spec.exists():
        return None
    spec = JobSpec.model_validate(read_json(folder.spec, schema_version=1))
    watcher = read_json(folder.watcher, schema_version=1) if folder.watcher.exists() else {}
    numbers = folder.attempt_numbers()
    records = [read_json(folder.attempt_record(n), schema_version=1) for n in numbers]
    attempts = tuple(AttemptRecord.model_validate(record) for record in records)
    return Job(folder, spec, attempts, watcher, is_watched(watcher))


def all_jobs(root: Path) -> list[Job]:
    """All jobs under ``root``, the newest first."""
    paths = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    jobs = [job for path in paths if (job := read_job(path))]
    return sorted(jobs, key=lambda job: job.folder.spec.stat().st_mtime, reverse=True)


def find_job(root: Path, key: str) -> Job:
    """The job whose key begins so.

    Raises:
        ValueError: there is none, or several.
    """
    found = [job for job in all_jobs(root) if job.key.startswith(key)]
    if len(found) != 1:
        there = ", ".join(job.key for job in found) or "none"
        raise ValueError(f"exactly one job of {root} should begin with {key!r}; there is {there}")
    return found[0]


def cancel(
    job: Job,
    by: str,
    launcher_of: Callable[[AttemptRecord], Launcher],
    wait_s: float = 120.0,
) -> str:
    """End a job whoever watches it; returns how it ended.

    A living watcher is asked; without one, this process takes the watch over and does it itself.

    Raises:
        RuntimeError: it is not over after ``wait_s``.
        NoAnswer: nobody watches it, and its target is away.
    """
    attempt = job.open_attempt
    if attempt is None:
        return job.status
    request_cancel(job.folder, by)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        now = read_job(job.folder.path)
        assert now is not None, "its spec is never removed"
        if now.open_attempt is None:
            return now.status
        if not now.watched:
            config = read_json(job.folder.config)
            watcher = {k: v for k, v in job.watcher.items() if k in ("asset_key", "dagster_run_id")}
            return (
                Supervisor(launcher_of(attempt), job.folder, job.spec, config, watcher=watcher)
                .run()
                .status
            )
        time.sleep(0.2)
    raise RuntimeError(f"job {job.key} is not over {wait_s:g} s after its watcher was asked")


def removable(jobs: list[Job], older_than_s: float) -> list[Job]:
    """Jobs that made nothing and ended so long ago: failed and cancelled ones.

    What a completed job made is what assets and models refer to; it stays.
    """
    now = time.time()

    def came_to_nothing(job: Job) -> bool:
        end = job.records[-1].end if job.records else None
        if end is None or end.how not in ("failed", "cancelled"):
            return False
        return now - end.ended_at > older_than_s

    return [job for job in jobs if came_to_nothing(job)]


def remove(job: Job) -> None:
    """Remove the folder of a job."""
    shutil.rmtree(job.folder.path)
