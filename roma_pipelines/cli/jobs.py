"""``roma-pipeline jobs``: look at jobs, and end them; works while no orchestrator runs."""

from __future__ import annotations

import getpass
import time
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from roma_pipelines.launching.jobs import Job
    from roma_pipelines.storage import Storage

_FOLLOW_EVERY_S = 0.5


@click.group()
def jobs() -> None:
    """Training jobs: list them, read their logs, end them, remove what came to nothing.

    KEY is a job's key, or as much of its beginning as is needed.
    """


@jobs.command("list")
@click.option("--all", "everything", is_flag=True, help="Ended ones too.")
def list_(everything: bool) -> None:
    """Jobs that wait or run; the newest first."""
    from roma_pipelines.launching.jobs import all_jobs

    found = all_jobs(_storage().jobs)
    shown = [job for job in found if everything or job.open_attempt is not None]
    if not shown:
        click.echo(f"no job waits or runs; {len(found)} ended (--all shows them)")
        return
    rows = [("KEY", "STATUS", "TARGET", "ATTEMPT", "STEP", "AGE", "WATCHED", "WHAT")]
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
                "yes" if job.watched else "no",
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
    """One job: what it asked for, its attempts, and every decision about it."""
    from roma_pipelines.launching.launcher import size_of
    from roma_pipelines.launching.outcome import clock, read_decisions
    from roma_pipelines.launching.spec import id_of

    job = _job(_storage(), key)
    click.echo(f"job        {job.key}: {job.asset}, {job.status}")
    click.echo(f"folder     {job.folder.path}")
    click.echo(f"asked for  {size_of(job.spec)}")
    if job.watcher:
        run = job.watcher.get("dagster_run_id")
        alive = "alive" if job.watched else "gone"
        of_run = f", of Dagster run {run}" if run else ""
        click.echo(f"watcher    process {job.watcher['pid']}{of_run}, {alive}")
        if job.is_to_go_on and (state := job.watcher.get("state")):
            seen_s = time.time() - float(job.watcher["beat"])
            click.echo(f"state      {state}; seen {_age(max(0.0, seen_s))} ago")
    for record in job.records:
        known = id_of(record.external)
        end = f"{record.end.how}: {record.end.reason}" if record.end else "not over"
        click.echo(f"attempt {record.attempt}  {record.backend} ({known or 'no id yet'}): {end}")
    if decisions := read_decisions(job.folder):
        click.echo("decisions")
    for entry in decisions:
        click.echo(f"  {clock(entry.time)}  {entry.attempt or '-'}  {entry.seen}: {entry.done}")


@jobs.command()
@click.argument("key")
@click.option("-f", "--follow", is_flag=True, help="Go on as it grows, until the job is over.")
@click.option("--attempt", type=int, help="Which; the last one by default.")
def logs(key: str, follow: bool, attempt: int | None) -> None:
    """The output of a job's processes."""
    from roma_pipelines.launching.jobs import read_job

    job: Job | None = _job(_storage(), key)
    assert job is not None
    known = [record.attempt for record in job.records]
    if attempt is not None and attempt not in known:
        raise click.ClickException(f"there is no attempt {attempt}; there are {known}")
    n, offset = attempt or (known[-1] if known else 1), 0
    while True:
        over = job is None or not (job.is_to_go_on and (job.open_attempt or job.watched))
        log = job.folder.attempt(n).log if job else None
        if log and log.exists():
            with log.open("rb") as file:
                file.seek(offset)
                content = file.read()
            offset += len(content)
            click.echo(content.decode(errors="replace"), nl=False)
        newest = job.records[-1].attempt if job and job.records else n
        if attempt is None and newest > n:
            n, offset = newest, 0
            continue
        if not follow or over:
            return
        try:
            time.sleep(_FOLLOW_EVERY_S)
        except KeyboardInterrupt:  # who looked has seen enough; the job goes on
            return
        job = read_job(job.folder.path) if job else None


@jobs.command()
@click.argument("key")
@click.option("--wait", "wait_s", default=120.0, show_default=True, help="Seconds.")
def cancel(key: str, wait_s: float) -> None:
    """End a job, wherever it runs and whether or not anybody watches it."""
    from roma_pipelines.launching.jobs import cancel
    from roma_pipelines.launching.launcher import Unreachable
    from roma_pipelines.launching.targets import launcher_of

    storage = _storage()
    job = _job(storage, key)
    if not job.is_to_go_on:
        click.echo(f"job {job.key} is over already: {job.status}")
        return
    try:
        ended = cancel(
            job, f"roma-pipeline jobs cancel, by {getpass.getuser()}", launcher_of(storage), wait_s
        )
    except (Unreachable, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"job {job.key}: {ended}")


@jobs.command()
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Ended at least so long ago.",
)
@click.option("--yes", is_flag=True, help="Remove them; without, they are only listed.")
def gc(days: float, yes: bool) -> None:
    """Remove the folders of failed and cancelled jobs; completed ones stay."""
    from roma_pipelines.launching.jobs import all_jobs, removable, remove

    found = removable(all_jobs(_storage().jobs), days * 86400)
    for job in found:
        if yes:
            remove(job)
        click.echo(f"{'removed' if yes else 'would remove'} {job.key}: {job.asset}, {job.status}")
    if not found:
        click.echo(f"no failed or cancelled job ended more than {days:g} days ago")


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
