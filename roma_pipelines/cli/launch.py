"""``roma-pipeline launch`` and ``plan``.

``launch`` runs any module that uses the Trainer as a job, without Dagster. ``plan`` prints the job of
an experiment without submitting it.
"""

from __future__ import annotations

import difflib
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from roma_core.job import JobFolder
    from roma_pipelines.experiment import Experiment
    from roma_pipelines.launching.launcher import Launcher
    from roma_pipelines.launching.spec import JobSpec, JobState
    from roma_pipelines.storage import Storage

_TARGET = click.Choice(["local", "slurm", "kubernetes"])
_PASSTHROUGH_ENV = ("ROMA", "WANDB", "MLFLOW")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--target", type=_TARGET, default="local", show_default=True)
@click.option(
    "--profile",
    help="Profile of the cluster (default: ROMA_SLURM_PROFILE or ROMA_KUBERNETES_PROFILE).",
)
@click.option("--nodes", type=int, default=1, show_default=True)
@click.option("--processes", type=int, default=1, show_default=True, help="Per node.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPU threads per process.")
@click.option("--gpus", type=int, default=0, show_default=True, help="Per node.")
@click.option("--memory-gb", type=float, help="Per node (default: that of the profile).")
@click.option(
    "--time-limit-min",
    type=int,
    help="Time limit of one attempt; the job resumes in a new one.",
)
@click.option("--max-attempts", type=int, default=20, show_default=True)
@click.option("--job", "key", help="Supervise this job again, which was launched before.")
@click.option("-m", "as_module", is_flag=True, help="Before MODULE, as with python.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODULE [ARGUMENT]…")
def launch(as_module: bool, key: str | None, words: tuple[str, ...], **options: Any) -> None:
    """Run MODULE as a job, on this computer or on a cluster, and follow its log.

    Arguments after MODULE are passed on unchanged. The module runs in the current folder and reads
    the .env there. Ctrl-C ends the supervision, not the job: --job KEY resumes it, and makes the
    attempts that an interrupted job needs.
    """
    from roma_core.files import read_json
    from roma_pipelines.launching.jobs import find_job
    from roma_pipelines.launching.targets import launcher_of_attempt
    from roma_pipelines.storage import Storage, StorageError

    if bool(words) == (key is not None):
        raise click.UsageError("expected -m MODULE, or --job KEY of a job that was launched before")
    if options["profile"] and options["target"] == "local":
        raise click.UsageError(
            f"--profile {options['profile']} names a cluster, but the target is local; add --target of "
            f"that cluster's kind, or leave --profile out"
        )
    try:
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
    except (StorageError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _new_job(
    storage: Storage, module: str, arguments: tuple[str, ...], options: dict[str, Any]
) -> tuple[JobFolder, JobSpec, Any, Launcher]:
    from roma_core.files import digest_of
    from roma_core.job import JobFolder
    from roma_pipelines.launching.spec import JobSpec, job_key
    from roma_pipelines.launching.targets import launcher_for

    here = str(Path.cwd())
    config = {"module": module, "arguments": list(arguments), "working_folder": here}
    key = job_key(module, secrets.token_hex(8))
    spec = JobSpec(
        key=key,
        command=("-m", "roma_core.run_job", here, module, *arguments),
        config_digest=digest_of(config),
        nodes=options["nodes"],
        processes_per_node=options["processes"],
        threads_per_process=options["threads"],
        gpus_per_node=options["gpus"],
        memory_gb=options["memory_gb"],
        time_limit_min=options["time_limit_min"],
        env_names=tuple(sorted(name for name in os.environ if name.startswith(_PASSTHROUGH_ENV))),
    )
    if options["target"] == "local":
        _check_fits_this_computer(spec)
    launcher = launcher_for(options["target"], options["profile"], storage)
    if _uses_this_python(launcher):
        _check_module(module)
    return JobFolder(storage.jobs / key), spec, config, launcher


def _check_fits_this_computer(spec: JobSpec) -> None:
    """Raises Rejected if the job asks for more than there is; warns of too many threads."""
    from roma_pipelines.launching.launcher import Rejected
    from roma_pipelines.launching.local import exceeds_this_computer

    if reasons := exceeds_this_computer(spec):
        raise Rejected(reasons)
    threads, cpus = spec.processes_per_node * spec.threads_per_process, os.cpu_count() or 1
    if threads > cpus:
        click.echo(
            f"{threads} threads are asked for, this computer has {cpus} CPUs; it will be slow",
            err=True,
        )


def _uses_this_python(launcher: Launcher) -> bool:
    """Whether the job certainly runs with this interpreter and these files."""
    from roma_pipelines.launching.slurm.launcher import SlurmLauncher

    if not isinstance(launcher, SlurmLauncher):
        return launcher.backend == "local"
    at = launcher.profile
    return not (at.ssh or at.python or at.container or at.modules or at.setup)


def _check_module(name: str) -> None:
    """Raises ValueError now, in place of a traceback of every process after seconds."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]  # a parent package may fail to import
        raise ValueError(
            f"there is no module {name!r} in {Path.cwd()} or among what is installed"
            + (f" ({why[0]})" if why else "")
            + "; name it as for `python -m`: dots, no .py"
        )


def _supervise(
    folder: JobFolder, spec: JobSpec, config: Any, launcher: Launcher, max_attempts: int
) -> None:
    from roma_pipelines.launching.spec import JobFailed
    from roma_pipelines.launching.supervisor import supervise

    console = _Console(folder)
    try:
        outcome = supervise(
            launcher,
            folder,
            spec,
            config,
            holder={"asset_key": spec.command[3] if len(spec.command) > 3 else "?"},
            on_poll=console.update,
            on_note=lambda note: console.announce(),
            max_attempts=max_attempts,
        )
    except JobFailed as error:
        console.print_log()
        # its log is printed already
        raise click.ClickException("\n".join(str(error).splitlines()[:2])) from error
    except KeyboardInterrupt:
        if not folder.attempt_numbers():  # not even an intent: the preflight was not over
            raise click.ClickException(
                f"interrupted before anything was submitted to the target {launcher.backend}; "
                f"no job is running: launch it again"
            ) from None
        raise click.ClickException(
            f"the job is still running; supervise it again with `roma-pipeline launch --job "
            f"{spec.key}`, or cancel it with `roma-pipeline jobs cancel {spec.key}`"
        ) from None
    console.print_log()
    click.echo(f"job {spec.key} completed in {len(outcome.attempts)} attempt(s)", err=True)


class _Console:
    """Prints the job's folder once it has one, its log as it grows, and why it does not run."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self.attempt, self.offset, self.reason = 0, 0, ""
        self.announced = False

    def announce(self) -> None:
        """Print the folder, once; a rejected job has none."""
        if not self.announced and self.folder.attempt_numbers():
            self.announced = True
            click.echo(f"job {self.folder.path.name} in {self.folder.path}", err=True)

    def update(self, state: JobState) -> None:
        self.announce()
        self.print_log()
        if not state.ended and state.phase != "running" and state.reason != self.reason:
            self.reason = state.reason
            click.echo(f"{state.phase}: {state.reason}", err=True)

    def print_log(self) -> None:
        newest = max(self.folder.attempt_numbers(), default=0)
        if newest > self.attempt:
            self.attempt, self.offset = newest, 0
        if self.attempt:
            log = self.folder.attempt(self.attempt).log
            self.offset = print_from(log, self.offset)


def print_from(log: Path, offset: int) -> int:
    """Print a log from this byte on, if there is one; returns the new offset."""
    if not log.exists():
        return offset
    with log.open("rb") as file:
        file.seek(offset)
        content = file.read()
    click.echo(content.decode(errors="replace"), nl=False)
    return offset + len(content)


_COMMANDS = {
    "pretrained_encoder": ("pretrain", "torchrun"),
    "finetuned_classifier": ("finetune", "torchrun"),
    "evaluation_report": ("evaluate", "plain"),
}
_NO_KEY = "0" * 20
_PLACEHOLDERS = {
    "JOB_FOLDER": "<storage root>/jobs/<key>, where config.json holds the training's settings",
    _NO_KEY[:12]: "the beginning of the job's key",
    "FREE_PORT": "chosen at the start",
}


@click.command()
@click.argument("experiment")
@click.option("--target", type=_TARGET, help="Overrides the target of the experiment.")
@click.option("--profile", help="Overrides the cluster profile of the experiment.")
@click.option(
    "--asset",
    type=click.Choice(list(_COMMANDS)),
    default="pretrained_encoder",
    show_default=True,
    help="Asset whose job to print.",
)
@click.option("--check", is_flag=True, help="Also run the target's preflight checks.")
def plan(experiment: str, target: str | None, profile: str | None, asset: str, check: bool) -> None:
    """Print the exact script of an EXPERIMENT's job, and how it differs from the last one.

    EXPERIMENT is a name or the path of a defs.yaml. Nothing is submitted. --check prints every
    reason for which the target would reject the job; the exit code is 1 if there is one.
    """
    from roma_core.job import JobFolder
    from roma_pipelines.experiment import ENCODER, load_experiment
    from roma_pipelines.launching.launcher import PLANNED_FOLDER, Rejected, Unreachable
    from roma_pipelines.launching.targets import launcher_for
    from roma_pipelines.storage import Storage, StorageError

    try:
        found = load_experiment(experiment)
        found.check_servable(environment=True)
        _check_trainer_settings(found, asset)
        if found.pretrained_from is not None and asset == ENCODER:
            raise ValueError(
                f"{found.name} finetunes the encoder of {found.pretrained_from}; plan that experiment, "
                f"or give --asset finetuned_classifier"
            )
        try:
            resources = found.resources.at(target, profile)
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        found = found.model_copy(update={"resources": resources})
        storage = Storage.open()
        launcher = launcher_for(resources.target, resources.profile, storage)
        text = launcher.plan(_spec(found, asset, _NO_KEY, PLANNED_FOLDER)).text
        click.echo(text, nl=False)
        for word, meaning in _PLACEHOLDERS.items():
            if word in text:
                click.echo(f"# {word} stands for: {meaning}", err=True)
        _show_difference(found, asset, launcher, storage)
        if check:
            folder = JobFolder((storage.jobs / _NO_KEY).resolve())
            planned = launcher.plan(_spec(found, asset, _NO_KEY, folder), folder)
            if reasons := launcher.preflight(planned):
                raise Rejected(reasons)
            click.echo(f"# the target {launcher.backend} would run it", err=True)
    except (ValueError, StorageError, Unreachable) as error:
        raise click.ClickException(str(error)) from error


def _check_trainer_settings(experiment: Experiment, asset: str) -> None:
    """Raises ValueError if a setting of the trainer is wrong, one of the environment included."""
    from roma_core.trainer.config import TrainerConfig

    stages = {
        "pretrained_encoder": experiment.pretraining,
        "finetuned_classifier": experiment.finetuning,
    }
    if asset in stages:
        TrainerConfig(**stages[asset].trainer)


def _spec(experiment: Experiment, asset: str, key: str, folder: JobFolder) -> JobSpec:
    from roma_pipelines.launching.targets import job_spec, roma_command

    command, runner = _COMMANDS[asset]
    return job_spec(
        experiment.resources,
        key,
        roma_command(command, folder.path),
        config_digest="",
        runner=runner,  # type: ignore[arg-type]
    )


def _show_difference(
    experiment: Experiment, asset: str, launcher: Launcher, storage: Storage
) -> None:
    """On standard error, so that the script alone can be redirected into a file."""
    from roma_core.job import JobFolder
    from roma_pipelines.launching.jobs import all_jobs

    name = f"{experiment.name}/{asset}"
    last = next((job for job in all_jobs(storage.jobs) if job.asset == name and job.records), None)
    if last is None:
        click.echo(f"# {name} was never submitted from {storage.root}", err=True)
        return
    n = last.records[-1].attempt
    spec = _spec(experiment, asset, last.key, last.folder)
    script = last.folder.attempt(n).script
    if script.exists():
        before = script.read_text()
        now = launcher.plan(spec, JobFolder(last.folder.path.resolve()), n).text
    else:  # a target without scripts: compare the plans of both specifications
        before, now = launcher.plan(last.spec).text, launcher.plan(spec).text
    lines = difflib.unified_diff(
        before.splitlines(), now.splitlines(), f"last: job {last.key}", "now", lineterm="", n=1
    )
    text = "\n".join(lines) or f"# the same as the last one, job {last.key}"
    click.echo(text, err=True)
