"""``roma-pipeline plan``: prints the job of an experiment without submitting it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from roma_core.data.store import StoredDataset
from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import primary_metric
from roma_pipelines.cli import TARGETS
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.launching.launcher import PLANNED_FOLDER, Launcher, Rejected, Unreachable
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.targets import job_spec, launcher_for, roma_command
from roma_pipelines.storage import Storage, StorageError

if TYPE_CHECKING:  # it imports Dagster, which takes seconds
    from roma_pipelines.experiment import Experiment

_COMMANDS: dict[str, tuple[str, Literal["torchrun", "plain"]]] = {
    "pretrained_encoder": ("pretrain", "torchrun"),
    "finetuned_classifier": ("finetune", "torchrun"),
    "finetuned_regressor": ("finetune", "torchrun"),
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
@click.option("--target", type=TARGETS, help="Overrides the target of the experiment.")
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
    from roma_pipelines.experiment import ENCODER, load_experiment

    try:
        found = load_experiment(experiment)
        if asset not in found.asset_names:
            raise ValueError(
                f"{found.name} has no {asset}, its task is {found.task}; give another --asset, one of "
                f"{', '.join(name for name in found.asset_names if name in _COMMANDS)}"
            )
        if _COMMANDS[asset][0] != "evaluate":
            stage = found.pretraining if asset == ENCODER else found.finetuning
            TrainerConfig(**stage.trainer)  # raises if a setting of it is wrong
        if found.pretrained_from is not None and asset == ENCODER:
            raise ValueError(
                f"{found.name} finetunes the encoder of {found.pretrained_from}; plan that experiment, "
                f"or give --asset {found.asset_names[2]}"
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
            message = f"the target {launcher.backend} would run it"
            if launcher.backend == "kubernetes":
                message = "Kubernetes accepts it in a dry run, which makes no pods: a wrong image, account "
                message += (
                    "or volume, PodSecurity, quotas of pods and missing nodes show when it runs"
                )
            click.echo(f"# {message}", err=True)
    except (ValueError, StorageError, Unreachable) as error:
        raise click.ClickException(str(error)) from error


def _spec(experiment: Experiment, asset: str, key: str, folder: JobFolder) -> JobSpec:
    command, runner = _COMMANDS[asset]
    return job_spec(experiment.resources, key, roma_command(command, folder.path), "", runner)


def _show_difference(
    experiment: Experiment, asset: str, launcher: Launcher, storage: Storage
) -> None:
    """On standard error, so that the script alone can be redirected into a file."""
    name, wanted = f"{experiment.name}/{asset}", experiment.primary_metric
    last = next((job for job in all_jobs(storage.jobs) if job.asset == name and job.records), None)
    if last is None:
        when = "; chosen from the classes once the data set is built" * (wanted == "auto")
        shown = f"{wanted}{when}" if experiment.task == "classification" else "r2"
        click.echo(f"# primary metric: {shown}", err=True)
        click.echo(f"# {name} was never submitted from {storage.root}", err=True)
        return
    dataset = read_json(last.folder.config).get("dataset")
    if dataset is not None and Path(dataset).exists():
        metric = "r2"
        if experiment.task == "classification":
            classes = StoredDataset(dataset, verify=False).split("train").class_counts
            metric = "; ".join(primary_metric(wanted, classes))
        click.echo(f"# primary metric: {metric}", err=True)
    n = last.records[-1].attempt
    spec = _spec(experiment, asset, last.key, last.folder)
    script = last.folder.attempt(n).script
    if script.exists():
        before = script.read_text()
        now = launcher.plan(spec, JobFolder(last.folder.path.resolve()), n).text
    else:  # a target without scripts: compare the plans of both specifications
        before, now = launcher.plan(last.spec).text, launcher.plan(spec).text
    title = f"last: job {last.key}"
    lines = difflib.unified_diff(
        before.splitlines(), now.splitlines(), title, "now", lineterm="", n=1
    )
    click.echo("\n".join(lines) or f"# the same as the last one, job {last.key}", err=True)
