"""``roma-pipeline plan``: what a job of an experiment would be, before it is one."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from roma_pipelines.experiment import Experiment
    from roma_pipelines.launching.job import JobSpec
    from roma_pipelines.launching.launcher import Launcher
    from roma_pipelines.storage import Storage

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
    from roma_pipelines.experiment import ENCODER
    from roma_pipelines.experiment_files import load_experiment
    from roma_pipelines.launching.launcher import NoAnswer
    from roma_pipelines.storage import Storage, StorageError
    from roma_pipelines.targets import launcher_for

    try:
        found = load_experiment(experiment)
        found.refuse_what_cannot_be_served(environment=True)
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
    except (ValueError, StorageError, NoAnswer) as error:
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
    from roma_pipelines.targets import job_spec, roma_command

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
    from roma_pipelines.launching.launcher import Refused

    folder = JobFolder(storage.jobs / _NO_KEY)
    if reasons := launcher.preflight(_spec(experiment, asset, _NO_KEY, str(folder.path)), folder):
        raise Refused(reasons)
    click.echo(f"# the target {launcher.backend} would run it", err=True)
