"""All jobs under one root, by their folders: list, find, cancel, and the resources they used."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import ClusterProfile, Launcher, Unreachable
from roma_pipelines.launching.outcome import newest_checkpoint, read_records
from roma_pipelines.launching.spec import AttemptRecord, JobSpec, Outcome
from roma_pipelines.launching.supervisor import Supervisor, is_held, request_cancel

log = logging.getLogger(__name__)
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Job:
    """One job, as it was when its folder was read."""

    folder: JobFolder
    spec: JobSpec
    records: tuple[AttemptRecord, ...]
    lease: dict[str, Any]  # content of lease.json; empty if no process ever supervised it
    supervised: bool  # whether the process that holds the lease is alive
    made_at: float  # when its specification was written, seconds since the epoch

    @property
    def key(self) -> str:
        return self.spec.key

    @property
    def asset(self) -> str:
        """The asset that it materialises, or the module that it runs."""
        return str(self.lease.get("asset_key", "?"))

    @property
    def open_attempt(self) -> AttemptRecord | None:
        return self.records[-1] if self.records and self.records[-1].end is None else None

    @property
    def is_unfinished(self) -> bool:
        """Whether an attempt has not ended, or another is to follow, at once or by a retry."""
        if not self.records:
            return self.supervised
        end = self.records[-1].end
        return end is None or end.status == "continue"

    @property
    def status(self) -> str:
        """``completed``, ``failed``, ``cancelled``, ``continue``, ``running``, ``queued`` or ``new``."""
        if not self.records:
            return "new"
        last = self.records[-1]
        if last.end is not None:
            return last.end.status
        return "running" if self.folder.attempt(last.attempt).owner.exists() else "queued"

    @property
    def checkpoint(self) -> int | None:
        return newest_checkpoint(self.folder)


def read_job(path: Path) -> Job | None:
    """The job in this folder, None if there is none; ValueError or OSError if it cannot be read."""
    folder = JobFolder(path)
    if not folder.spec.exists():
        return None
    made_at = folder.spec.stat().st_mtime
    spec = JobSpec.model_validate(read_json(folder.spec, schema_version=1))
    lease = read_json(folder.lease, schema_version=1) if folder.lease.exists() else {}
    records = tuple(read_records(folder))
    return Job(folder, spec, records, lease, is_held(lease), made_at)


def all_jobs(root: Path, settled: SettledJobs | None = None) -> list[Job]:
    """All jobs under ``root``, the newest first; a warning names each that cannot be read.

    With ``settled`` only those that are not, and those without an open attempt are settled.
    """
    jobs = []
    for path in (settled or SettledJobs()).others(root):
        try:
            job = read_job(path)
            if settled is not None and (job is None or job.open_attempt is None):
                settled.add(path)
            jobs.append(job)
        except _UNREADABLE as error:
            if path.exists():  # else it was removed a moment ago
                why = " ".join(str(error).split())
                log.warning(
                    "job folder %s cannot be read and is left out (%s); repair or remove it",
                    path,
                    why,
                )
    return sorted(filter(None, jobs), key=lambda job: job.made_at, reverse=True)


class SettledJobs:
    """Job folders that need not be read again before a file in them is replaced.

    So a sensor's tick costs one call of the file system for each past job, and no reading. Whoever
    changes something in ``attempts`` has just written ``lease.json``.
    """

    def __init__(self) -> None:
        self._stamps: dict[str, int] = {}  # times of the settled ones
        self._now: dict[str, int] = {}  # of all, at the last look

    def others(self, root: Path) -> list[Path]:
        """All folders under ``root`` but the settled ones."""
        self._now = {}
        for entry in os.scandir(root) if root.is_dir() else ():
            with contextlib.suppress(OSError):  # removed meanwhile
                self._now[entry.path] = entry.stat().st_mtime_ns
        self._stamps = {k: stamp for k, stamp in self._stamps.items() if self._now.get(k) == stamp}
        return [Path(path) for path in sorted(self._now.keys() - self._stamps.keys())]

    def add(self, path: Path) -> None:
        """Settle a folder of the last look, unless it changed in the last minute."""
        stamp = self._now.get(str(path))
        if stamp is not None and time.time() - stamp / 1e9 > 60:
            self._stamps[str(path)] = stamp


def find_job(root: Path, key: str) -> Job:
    """The one job whose key begins so, or ValueError; other jobs' files are not read."""
    found = [spec.parent for spec in root.glob(f"{glob.escape(key)}*/spec.json")]
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"exactly one job of {root} should begin with {key!r}, there is {there}; "
            f"`roma-pipeline jobs list --all` lists them"
        )
    try:
        if job := read_job(found[0]):
            return job
    except _UNREADABLE as error:
        raise ValueError(
            f"the job in {found[0]} cannot be read ({error}); repair or remove that folder"
        ) from error
    raise ValueError(f"the job in {found[0]} was removed a moment ago")


