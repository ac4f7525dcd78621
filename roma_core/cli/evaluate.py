"""``roma evaluate``: judge a classifier, or reconstructions, on the test split."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from roma_core.evaluation.config import EvaluationJobConfig, ReconstructionJobConfig
    from roma_core.job import Attempt, JobFolder
    from roma_core.run_job import Work

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option("--data", type=_FOLDER, help="Data set; its test split is evaluated.")
@click.option("--weights", type=_FOLDER, help="The classifier: RUN/outputs/model.")
@click.option(
    "--autoencoder",
    type=_FOLDER,
    help="Pretrained weights, for pictures of reconstructions; without --weights they are judged.",
)
@click.option(
    "--seen",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Judge reconstructions also with all but N observations of each series hidden. Repeatable.",
)
@click.option("--out", type=_FOLDER, help="Folder to write into.")
@click.option(
    "--name", help="Of the model, for the report and the package; the data set's by default."
)
@click.option("--job", type=_FOLDER, help="Run the job planned in this folder; no other option.")
def evaluate(
    data: Path | None,
    weights: Path | None,
    autoencoder: Path | None,
    seen: tuple[int, ...],
    out: Path | None,
    name: str | None,
    job: Path | None,
) -> None:
    """Evaluate a classifier: predictions, metrics with intervals, report.html, and the package to serve.

    Without --weights the reconstructions of --autoencoder are judged: hidden observations of test
    series, in metrics with intervals and a report.html.
    """
    from pydantic import ValidationError

    from roma_core.files import write_json
    from roma_core.job import JobFolder
    from roma_core.run_job import run_in_folder

    if job is not None:
        sys.exit(run_in_folder(JobFolder(job.absolute()), _judge))
    if data is None or out is None or (weights is None and autoencoder is None):
        raise click.UsageError(
            "--data, --out and one of --weights and --autoencoder are needed (or --job, for a planned job)"
        )
    if seen and weights is not None:
        raise click.UsageError("--seen is for reconstructions; leave --weights out, or --seen")
    try:
        config = _config(data, weights, autoencoder, seen, name)
    except (ValueError, ValidationError, OSError) as error:
        raise click.ClickException(str(error)) from error
    folder = JobFolder(out.absolute())
    folder.path.mkdir(parents=True, exist_ok=True)
    write_json(folder.config, config.model_dump(mode="json"))
    code = run_in_folder(folder, _judge)
    if code == 0:
        click.echo(f"report: {folder.outputs / 'report.html'}")
    sys.exit(code)


def _config(
    data: Path,
    weights: Path | None,
    autoencoder: Path | None,
    seen: tuple[int, ...],
    name: str | None,
) -> EvaluationJobConfig | ReconstructionJobConfig:
    """What a job by hand has for its ``config.json``."""
    from roma_core.data.manifest import read_manifest
    from roma_core.evaluation.config import EvaluationJobConfig, ReconstructionJobConfig

    manifest = read_manifest(data)
    known: dict[str, Any] = {
        "name": name or manifest.name,
        "dataset": str(data.absolute()),
        "dataset_digest": manifest.digest,
        "trained_on": _trained_on([one for one in (weights, autoencoder) if one is not None]),
    }
    encoder = None if autoencoder is None else str(autoencoder.absolute())
    if weights is None:
        return ReconstructionJobConfig(**known, autoencoder=encoder, seen=seen)
    return EvaluationJobConfig(
        **known,
        classifier=str(weights.absolute()),
        autoencoder=encoder,
    )


def _trained_on(folders: list[Path]) -> tuple[str, ...]:
    """The data that these weights have seen, as far as the folders of their runs say."""
    from roma_core.evaluation.leakage import data_behind

    found: dict[str, None] = {}
    for folder in folders:
        behind = data_behind(folder)
        if not behind:
            click.echo(
                f"{folder} is not the outputs/model of a run, so nothing says whether it was trained on "
                f"these test series",
                err=True,
            )
        found |= dict.fromkeys(str(path) for path in behind)
    return tuple(found)


def _judge(folder: JobFolder, attempt: Attempt) -> Work:
    """Run the evaluation that ``config.json`` describes, whichever it is."""
    from roma_core.files import read_json

    if read_json(folder.config).get("task") == "reconstruction":
        from roma_core.evaluation.reconstruction_job import run_reconstruction

        return run_reconstruction(folder, attempt)
    from roma_core.evaluation.job import run_evaluation

    return run_evaluation(folder, attempt)
