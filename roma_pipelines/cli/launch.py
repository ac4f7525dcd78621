"""``roma-pipeline launch``: any module that uses the Trainer as a job, without Dagster.

``roma-pipeline plan``: what a job of an experiment would be, before it is one.
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

_PASSTHROUGH_ENV = ("ROMA", "WANDB", "MLFLOW")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option(
    "--target",
    type=click.Choice(["local", "slurm", "kubernetes"]),
    default="local",
    show_default=True,
)
@click.option("--profile", help="Of the cluster; ROMA_SLURM_ or ROMA_KUBERNETES_PROFILE else.")
@click.option("--nodes", type=int, default=1, show_default=True)
@click.option("--processes", type=int, default=1, show_default=True, help="On each node.")
@click.option("--threads", type=int, default=1, show_default=True, help="CPUs of each process.")
@click.option("--gpus", type=int, default=0, show_default=True, help="On each node.")
@click.option("--memory-gb", type=float, help="On each node; the site's default without.")
@click.option("--time-limit-min", type=int, help="Of one attempt; attempts continue.")
@click.option("--max-attempts", type=int, default=20, show_default=True)
@click.option("--job", "key", help="Watch this job again, which was launched before.")
@click.option("-m", "as_module", is_flag=True, help="In front of MODULE, as for python.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="MODULE [ARGUMENT]…")
def launch(as_module: bool, key: str | None, words: tuple[str, ...], **options: Any) -> None:
    """Run MODULE as a job, on this computer or on a cluster, and follow its log.

    All that comes after MODULE reaches it as it is. It runs in the present folder and reads the .env
    there. Ctrl-C ends the watch, not the job: --job KEY takes it up
    again, and makes the attempts that an interrupted job needs.
    """
    from pydantic import ValidationError

    from roma_pipelines.launching.launcher import Rejected
    from roma_pipelines.storage import Storage, StorageError

    if bool(words) == (key is not None):
        raise click.UsageError(
            "-m MODULE is needed, or --job KEY of a job that was launched before"
        )
    if options["profile"] and options["target"] == "local":
        raise click.UsageError(
            f"--profile {options['profile']} names a cluster, and the target is local; add --target of "
            f"that cluster's kind, or leave --profile out"
        )
    try:
        storage = Storage.open()
        folder, spec, config, launcher = (
            _again(storage, key) if key else _new(storage, words[0], words[1:], options)
        )
        _watch(folder, spec, config, launcher, options["max_attempts"])
    except (Rejected, StorageError, ValidationError, ValueError) as error:
        raise click.ClickException(str(error)) from error


def _new(storage: Any, module: str, arguments: tuple[str, ...], options: dict[str, Any]) -> Any:
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
        _fits_here(spec)
    launcher = launcher_for(options["target"], options["profile"], storage)
    if _has_this_python(launcher):
        _is_a_module(module)
    return JobFolder(storage.jobs / key), spec, config, launcher


def _fits_here(spec: Any) -> None:
    """Take literally what was typed for this computer.

    Raises:
        Refused: it has less.
    """
    from roma_pipelines.launching.launcher import Rejected
    from roma_pipelines.launching.local import more_than_here

    if reasons := more_than_here(spec):
        raise Rejected(reasons)
    threads, cpus = spec.processes_per_node * spec.threads_per_process, os.cpu_count() or 1
    if threads > cpus:
        click.echo(
            f"{threads} threads are asked for, this computer has {cpus} CPUs; it will be slow",
            err=True,
        )


def _has_this_python(launcher: Any) -> bool:
    """Whether the job runs with this interpreter and these files, as far as anybody says."""
    if launcher.backend == "local":
        return True
    site = getattr(launcher, "site", None)
    if launcher.backend != "slurm" or site is None:
        return False
    return not (site.ssh or site.python or site.container or site.modules or site.setup)


def _is_a_module(name: str) -> None:
    """Say now what each process would say after seconds, under forty lines of its starter.

    Raises:
        ValueError: Python finds no such module from this folder.
    """
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]  # a parent package may fail to import
        raise ValueError(
            f"there is no module {name!r} in {Path.cwd()} or among what is installed"
            + (f" ({why[0]})" if why else "")
            + "; name it as for `python -m`: dots, no .py"
        )


def _again(storage: Any, key: str) -> Any:
    from roma_core.files import read_json
    from roma_pipelines.launching.jobs import find_job
    from roma_pipelines.launching.targets import launcher_of

    job = find_job(storage.jobs, key)
    if not job.records:
        raise ValueError(f"job {job.key} was never submitted; launch it anew")
    if job.watched and job.open_attempt:
        raise ValueError(
            f"job {job.key} is watched by process {job.watcher['pid']}; "
            f"`roma-pipeline jobs logs -f {job.key}` shows its log"
        )
    launcher = launcher_of(storage)(job.records[-1])
    return job.folder, job.spec, read_json(job.folder.config), launcher


def _watch(folder: JobFolder, spec: Any, config: Any, launcher: Any, max_attempts: int) -> None:
    from roma_pipelines.launching.spec import JobFailed
    from roma_pipelines.launching.supervisor import supervise

    shown = _Shown(folder)
    try:
        outcome = supervise(
            launcher,
            folder,
            spec,
            config,
            watcher={"asset_key": spec.command[3] if len(spec.command) > 3 else "?"},
            on_poll=shown.update,
            on_note=lambda note: shown.name(),
            max_attempts=max_attempts,
        )
    except JobFailed as error:
        shown.log()
        # its log is on the page already
        raise click.ClickException("\n".join(str(error).splitlines()[:2])) from error
    except KeyboardInterrupt:
        if not folder.attempt_numbers():  # not even an intent: it was still being checked
            raise click.ClickException(
                f"interrupted before anything was submitted to the target {launcher.backend}; "
                f"nothing runs: launch it anew"
            ) from None
        raise click.ClickException(
            f"the job goes on; take it up again with `roma-pipeline launch --job {spec.key}`, or end "
            f"it with `roma-pipeline jobs cancel {spec.key}`"
        ) from None
    shown.log()
    click.echo(f"job {spec.key} completed in {len(outcome.attempts)} attempt(s)", err=True)


class _Shown:
    """Prints where the job is once there is one, its log as it grows, and why it does not run."""

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self.attempt, self.offset, self.reason = 0, 0, ""
        self.named = False

    def name(self) -> None:
        """Once, and not before the target would run it: a refused job leaves no folder."""
        if not self.named and self.folder.attempt_numbers():
            self.named = True
            click.echo(f"job {self.folder.path.name} in {self.folder.path}", err=True)

    def update(self, state: JobState) -> None:
        self.name()
        self.log()
        if not state.ended and state.phase != "running" and state.reason != self.reason:
            self.reason = state.reason
            click.echo(f"{state.phase}: {state.reason}", err=True)

    def log(self) -> None:
        newest = max(self.folder.attempt_numbers(), default=0)
        if newest > self.attempt:
            self.attempt, self.offset = newest, 0
        if not self.attempt or not (log := self.folder.attempt(self.attempt).log).exists():
            return
        with log.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        self.offset += len(content)
        click.echo(content.decode(errors="replace"), nl=False)


_COMMANDS = {
    "pretrained_encoder": ("pretrain", "torchrun"),
    "finetuned_classifier": ("finetune", "torchrun"),
    "evaluation_report": ("evaluate", "plain"),
}
_NO_KEY = "0" * 20
_STAND_INS = {
    "JOB_FOLDER": "<storage root>/jobs/<key>, where config.json holds the training's settings",
    _NO_KEY[:12]: "the beginning of the job's key",
    "FREE_PORT": "chosen at the start",
}


@click.command()
@click.argument("experiment")
@click.option(
    "--target", type=click.Choice(["local", "slurm", "kubernetes"]), help="In place of the file's."
)
@click.option("--profile", help="Of the cluster, in place of the file's.")
@click.option(
    "--asset",
    type=click.Choice(list(_COMMANDS)),
    default="pretrained_encoder",
    show_default=True,
    help="Whose job.",
)
@click.option("--check", is_flag=True, help="Ask the target, too, whether it would run it.")
def plan(experiment: str, target: str | None, profile: str | None, asset: str, check: bool) -> None:
    """Print the exact script of an EXPERIMENT's job, and how it differs from the last one.

    EXPERIMENT is a name or the path of a defs.yaml. Nothing is submitted. --check prints every
    reason for which the target would refuse the job, and fails if there is one.
    """
    from roma_pipelines.experiment import ENCODER, load_experiment
    from roma_pipelines.launching.launcher import Unreachable
    from roma_pipelines.launching.targets import launcher_for
    from roma_pipelines.storage import Storage, StorageError

    try:
        found = load_experiment(experiment)
        found.check_servable(environment=True)
        _refuse_wrong_settings(found, asset)
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
        text = launcher.plan(_spec(found, asset, _NO_KEY, "JOB_FOLDER"))
        click.echo(text, nl=False)
        for word, meaning in _STAND_INS.items():
            if word in text:
                click.echo(f"# {word} stands for: {meaning}", err=True)
        _show_difference(found, asset, launcher, storage)
        if check:
            _check(found, asset, launcher, storage)
    except (ValueError, StorageError, Unreachable) as error:
        raise click.ClickException(str(error)) from error


def _refuse_wrong_settings(experiment: Experiment, asset: str) -> None:
    """Those of the environment, too, which the job would be given.

    Raises:
        ValueError: one of the trainer's is misspelt or wrong.
    """
    from roma_core.trainer.config import TrainerConfig

    stages = {
        "pretrained_encoder": experiment.pretraining,
        "finetuned_classifier": experiment.finetuning,
    }
    if asset in stages:
        TrainerConfig(**stages[asset].trainer)


def _spec(experiment: Experiment, asset: str, key: str, folder: str) -> JobSpec:
    from roma_pipelines.launching.targets import job_spec, roma_command

    command, starter = _COMMANDS[asset]
    return job_spec(
        experiment.resources,
        key,
        roma_command(command, folder),
        config_digest="",
        starter=starter,  # type: ignore[arg-type]
    )


def _show_difference(
    experiment: Experiment, asset: str, launcher: Launcher, storage: Storage
) -> None:
    """On standard error, so that the script alone can be redirected into a file."""
    from roma_pipelines.launching.jobs import all_jobs

    name = f"{experiment.name}/{asset}"
    last = next((job for job in all_jobs(storage.jobs) if job.asset == name and job.records), None)
    if last is None:
        click.echo(f"# {name} was never submitted from {storage.root}", err=True)
        return
    n = last.records[-1].attempt
    folder = str(last.folder.path.resolve())
    script = last.folder.attempt(n).script
    if script.exists():
        before = script.read_text()
        now = launcher.plan(_spec(experiment, asset, last.key, str(last.folder.path)), folder, n)
    else:  # a target that is given no script: compare what was asked for
        before = launcher.plan(last.spec)
        now = launcher.plan(_spec(experiment, asset, last.key, str(last.folder.path)))
    lines = list(
        difflib.unified_diff(
            before.splitlines(), now.splitlines(), f"last: job {last.key}", "now", lineterm="", n=1
        )
    )
    click.echo("\n".join(lines or [f"# the same as the last one, job {last.key}"]), err=True)


def _check(experiment: Experiment, asset: str, launcher: Launcher, storage: Storage) -> None:
    from roma_core.job import JobFolder
    from roma_pipelines.launching.launcher import Rejected

    folder = JobFolder(storage.jobs / _NO_KEY)
    if reasons := launcher.preflight(_spec(experiment, asset, _NO_KEY, str(folder.path)), folder):
        raise Rejected(reasons)
    click.echo(f"# the target {launcher.backend} would run it", err=True)