def cancel(
    job: Job,
    by: str,
    launcher_of_attempt: Callable[[AttemptRecord], Launcher],
    wait_s: float = 120.0,
) -> str:
    """Cancel a job, supervised or not; returns its final status.

    A living supervisor is asked to, and makes no further attempt; without one, this process takes
    the lease and does it itself. Several jobs may be cancelled at the same time, by threads.

    Raises:
        RuntimeError: it has not ended after ``wait_s``.
        Unreachable: it is not supervised, and its target does not answer for ``wait_s``. The
            request stays in the folder, for the next call and for any supervisor.
    """
    if not job.is_unfinished:
        return job.status
    request_cancel(job.folder, by)
    deadline = time.monotonic() + wait_s
    while True:
        now = read_job(job.folder.path)
        assert now is not None, "its spec is never removed"
        if not now.is_unfinished:
            now.folder.cancel.unlink(missing_ok=True)  # it ended by itself at the same moment
            return now.status
        if not now.supervised:
            config = read_json(job.folder.config)
            holder = {k: v for k, v in job.lease.items() if k in ("asset_key", "dagster_run_id")}
            launcher = launcher_of_attempt(now.records[-1])
            supervisor = Supervisor(
                launcher, job.folder, job.spec, config, holder=holder, deadline=deadline
            )
            try:
                return supervisor.run().status
            except Unreachable as away:
                raise Unreachable(f"{away}; the request is kept, cancel again later") from away
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"job {job.key} has not ended {wait_s:g} s after its supervisor was asked; look at it "
                f"with `roma-pipeline jobs logs {job.key}`, or repeat this with a longer --wait"
            )
        time.sleep(0.2)


def hours_of(job: Job, since: float = 0.0, now: float | None = None) -> float:
    """GPU-hours of its attempts, or CPU-hours without a GPU; of those that ended before ``since``, none."""
    now, hours, spec = time.time() if now is None else now, 0.0, job.spec
    width = spec.gpus_per_node or spec.processes_per_node * spec.threads_per_process
    for record in job.records:
        end = record.end
        if end is None:  # it claims this file when it begins to run
            owner = job.folder.attempt(record.attempt).owner
            ran_s = max(0.0, now - owner.stat().st_mtime) if owner.exists() else 0.0
        elif end.ended_at < since:
            continue
        elif end.ran_s is None:
            ran_s = end.ended_at - (record.submitted_at or record.intended_at)
        else:
            ran_s = end.ran_s
        hours += ran_s / 3600 * spec.nodes * width
    return hours


def usage(outcome: Outcome, spec: JobSpec, profile: ClusterProfile | None) -> dict[str, Any]:
    """Plain values to show on the asset of a completed job.

    ``ran_s`` and ``queued_s`` are sums over all attempts; ``lost_s`` is time of attempts that
    did not contribute: startup, and steps after the last checkpoint before an interruption.
    """
    ran_s = queued_s = 0.0
    for record in outcome.attempts:
        if (end := record.end) is not None:
            since_s = end.ended_at - (record.submitted_at or record.intended_at)
            ran_s += since_s if end.ran_s is None else end.ran_s  # where nothing queues
            if end.ran_s is not None and record.submitted_at is not None:
                queued_s += max(0.0, since_s - end.ran_s)
    facts: dict[str, Any] = {"ran_s": round(ran_s, 1), "queued_s": round(queued_s, 1)}
    if nodes := sorted({r.end.nodes for r in outcome.attempts if r.end and r.end.nodes}):
        facts["nodes"] = ", ".join(nodes)
    if spec.gpus_per_node:
        gpu_hours = ran_s / 3600 * spec.nodes * spec.gpus_per_node
        facts["gpu_hours"] = round(gpu_hours, 4)
        if profile is not None and (rate := profile.price_per_gpu_hour) is not None:
            facts["cost"] = f"{gpu_hours * rate:.2f} {profile.currency}"
    trained_s = outcome.result.facts.get("training_s") if outcome.result else None
    if isinstance(trained_s, int | float) and ran_s > 0:
        facts["lost_s"] = round(max(0.0, ran_s - trained_s), 1)
        facts["efficiency"] = round(min(1.0, trained_s / ran_s), 3)
    return facts
