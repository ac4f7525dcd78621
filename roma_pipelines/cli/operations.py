"""``roma-pipeline health``, ``gc``, ``backup`` and ``restore``: operating an installation."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roma_core.cli import json_option
from roma_core.cli.doctor import CheckResult, report
from roma_core.job import JobFolder
from roma_pipelines.cli import open_registry
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.registry.runs import SHORT_S, is_pending, limit_requests, no_answer
from roma_pipelines.registry.store import MlflowSettings, connect, is_server
from roma_pipelines.storage import (
    MIN_FREE_MB,
    Storage,
    StorageError,
    StorageSettings,
    prepare_instance,
    project_folder,
)

if TYPE_CHECKING:
    import dagster as dg


@click.command(epilog="Example: roma-pipeline health --strict")
@json_option
@click.option("--strict", is_flag=True, help="A warning counts as an error.")
def health(as_json: bool, strict: bool) -> None:
    """Check all components and print a line for each; exit 1 on any error."""
    sys.exit(report(_checks(), as_json=as_json, strict=strict))


def _checks() -> Iterator[CheckResult]:
    """All checks in turn. A store that cannot be reached is an error and hides no other result."""
    import dagster as dg

    from roma_pipelines.definitions import load
    from roma_pipelines.experiment import all_experiments

    try:
        storage = Storage.open()
    except StorageError as error:
        yield CheckResult("storage", "error", str(error))
        return
    yield _disk(storage)
    yield from _jobs(storage)
    errors = load()[1]
    detail = "; ".join(errors.values()) or f"{len(all_experiments())} valid"
    yield CheckResult("experiments", "error" if errors else "ok", detail)
    limit_requests(SHORT_S)
    try:
        client = connect(MlflowSettings(), storage.mlflow)
        kind = "server" if is_server(client.tracking_uri) else "store, its schema is current"
        detail = f"{kind}; {len(client.search_registered_models())} registered models"
        yield CheckResult("MLflow store", "ok", detail)
    except Exception as error:
        away = no_answer(error)
        yield (
            CheckResult("MLflow store", "error", away) if away else _unusable("MLflow store", error)
        )
    if pending := sum(is_pending(JobFolder(path)) for path in storage.jobs.iterdir()):
        detail = f"MLflow lacks {pending} runs of jobs; `roma-pipeline jobs sync` sends them"
        yield CheckResult("MLflow runs", "warning", detail)
    try:
        prepare_instance(storage)
        instance = dg.DagsterInstance.get()
        instance.get_runs(limit=1)
        outdated = [
            f"{type(store).__name__} has revision {present}, Dagster needs {wanted}"
            for store in (instance.run_storage, instance.event_log_storage)
            for present, wanted in [store.alembic_version() or (None, None)]
            if present != wanted
        ]
        detail = "; ".join([*outdated, "run `dagster instance migrate`"] if outdated else [])
        kind = type(instance.run_storage).__name__
        yield CheckResult("Dagster store", "error" if outdated else "ok", detail or kind)
    except Exception as error:
        yield _unusable("Dagster store", error)
        return
    with instance:
        yield _daemons(instance)
        yield _failed_runs(instance)


def _unusable(store: str, error: Exception) -> CheckResult:
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return CheckResult(store, "error", text)


def _disk(storage: Storage) -> CheckResult:
    total, _, free = shutil.disk_usage(storage.root)
    detail = f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB free at {storage.root}"
    if free < MIN_FREE_MB * 1e6:
        return CheckResult("disk", "error", f"{detail}; new work is refused: run roma-pipeline gc")
    low = free / total < 0.05
    return CheckResult("disk", "warning" if low else "ok", detail + "; run roma-pipeline gc" * low)


def _jobs(storage: Storage) -> Iterator[CheckResult]:
    jobs = all_jobs(storage.jobs)
    n_unreadable = sum((path / "spec.json").exists() for path in storage.jobs.iterdir()) - len(jobs)
    if n_unreadable > 0:
        detail = f"{n_unreadable} cannot be read; roma-pipeline jobs list names them"
        yield CheckResult("job folders", "warning", detail)
    active = [job for job in jobs if job.open_attempt is not None]
    alone = [job.key for job in active if not job.supervised]
    detail = f"{len(active)} active, all supervised; {len(jobs)} in total"
    if alone:
        detail = f"{len(alone)} of {len(active)} active jobs have no supervisor"
        detail += f": {', '.join(alone[:5])}; the reconcile sensor or `jobs cancel` ends them"
    yield CheckResult("jobs", "warning" if alone else "ok", detail)


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
    from dagster import DagsterRunStatus, RunsFilter

    since = datetime.now(UTC) - timedelta(days=1)
    filters = RunsFilter(statuses=[DagsterRunStatus.FAILURE], updated_after=since)
    runs = instance.get_runs(filters, limit=20)
    if not runs:
        return CheckResult("failures", "ok", "no run failed in the last day")

    def name(run: dg.DagsterRun) -> str:
        experiments = sorted({key.path[0] for key in run.asset_selection or ()})
        return f"{run.run_id[:8]} {','.join(experiments)}".strip()

    newest = ", ".join(map(name, runs[:3]))
    detail = f"{len(runs)} in the last day, newest first: {newest}"
    return CheckResult("failures", "warning", detail)


@click.command(epilog="Example: roma-pipeline gc --days 7 --yes")
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Keep everything newer than this many days.",
)
@click.option(
    "--keep-versions",
    type=click.IntRange(min=2),
    default=3,
    show_default=True,
    help="Newest versions to keep of every data set.",
)
@click.option("--yes", is_flag=True, help="Remove; the default is to list only.")
def gc(days: float, keep_versions: int, yes: bool) -> None:
    """List, or with --yes remove, what is not needed: jobs, checkpoints, data sets, MLflow runs.

    Removed are ended jobs, checkpoints of completed jobs, old versions of data sets, MLflow runs
    that were deleted on the MLflow page, and cached models without an alias. Kept at any age is what
    a registered version or the newest materialisation of an asset was made of, what is running, and
    the inputs of predictions.
    """
    from roma_pipelines.operations.retention import operations_lock, removals

    verb, total = "removed" if yes else "would remove", 0
    with open_registry() as client:
        storage = Storage.open()
        prepare_instance(storage)
        import dagster as dg

        with operations_lock(storage), dg.DagsterInstance.get() as instance:
            found = removals(storage, instance, client, days=days, keep_versions=keep_versions)
            for removal in found:
                if yes and not removal.remove():
                    click.echo(f"kept          needed again: {removal.what}")
                    continue
                total += removal.n_bytes
                click.echo(f"{verb:<13} {removal.n_bytes:>14,} bytes  {removal.what}")
    click.echo(f"{verb} {total:,} bytes in total")
    if found and not yes:
        kept = f"inputs of predictions, of shipped experiments and those in {project_folder()}/defs"
        click.echo(f"--yes removes it. Kept are {kept}")


@click.command(epilog="Example: roma-pipeline backup roma-backup.tar")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--with-datasets", is_flag=True, help="Include data sets; they can be built again.")
def backup(file: Path, with_datasets: bool) -> None:
    """Write the state to FILE, a tar: databases, the registry's artifacts, the record of every job.

    Everything may run meanwhile. The file is read back and compared with its sha256 before it gets
    its name.

    Not included: caches, checkpoints of jobs, logs of servers, data sets (see --with-datasets), and
    state that is kept elsewhere: by an MLflow server (ROMA_MLFLOW_TRACKING_URI), or by a DAGSTER_HOME
    outside the root or with its own storage. The command names what applies; back that up there.
    """
    from roma_pipelines.operations.backup import kept_elsewhere, write_backup
    from roma_pipelines.operations.retention import operations_lock

    storage = Storage.open()
    with operations_lock(storage):
        n_bytes = write_backup(storage, file.absolute(), with_datasets=with_datasets)
    elsewhere = kept_elsewhere(storage)
    click.echo(f"{file}: {n_bytes:,} bytes, verified; `roma-pipeline restore {file}` restores it")
    datasets = "" if with_datasets else ", data sets (--with-datasets)"
    click.echo(f"not included: caches, checkpoints of jobs, logs of servers{datasets}")
    for what in elsewhere:
        click.echo(f"NOT INCLUDED: {what}; back it up there")


@click.command(epilog="Example: roma-pipeline restore roma-backup.tar")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def restore(file: Path) -> None:
    """Restore FILE into ROMA_STORAGE_ROOT, which must be empty, as must the database."""
    from roma_pipelines.operations.backup import restore_backup

    root = StorageSettings().root
    original = restore_backup(file, root)
    click.echo(f"restored into {root}")
    if original:
        click.echo(
            f"the backup was made of {original}: models load from the new place, but the history of "
            f"assets refers to the old one until they are materialised again"
        )
