"""``roma-pipeline plan``: prints the jobs of an experiment without submitting them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roma_core.cli import json_option, print_json
from roma_core.data.store import StoredDataset
from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.defaults import primary_metric
from roma_pipelines.cli import TARGETS, complete_experiment, complete_profile
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.launching.launcher import PLANNED_FOLDER, Launcher, Rejected, size_of
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.launching.targets import job_spec, launcher_for, roma_command
from roma_pipelines.storage import Storage

if TYPE_CHECKING:  # it imports Dagster, which takes seconds
    from roma_pipelines.experiment import Experiment

_COMMANDS = {
    "dataset": "data build",
    "pretrained_encoder": "pretrain",
    "finetuned_classifier": "finetune",
    "finetuned_regressor": "finetune",
    "evaluation_report": "evaluate",
    "batch_predictions": "predict",
}
_NO_KEY = "0" * 20
_PLACEHOLDERS = {
    "JOB_FOLDER": "<storage root>/jobs/<key>, where config.json holds the training's settings",
    _NO_KEY[:12]: "the beginning of the job's key",
    "FREE_PORT": "chosen at the start",
}


@click.command(epilog="Example: roma-pipeline plan japanese_vowels --target slurm --check")
@click.argument("experiment", shell_complete=complete_experiment)
@click.option("--target", type=TARGETS, help="Overrides the target of the experiment.")
@click.option("--profile", shell_complete=complete_profile, help="Overrides the cluster profile.")
@click.option(
    "--asset",
    type=click.Choice(list(_COMMANDS)),
    help="Asset whose job to print.  [default: that of the first training]",
)
@click.option("--check", is_flag=True, help="Also run the preflight checks of all jobs.")
@json_option
def plan(
    experiment: str,
    target: str | None,
    profile: str | None,
    asset: str | None,
    check: bool,
    as_json: bool,
) -> None:
    """Print the exact script of an EXPERIMENT's job, how it differs from the last one, and where all
    jobs of the experiment run.

    EXPERIMENT is a name or the path of a defs.yaml. Nothing is submitted. --check prints every
    reason for which a target would reject a job; the exit code is 1 if there is one.
    """
    from roma_pipelines.definitions import load_experiments
    from roma_pipelines.experiment import all_experiments, load_experiment
    from roma_pipelines.run_config import ENCODER, STAGES

    if reason := load_experiments(all_experiments())[1].get(experiment):
        raise ValueError(reason)
    found = load_experiment(experiment)
    if found.pretrained_from is not None and asset == ENCODER:
        raise ValueError(
            f"{found.name} finetunes the encoder of {found.pretrained_from}; plan that experiment, "
            f"or give --asset {found.training_names[-1]}"
        )
    names = [name for name in found.own_assets if name in _COMMANDS]
    asset = asset or next(name for name in names if name in found.training_names)
    if found.resources.dataset is None:
        if asset == "dataset":
            raise ValueError(
                f"{found.name} builds its data set in Dagster's own process; add resources.dataset to make "
                f"it a job"
            )
        names.remove("dataset")
    if asset not in names:
        why = "pretraining is null" if asset == ENCODER else f"its task is {found.task}"
        others = f"give another --asset, one of {', '.join(names)}"
        raise ValueError(f"{found.name} has no {asset}, {why}; {others}")
    for stage in filter(None, (found.pretraining, found.finetuning)):
        TrainerConfig(**stage.trainer)  # raises if a setting of it is wrong
    try:
        resources = found.resources.at(target, profile)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found, storage = found.model_copy(update={"resources": resources}), Storage.open()
    launchers = {}
    for name in names:
        place = resources.of(STAGES[name])
        launchers[name] = launcher_for(place.target, place.profile, storage)
    launcher = launchers[asset]
    text = launcher.plan(_spec(found, asset, _NO_KEY, PLANNED_FOLDER)).text
    if not as_json:
        click.echo(text, nl=False)
    for word, meaning in _PLACEHOLDERS.items():
        if word in text:
            click.echo(f"# {word} stands for: {meaning}", err=True)
    _show_difference(found, asset, launcher, storage)
    if found.resources.dataset is None:
        click.echo("# dataset: in Dagster's own process", err=True)
    reasons: dict[str, list[str]] = {}
    planned: dict[str, dict[str, str | None]] = {}
    folder = JobFolder((storage.jobs / _NO_KEY).resolve())
    for name, one in launchers.items():
        profile = None if one.profile is None else one.profile.name
        spec = _spec(found, name, _NO_KEY, folder)
        planned[name] = {"target": one.backend, "profile": profile, "size": size_of(spec)}
        where = " ".join(filter(None, (one.backend, profile)))
        click.echo(f"# {name}: {where}, {size_of(spec)}", err=True)
        for reason in one.preflight(one.plan(spec, folder)) if check else ():
            reasons.setdefault(reason, []).append(name)
    if as_json:
        print_json({"asset": asset, "script": text, "jobs": planned, "rejected": reasons})
    if reasons:
        raise Rejected([f"{text} ({', '.join(names)})" for text, names in reasons.items()])
    if check:
        message = f"the targets would run {', '.join(names)}"
        if "kubernetes" in (one.backend for one in launchers.values()):
            message = "Kubernetes accepts its jobs in a dry run, which makes no pods: a wrong "
            message += "image or volume, PodSecurity, quotas of pods and missing nodes show later"
        click.echo(f"# {message}", err=True)


def _spec(experiment: Experiment, asset: str, key: str, folder: JobFolder) -> JobSpec:
    from roma_pipelines.run_config import STAGES

    resources, command = experiment.resources.of(STAGES[asset]), _COMMANDS[asset]
    return job_spec(resources.target, resources, key, roma_command(command, folder.path), "")


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
