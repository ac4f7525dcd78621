"""``roma-pipeline launch`` and ``jobs``: run, list, follow and cancel jobs without the orchestrator."""

from __future__ import annotations

import getpass
import os
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from roma_core.cli import echo_table, json_option, print_json
from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder
from roma_pipelines.cli import TARGETS, complete_job, complete_profile
from roma_pipelines.launching.jobs import Job, all_jobs, find_job, read_job
from roma_pipelines.launching.jobs import cancel as cancel_job
from roma_pipelines.launching.launcher import Launcher, Rejected, size_of
from roma_pipelines.launching.local import exceeds_this_computer
from roma_pipelines.launching.outcome import duration, local_time, read_events
from roma_pipelines.launching.spec import JobFailed, JobSize, JobSpec, JobState, id_of, job_key
from roma_pipelines.launching.supervisor import supervise
from roma_pipelines.launching.targets import (
    default_threads,
    launcher_for,
    launcher_of_attempt,
    module_command,
)
from roma_pipelines.registry import runs
from roma_pipelines.storage import Storage

_PASSTHROUGH_ENV = ("ROMA", "WANDB", "MLFLOW")
_FOLLOW_EVERY_S = 0.5


_AT_LEAST_ONE = click.IntRange(min=1)


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: roma-pipeline launch --target slurm --gpus 1 -m my_package.train",
)
@click.option(
    "--target", type=TARGETS, default="local", show_default=True, help="Where the job runs."
)
@click.option(
    "--profile",
    shell_complete=complete_profile,
    help="Profile of the cluster (default: ROMA_SLURM_PROFILE or ROMA_KUBERNETES_PROFILE).",
)
@click.option("--nodes", type=_AT_LEAST_ONE, default=1, show_default=True, help="Nodes of the job.")
@click.option(
    "--processes",
    "processes_per_node",
    type=_AT_LEAST_ONE,
    default=1,
    show_default=True,
    help="Per node.",
)
@click.option(
    "--threads",
    "threads_per_process",
    type=_AT_LEAST_ONE,
    help="Per process (default: the cores of this computer shared by the processes, at most 8 each, or "
    "OMP_NUM_THREADS; 1 on a cluster).",
)
@click.option("--gpus", "gpus_per_node", default=0, show_default=True, help="Per node.")
@click.option("--memory-gb", type=float, help="Memory per node (default: the profile's).")
@click.option(
    "--time-limit-min", type=int, help="Time limit of one attempt; the job resumes in a new one."
)
@click.option(
    "--max-attempts",
    type=int,
    default=20,
    show_default=True,
    help="Attempts in a row that may add no checkpoint.",
)
@click.option("--job", "key", help="Supervise this job again, which was launched before.")
@click.option(
    "-m", "as_module", is_flag=True, help="Accepted for likeness with python -m MODULE; no effect."
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODULE [ARGUMENT]…")
def launch(as_module: bool, key: str | None, words: tuple[str, ...], **options: Any) -> None:
    """Run MODULE as a job, on this computer or on a cluster, and follow its log.

    Arguments after MODULE are passed on unchanged. The module runs in the current folder and reads
    the .env there. Ctrl-C ends the supervision, not the job: --job KEY resumes it, and makes the
    attempts that an interrupted job needs.
    """
    if bool(words) == (key is not None):
        raise click.UsageError("expected -m MODULE, or --job KEY of a job that was launched before")
    if options["profile"] and options["target"] == "local":
        raise click.UsageError(
            f"--profile {options['profile']} names a cluster, but the target is local; add --target of "
            f"that cluster's kind, or leave --profile out"
        )
    storage = Storage.open()
    if key is None:
        folder, spec, config, launcher = _new_job(storage, words[0], words[1:], options)
    else:
        job = find_job(storage.jobs, key)
        if not job.records:
            raise ValueError(f"job {job.key} was never submitted; launch it again")
        if job.supervised and job.open_attempt:
            raise ValueError(
                f"job {job.key} is supervised by process {job.lease['pid']}; "
                f"`roma-pipeline jobs logs -f {job.key}` shows its log"
            )
        launcher = launcher_of_attempt(storage)(job.records[-1])
        folder, spec, config = job.folder, job.spec, read_json(job.folder.config)
    _supervise(folder, spec, config, launcher, options["max_attempts"])


def _new_job(
    storage: Storage, module: str, arguments: tuple[str, ...], options: dict[str, Any]
) -> tuple[JobFolder, JobSpec, Any, Launcher]:
    here = str(Path.cwd())
    config = {"module": module, "arguments": list(arguments), "working_folder": here}
    key = job_key(module, secrets.token_hex(8))
    launcher = launcher_for(options["target"], options["profile"], storage)
    size = JobSize(**{name: options[name] for name in JobSize.model_fields})
    threads = size.threads_per_process or default_threads(options["target"], size.world_size)
    spec = JobSpec(
        key=key,
        command=module_command(launcher, here, module, *arguments),
        config_digest=digest_of(config),
        **{**dict(size), "threads_per_process": threads},
        env_names=tuple(sorted(name for name in os.environ if name.startswith(_PASSTHROUGH_ENV))),
    )
    if options["target"] == "local":
        if reasons := exceeds_this_computer(spec):
            raise Rejected(reasons)
        threads, cpus = spec.processes_per_node * spec.threads_per_process, os.cpu_count() or 1
        if threads > cpus:
            click.echo(
                f"{threads} threads are asked for, this computer has {cpus} CPUs; it will be slow",
                err=True,
            )
    return JobFolder(storage.jobs / key), spec, config, launcher


def _supervise(
    folder: JobFolder, spec: JobSpec, config: Any, launcher: Launcher, max_attempts: int
) -> None:
    log, announced, reason = _Log(folder), False, ""

    def announce(note: str = "") -> None:  # once; a rejected job has no folder
        nonlocal announced
        if not announced and folder.attempt_numbers():
            announced = True
            click.echo(f"job {spec.key} in {folder.path}", err=True)

    def show(state: JobState) -> None:
        nonlocal reason
        announce()
        log.print()
        if not state.ended and state.phase != "running" and state.reason != reason:
            reason = state.reason
            click.echo(f"{state.phase}: {reason}", err=True)

    holder = {"asset_key": spec.command[3] if len(spec.command) > 3 else "?"}
    hooks: dict[str, Any] = {"on_poll": show, "on_note": announce, "max_attempts": max_attempts}
    try:
        outcome = supervise(launcher, folder, spec, config, holder=holder, **hooks)
    except JobFailed as error:
        log.print()  # all of it; the message repeats its end
        raise click.ClickException("\n".join(str(error).splitlines()[:2])) from error
    except KeyboardInterrupt:
        if not folder.attempt_numbers():  # not even an intent: the preflight was not over
            raise KeyboardInterrupt(
                f"interrupted before anything was submitted to the target {launcher.backend}; "
                f"no job is running: launch it again"
            ) from None
        raise KeyboardInterrupt(
            f"the job is still running; supervise it again with `roma-pipeline launch --job "
            f"{spec.key}`, or cancel it with `roma-pipeline jobs cancel {spec.key}`"
        ) from None
    log.print()
    click.echo(f"job {spec.key} completed in {len(outcome.attempts)} attempt(s)", err=True)


class _Log:
    """Prints the log of one attempt, or of the newest ones, as it grows."""

    def __init__(self, folder: JobFolder, attempt: int | None = None) -> None:
        self.folder, self.follows = folder, attempt is None
        self.attempt, self.offset = attempt or max(folder.attempt_numbers(), default=0), 0

    def print(self) -> None:
        numbers = self.folder.attempt_numbers() if self.follows else []
        for n in (self.attempt, *(n for n in numbers if n > self.attempt)):
            if n != self.attempt:
                self.attempt, self.offset = n, 0
            log = self.folder.attempt(n).log
            if log.exists():
                with log.open("rb") as file:
                    file.seek(self.offset)
                    content = file.read()
                self.offset += len(content)
                click.echo(content.decode(errors="replace"), nl=False)


@click.group(epilog="Example: roma-pipeline jobs list --all")
def jobs() -> None:
    """List, show, follow, cancel and sync training jobs.

    KEY is a job's key or a unique prefix of it.
    """


@jobs.command("list", epilog="Example: roma-pipeline jobs list --all")
@click.option("--all", "everything", is_flag=True, help="Include jobs that have ended.")
@json_option
def list_(everything: bool, as_json: bool) -> None:
    """List waiting and running jobs, the newest first."""
    found = all_jobs(Storage.open().jobs)
    shown = [_facts(job) for job in found if everything or job.open_attempt is not None]
    if as_json:
        print_json(shown)
        return
    if not shown:
        click.echo(f"no waiting or running jobs; {len(found)} have ended (show them with --all)")
        return
    rows = [[name.removesuffix("_s").upper() for name in shown[0]]]
    for facts in shown:
        facts |= {"age_s": duration(facts["age_s"]), "supervised": _YES_NO[facts["supervised"]]}
        rows.append(["-" if value is None else str(value) for value in facts.values()])
    echo_table(rows)


_YES_NO = {True: "yes", False: "no"}


def _facts(job: Job) -> dict[str, Any]:
    last = job.records[-1] if job.records else None
    return {
        "key": job.key,
        "status": job.status,
        "target": last and last.backend,
        "attempt": last and last.attempt,
        "step": job.checkpoint,
        "age_s": time.time() - job.made_at,
        "supervised": job.supervised,
        "asset": job.asset,
    }


@jobs.command(epilog="Example: roma-pipeline jobs show 3f2a9c")
@click.argument("key", shell_complete=complete_job)
@json_option
def show(key: str, as_json: bool) -> None:
    """Show one job: its resources, attempts and events."""
    job = find_job(Storage.open().jobs, key)
    if as_json:
        size = job.spec.model_dump(mode="json", include=set(JobSize.model_fields))
        attempts = [record.model_dump(mode="json") for record in job.records]
        found = {**_facts(job), "folder": str(job.folder.path), "size": size, "attempts": attempts}
        print_json({**found, "events": [asdict(event) for event in read_events(job.folder)]})
        return
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
            click.echo(f"state       {state}; seen {duration(seen_s)} ago")
    if (mlflow := runs.read_record(job.folder)) is not None:
        run_id = runs.known_run(job.folder).get("run_id", "no run yet")
        pending = ", pending: `roma-pipeline jobs sync` sends it" * runs.is_pending(job.folder)
        click.echo(f"mlflow      {run_id}: {mlflow.status}{pending}")
    for record in job.records:
        known = id_of(record.external)
        end = f"{record.end.status}: {record.end.reason}" if record.end else "not ended"
        click.echo(f"attempt {record.attempt}   {record.backend} ({known or 'no id yet'}): {end}")
    if events := read_events(job.folder):
        click.echo("events")
    for event in events:
        when = local_time(event.time)
        click.echo(f"  {when}  {event.attempt or '-'}  {event.observed}: {event.action}")


@jobs.command(epilog="Example: roma-pipeline jobs logs --follow 3f2a9c")
@click.argument("key", shell_complete=complete_job)
@click.option("-f", "--follow", is_flag=True, help="Follow the log until the job has ended.")
@click.option("--attempt", type=int, help="Attempt number (default: latest).")
def logs(key: str, follow: bool, attempt: int | None) -> None:
    """Print the output of a job's processes."""
    job: Job | None = find_job(Storage.open().jobs, key)
    assert job is not None
    known = [record.attempt for record in job.records]
    if attempt is not None and attempt not in known:
        raise ValueError(f"there is no attempt {attempt}; give --attempt one of {known}")
    log = _Log(job.folder, attempt)
    while job is not None:
        running = job.is_unfinished and (job.open_attempt or job.supervised)
        log.print()
        if not follow or not running:
            return
        time.sleep(_FOLLOW_EVERY_S)
        job = read_job(job.folder.path)


@jobs.command(epilog="Example: roma-pipeline jobs cancel 3f2a9c")
@click.argument("key", shell_complete=complete_job)
@click.option(
    "--wait", "wait_s", default=120.0, show_default=True, help="Seconds to wait for the end."
)
def cancel(key: str, wait_s: float) -> None:
    """Cancel a job on any target, supervised or not, and print its final status."""
    storage = Storage.open()
    job = find_job(storage.jobs, key)
    if not job.is_unfinished:
        click.echo(f"job {job.key} has already ended: {job.status}")
        return
    by = f"roma-pipeline jobs cancel, by {getpass.getuser()}"
    click.echo(f"job {job.key}: {cancel_job(job, by, launcher_of_attempt(storage), wait_s)}")


@jobs.command(epilog="Example: roma-pipeline jobs sync")
@click.option("--drop", metavar="KEY", help="Never send the pending record of this job.")
def sync(drop: str | None) -> None:
    """Send records of jobs to MLflow that could not be sent while it was unreachable."""
    storage = Storage.open()
    if drop is not None:
        job = find_job(storage.jobs, drop)
        if job.is_unfinished:
            raise ValueError(
                f"job {job.key} has not ended, and its end would be recorded again; end it with "
                f"`roma-pipeline jobs cancel {job.key}`"
            )
        runs.drop_record(job.folder)
        click.echo(f"job {job.key}: its record will not be sent to MLflow")
        return
    sent, failed = runs.send_pending(storage, patient=True)
    click.echo(f"MLflow received what it lacked of {len(sent)} jobs")
    if failed:
        raise ValueError("\n".join(failed))
