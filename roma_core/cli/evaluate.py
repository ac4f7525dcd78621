"""``roma evaluate``: a model on the test split; ``roma drift``: recent series and training data."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import click

from roma_core.cli import job_option, json_option, print_json
from roma_core.files import read_json, write_json
from roma_core.job import Attempt, JobFolder
from roma_core.run_job import Work, run_in_folder

_FOLDER = click.Path(file_okay=False, path_type=Path)


def _run(folder: JobFolder, attempt: Attempt) -> Work:
    from roma_core.evaluation.job import run_evaluation  # torch; inside the attempt

    return run_evaluation(folder, attempt)


@click.command(
    epilog="Example: roma evaluate --data data/waves/3f2a9c --weights runs/a/outputs/model --run-dir runs/b"
)
@click.option("--data", type=_FOLDER, help="Data set; its test split is evaluated.")
@click.option("--weights", type=_FOLDER, help="Classifier or regressor: RUN/outputs/model.")
@click.option(
    "--autoencoder",
    type=_FOLDER,
    help="Pretrained weights. With --weights: examples of their reconstructions in the report. "
    "Without: metrics of their reconstructions.",
)
@click.option(
    "--n-observed",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Also evaluate reconstructions with all but N observations of each series hidden. "
    "Repeatable.",
)
@click.option(
    "--baselines/--no-baselines",
    default=True,
    show_default=True,
    help="Train and evaluate other methods on the same series, too.",
)
@click.option("--run-dir", type=_FOLDER, help="Folder to write into.")
@click.option("--name", help="Name of the model in report and package (default: the data set's).")
@job_option(_run)
@json_option
def evaluate(
    data: Path | None,
    weights: Path | None,
    autoencoder: Path | None,
    n_observed: tuple[int, ...],
    baselines: bool,
    run_dir: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Evaluate a model and write predictions, metrics, report.html and the package to serve.

    Without --weights the reconstructions of --autoencoder are evaluated: hidden observations of test
    series, in metrics with intervals and a report.html.
    """
    from roma_core.data.manifest import read_manifest
    from roma_core.evaluation.config import EvaluationJobConfig
    from roma_core.evaluation.leakage import training_datasets

    if data is None or run_dir is None or (weights is None and autoencoder is None):
        raise click.UsageError(
            "--data, --run-dir and one of --weights and --autoencoder are required (or --job, for a "
            "planned job)"
        )
    if n_observed and weights is not None:
        raise click.UsageError(
            "--n-observed is for reconstructions; leave out --weights or --n-observed"
        )
    manifest = read_manifest(data)
    trained_on: dict[str, None] = {}
    for weights_of_run in (one for one in (weights, autoencoder) if one is not None):
        found = training_datasets(weights_of_run)
        if not found:
            click.echo(
                f"{weights_of_run} is not the outputs/model of a run: its training data are "
                f"unknown, and leakage of test series is not checked",
                err=True,
            )
        trained_on |= dict.fromkeys(map(str, found))
    config = EvaluationJobConfig(
        name=name or manifest.name,
        dataset=str(data.absolute()),
        dataset_digest=manifest.digest,
        classifier=None if weights is None else str(weights.absolute()),
        autoencoder=None if autoencoder is None else str(autoencoder.absolute()),
        n_observed=n_observed,
        measure_baselines=baselines,
        trained_on=tuple(trained_on),
    )
    folder = JobFolder(run_dir.absolute())
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, config.model_dump(mode="json"))
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        code = run_in_folder(folder, _run)
    if code == 0 and as_json:
        metrics = read_json(folder.outputs / "metrics.json")
        print_json({"report": str(folder.outputs / "report.html"), "metrics": metrics})
    elif code == 0:
        click.echo(f"report: {folder.outputs / 'report.html'}")
    sys.exit(code)


def _compare(folder: JobFolder, attempt: Attempt) -> Work:
    from roma_core.evaluation.drift_job import run_drift_job

    return run_drift_job(folder, attempt)


@click.command(epilog="Example: roma drift --job .roma/jobs/0123456789abcdef0123")
@job_option(_compare)
def drift() -> None:
    """Compare recent series with the training data of a model: the job of the asset recent_inputs."""
    raise click.UsageError("--job is required; Dagster's asset recent_inputs plans such jobs")
