"""Whether the installation is well: each part is asked, and says so in a line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.storage import MIN_FREE_MB, Storage

if TYPE_CHECKING:
    import dagster as dg
    from mlflow import MlflowClient

Status = Literal["ok", "warning", "error"]
_LOW_SHARE = 0.05  # of a disk that is free
_RECENT_S = 86400.0


@dataclass(frozen=True)
class Finding:
    """One part, how it is, and why."""

    part: str
    status: Status
    detail: str


def findings(
    storage: Storage,
    instance: Callable[[], dg.DagsterInstance],
    client: Callable[[], MlflowClient],
) -> Iterator[Finding]:
    """Every part in turn. What cannot be reached is a finding, and hides no other.

    Args:
        instance, client: open Dagster's and MLflow's stores; their exceptions are the finding.
    """
    yield _disk(storage)
    yield from _jobs(storage)
    try:
        yield _mlflow(client())
    except Exception as error:
        yield Finding("MLflow store", "error", _line(error))
    try:
        opened = instance()
        yield _dagster(opened)
    except Exception as error:
        yield Finding("Dagster store", "error", _line(error))
        return
    yield from _daemons(opened)
    yield _failures(opened)


def _disk(storage: Storage) -> Finding:
    import shutil

    total, _, free = shutil.disk_usage(storage.root)
    detail = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free at {storage.root}"
    if free < MIN_FREE_MB * 1e6:
        return Finding("disk", "error", f"{detail}; new work is refused: roma-pipeline gc")
    low = free / total < _LOW_SHARE
    return Finding("disk", "warning" if low else "ok", detail + ("; roma-pipeline gc" * low))


def _jobs(storage: Storage) -> Iterator[Finding]:
    jobs = all_jobs(storage.jobs)
    folders = sum((path / "spec.json").exists() for path in storage.jobs.iterdir())
    if folders > len(jobs):
        n = folders - len(jobs)
        yield Finding("job folders", "warning", f"{n} cannot be read; roma-pipeline jobs list")
    going = [job for job in jobs if job.open_attempt is not None]
    alone = [job.key for job in going if not job.watched]
    if alone:
        detail = f"{len(alone)} of {len(going)} that run have no watcher: {', '.join(alone[:5])}"
        yield Finding("jobs", "warning", f"{detail}; the reconcile sensor or `jobs cancel` ends it")
    else:
        yield Finding("jobs", "ok", f"{len(going)} run and are watched, {len(jobs)} in all")


def _mlflow(client: MlflowClient) -> Finding:
    from roma_pipelines.registry.store import is_server

    n = len(client.search_registered_models())
    kind = "server" if is_server(client.tracking_uri) else "store, tables of the present revision"
    return Finding("MLflow store", "ok", f"{kind}; {n} registered models")


def _dagster(instance: dg.DagsterInstance) -> Finding:
    instance.get_runs(limit=1)
    for storage in (instance.run_storage, instance.event_log_storage):
        there, wanted = storage.alembic_version() or (None, None)
        if there != wanted:
            detail = f"{type(storage).__name__} has revision {there}, Dagster wants {wanted}"
            return Finding("Dagster store", "error", f"{detail}; run `dagster instance migrate`")
    return Finding("Dagster store", "ok", type(instance.run_storage).__name__)


def _daemons(instance: dg.DagsterInstance) -> Iterator[Finding]:
    statuses = instance.get_daemon_statuses().values()
    if all(status.last_heartbeat is None for status in statuses):
        yield Finding("daemon", "warning", "never ran: schedules and sensors need `up`")
        return
    bad = []
    for status in statuses:
        beat = status.last_heartbeat
        if not status.healthy:
            age = f"{time.time() - beat.timestamp:.0f} s ago" if beat else "never"
            bad.append(f"{status.daemon_type.lower()} (last heartbeat {age})")
    if bad:
        yield Finding("daemon", "error", f"silent: {', '.join(bad)}; is `up` running?")
    else:
        yield Finding("daemon", "ok", f"{len(statuses)} parts alive")


def _failures(instance: dg.DagsterInstance) -> Finding:
    from datetime import UTC, datetime, timedelta

    import dagster as dg

    since = datetime.now(UTC) - timedelta(seconds=_RECENT_S)
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since)
    runs = instance.get_runs(filters, limit=20)
    if not runs:
        return Finding("failures", "ok", "no run failed in the last day")
    named = ", ".join(f"{run.run_id[:8]} {_experiments(run)}".strip() for run in runs[:3])
    return Finding("failures", "warning", f"{len(runs)} in the last day, newest first: {named}")


def _experiments(run: dg.DagsterRun) -> str:
    keys = run.asset_selection or ()
    return ",".join(sorted({key.path[0] for key in keys}))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
