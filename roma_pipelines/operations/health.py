"""``roma-pipeline health``: whether the stores, daemons, disk and jobs of an installation work."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import dagster as dg

from roma_core.cli.doctor import CheckResult
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.registry.store import MlflowSettings, connect, is_server
from roma_pipelines.storage import MIN_FREE_MB, Storage, StorageError, prepare_instance


def checks() -> Iterator[CheckResult]:
    """All checks in turn. A store that cannot be reached is an error and hides no other result."""
    try:
        storage = Storage.open()
    except StorageError as error:
        yield CheckResult("storage", "error", str(error))
        return
    yield _disk(storage)
    yield from _jobs(storage)
    try:
        client = connect(MlflowSettings(), storage.mlflow)
        kind = "server" if is_server(client.tracking_uri) else "store, its schema is current"
        detail = f"{kind}; {len(client.search_registered_models())} registered models"
        yield CheckResult("MLflow store", "ok", detail)
    except Exception as error:
        yield CheckResult("MLflow store", "error", _in_one_line(error))
    try:
        prepare_instance(storage)
        instance = dg.DagsterInstance.get()
        yield _dagster(instance)
    except Exception as error:
        yield CheckResult("Dagster store", "error", _in_one_line(error))
        return
    with instance:
        yield _daemons(instance)
        yield _failed_runs(instance)


def _disk(storage: Storage) -> CheckResult:
    total, _, free = shutil.disk_usage(storage.root)
    detail = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free at {storage.root}"
    if free < MIN_FREE_MB * 1e6:
        return CheckResult("disk", "error", f"{detail}; new work is refused: run roma-pipeline gc")
    if free / total < 0.05:
        return CheckResult("disk", "warning", f"{detail}; run roma-pipeline gc")
    return CheckResult("disk", "ok", detail)


def _jobs(storage: Storage) -> Iterator[CheckResult]:
    jobs = all_jobs(storage.jobs)
    n_unreadable = sum((path / "spec.json").exists() for path in storage.jobs.iterdir()) - len(jobs)
    if n_unreadable > 0:
        detail = f"{n_unreadable} cannot be read; roma-pipeline jobs list names them"
        yield CheckResult("job folders", "warning", detail)
    active = [job for job in jobs if job.open_attempt is not None]
    alone = [job.key for job in active if not job.supervised]
    if alone:
        detail = f"{len(alone)} of {len(active)} active jobs have no supervisor"
        detail += f": {', '.join(alone[:5])}; the reconcile sensor or `jobs cancel` ends them"
        yield CheckResult("jobs", "warning", detail)
    else:
        detail = f"{len(active)} active, all supervised; {len(jobs)} in total"
        yield CheckResult("jobs", "ok", detail)


def _dagster(instance: dg.DagsterInstance) -> CheckResult:
    instance.get_runs(limit=1)
    for storage in (instance.run_storage, instance.event_log_storage):
        present, wanted = storage.alembic_version() or (None, None)
        if present != wanted:
            detail = f"{type(storage).__name__} has revision {present}, Dagster needs {wanted}"
            detail += "; run `dagster instance migrate`"
            return CheckResult("Dagster store", "error", detail)
    return CheckResult("Dagster store", "ok", type(instance.run_storage).__name__)


def _daemons(instance: dg.DagsterInstance) -> CheckResult:
    statuses = instance.get_daemon_statuses().values()
    if all(status.last_heartbeat is None for status in statuses):
        return CheckResult("daemon", "warning", "never ran: schedules and sensors need `up`")
    silent = []
    for status in statuses:
        if not status.healthy:
            beat = status.last_heartbeat
            age = f"{time.time() - beat.timestamp:.0f} s ago" if beat else "never"
            silent.append(f"{status.daemon_type.lower()} (last heartbeat {age})")
    if silent:
        return CheckResult("daemon", "error", f"silent: {', '.join(silent)}; is `up` running?")
    return CheckResult("daemon", "ok", f"{len(statuses)} daemons alive")


def _failed_runs(instance: dg.DagsterInstance) -> CheckResult:
    since = datetime.now(UTC) - timedelta(days=1)
    filters = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since)
    runs = instance.get_runs(filters, limit=20)
    if not runs:
        return CheckResult("failures", "ok", "no run failed in the last day")

    def name(run: dg.DagsterRun) -> str:
        experiments = sorted({key.path[0] for key in run.asset_selection or ()})
        return f"{run.run_id[:8]} {','.join(experiments)}".strip()

    newest = ", ".join(map(name, runs[:3]))
    detail = f"{len(runs)} in the last day, newest first: {newest}"
    return CheckResult("failures", "warning", detail)


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
