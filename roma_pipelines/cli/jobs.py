"""``roma-pipeline jobs``: list, show, follow and cancel jobs; works without the orchestrator."""

from __future__ import annotations

import getpass
import time
from typing import TYPE_CHECKING

import click

from roma_pipelines.cli.launch import print_from

if TYPE_CHECKING:
    from roma_pipelines.launching.jobs import Job
    from roma_pipelines.storage import Storage

_FOLLOW_EVERY_S = 0.5


@click.group()
def jobs() -> None:
    """List, show, follow and cancel training jobs.

    KEY is a job's key or a unique prefix of it.
    """


@jobs.command("list")
@click.option("--all", "everything", is_flag=True, help="Include jobs that have ended.")
def list_(everything: bool) -> None:
    """List waiting and running jobs, the newest first."""
    from roma_pipelines.launching.jobs import all_jobs

    found = all_jobs(_storage().jobs)
    shown = [job for job in found if everything or job.open_attempt is not None]
    if not shown:
        click.echo(f"no waiting or running jobs; {len(found)} have ended (show them with --all)")
        return
    rows = [("KEY", "STATUS", "TARGET", "ATTEMPT", "STEP", "AGE", "SUPERVISED", "ASSET")]
    for job in shown:
        last = job.records[-1] if job.records else None
        rows.append(
            (
                job.key,
                job.status,
                last.backend if last else "-",
                str(last.attempt) if last else "-",
                str(job.checkpoint) if job.checkpoint is not None else "-",
                _age(time.time() - job.made_at),
                "yes" if job.supervised else "no",
                job.asset,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


@jobs.command()
@click.argument("key")
def show(key: str) -> None:
    """Show one job: its resources, attempts and events."""
    from roma_pipelines.launching.launcher import size_of
    from roma_pipelines.launching.outcome import local_time, read_events
    from roma_pipelines.launching.spec import id_of

    job = _job(_storage(), key)
    click.echo(f"job         {job.key}: {job.asset}, {job.status}")
    click.echo(f"folder      {job.folder.path}")
    click.echo(f"resources   {size_of(job.spec)}")
    if job.lease:
        run = job.lease.get("dagster_run_id")
        alive = "alive" if job.supervised else "gone"
        of_run = f", of Dagster run {run}" if run else ""
        click.echo(f"supervisor  process {job.lease['pid']}{of_run}, {alive}")
        if job.is_unfinished and (state := job.lease.get("state")):
            seen_s = time.time() - float(job.lease["beat"])
            click.echo(f"state       {state}; seen {_age(max(0.0, seen_s))} ago")
    for record in job.records:
        known = id_of(record.external)
        end = f"{record.end.status}: {record.end.reason}" if record.end else "not ended"
        click.echo(f"attempt {record.attempt}   {record.backend} ({known or 'no id yet'}): {end}")
    if events := read_events(job.folder):
        click.echo("events")
    for event in events:
        when = local_time(event.time)
        click.echo(f"  {when}  {event.attempt or '-'}  {event.observed}: {event.action}")


@jobs.command()
@click.argument("key")
@click.option("-f", "--follow", is_flag=True, help="Follow the log until the job has ended.")
@click.option("--attempt", type=int, help="Attempt number (default: latest).")
def logs(key: str, follow: bool, attempt: int | None) -> None:
    """Print the output of a job's processes."""
    from roma_pipelines.launching.jobs import read_job

    job: Job | None = _job(_storage(), key)
    assert job is not None
    known = [record.attempt for record in job.records]
    if attempt is not None and attempt not in known:
        raise click.ClickException(f"there is no attempt {attempt}; there are {known}")
    n, offset = attempt or (known[-1] if known else 1), 0
    while True:
        over = job is None or not (job.is_unfinished and (job.open_attempt or job.supervised))
        if job:
            offset = print_from(job.folder.attempt(n).log, offset)
        newest = job.records[-1].attempt if job and job.records else n
        if attempt is None and newest > n:
            n, offset = newest, 0
            continue
        if not follow or over:
            return
        try:
            time.sleep(_FOLLOW_EVERY_S)
        except KeyboardInterrupt:  # stop following; the job runs on
            return
        job = read_job(job.folder.path) if job else None


@jobs.command()
@click.argument("key")
@click.option(
    "--wait", "wait_s", default=120.0, show_default=True, help="Seconds to wait for the end."
)
def cancel(key: str, wait_s: float) -> None:
    """Cancel a job on any target, supervised or not."""
    from roma_pipelines.launching.jobs import cancel
    from roma_pipelines.launching.launcher import Unreachable
    from roma_pipelines.launching.targets import launcher_of_attempt

    storage = _storage()
    job = _job(storage, key)
    if not job.is_unfinished:
        click.echo(f"job {job.key} has already ended: {job.status}")
        return
    try:
        ended = cancel(
            job,
            f"roma-pipeline jobs cancel, by {getpass.getuser()}",
            launcher_of_attempt(storage),
            wait_s,
        )
    except (Unreachable, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"job {job.key}: {ended}")


def _storage() -> Storage:
    from roma_pipelines.storage import Storage, StorageError

    try:
        return Storage.open()
    except StorageError as error:
        raise click.ClickException(str(error)) from error


def _job(storage: Storage, key: str) -> Job:
    from roma_pipelines.launching.jobs import find_job

    try:
        return find_job(storage.jobs, key)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
