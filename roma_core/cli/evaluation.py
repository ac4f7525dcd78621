"""``roma evaluate``: judge a classifier on the test split."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--data", type=_FOLDER, help="Data set; its test split is evaluated.")
@click.option("--weights", type=_FOLDER, help="The classifier: RUN/outputs/model.")
@click.option(
    "--autoencoder", type=_FOLDER, help="Pretrained weights, for pictures of reconstructions."
)
@click.option("--out", type=_FOLDER, help="Folder to write into.")
@click.option("--name", default="classifier", show_default=True, help="Name of the model.")
@click.option("--job", type=_FOLDER, help="Run the job planned in this folder; no other option.")
def evaluate(
    data: Path | None,
    weights: Path | None,
    autoencoder: Path | None,
    out: Path | None,
    name: str,
    job: Path | None,
) -> None:
    """Evaluate a classifier: predictions, metrics with intervals, report.html, and the package to serve."""
    from roma_core.data.columns import read_manifest
    from roma_core.evaluation.evaluation_job import run_evaluation
    from roma_core.evaluation.job_config import EvaluationJobConfig
    from roma_core.files import write_json
    from roma_core.job import JobFolder
    from roma_core.job_runner import run_in_folder

    if job is not None:
        sys.exit(run_in_folder(JobFolder(job.absolute()), run_evaluation))
    if data is None or weights is None or out is None:
        raise click.UsageError(
            "--data, --weights and --out are needed (or --job, for a planned job)"
        )
    try:
        config = EvaluationJobConfig(
            name=name,
            dataset=str(data.absolute()),
            dataset_digest=read_manifest(data).digest,
            classifier=str(weights.absolute()),
            autoencoder=None if autoencoder is None else str(autoencoder.absolute()),
        )
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    folder = JobFolder(out.absolute())
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, config.model_dump(mode="json"))
    code = run_in_folder(folder, run_evaluation)
    if code == 0:
        click.echo(f"report: {folder.outputs / 'report.html'}")
    sys.exit(code)
