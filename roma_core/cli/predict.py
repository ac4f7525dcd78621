"""``roma predict`` and ``roma embed``: apply a registered model to a file of series."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from roma_core.cli import errors_as_messages, job_option, with_options
from roma_core.job import Attempt, JobFolder
from roma_core.run_job import Work

_options = with_options(
    click.option(
        "--model",
        required=True,
        help="Registered model, e.g. models:/japanese_vowels@champion, or a package folder.",
    ),
    click.option(
        "--tracking-uri",
        envvar=["MLFLOW_TRACKING_URI", "ROMA_MLFLOW_TRACKING_URI"],
        default="sqlite:///.roma/mlflow/mlflow.db",
        show_default=True,
        help="MLflow server or store of the model.",
    ),
    click.option(
        "--cache",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for downloaded models (default: a temporary folder).",
    ),
    click.option(
        "--split",
        default="test",
        show_default=True,
        type=click.Choice(["train", "validation", "test"]),
        help="Split to read if INPUT is a data set.",
    ),
    click.option(
        "--processes",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Processes on this computer, one for each GPU or for some cores.",
    ),
    click.argument("input"),
    click.argument("output"),
)


def _run(folder: JobFolder, attempt: Attempt) -> Work:
    from roma_core.serving.job import run_prediction_job

    return run_prediction_job(folder, attempt)


@click.command(
    epilog="Example: roma predict --model models:/waves@champion waves.parquet predictions.parquet"
)
@job_option(_run)
@_options
def predict(**options: Any) -> None:
    """Predict classes, targets or queried values of the series of INPUT; write a row each to OUTPUT.

    INPUT is a data-set folder, a Parquet file with one row per series (a list column per position
    axis and per channel, optionally `id`), such as `roma data export` writes, a folder or bucket
    (s3://…) of such files, or a .jsonl file of {"positions": {…}, "values": {…}, "units": {…}}.
    For an autoencoder every series has `queries`: in Parquet a column of structs with a list per
    axis. OUTPUT is one Parquet file, or with a / at its end a folder of files. To resume an interrupted call,
    repeat the command. On a cluster: roma-pipeline launch --target slurm -m roma_core.cli predict …
    """
    _apply(("classifier", "regressor", "autoencoder"), **options)


@click.command(
    epilog="Example: roma embed --model models:/waves_encoder@champion waves.parquet features.parquet"
)
@_options
def embed(**options: Any) -> None:
    """Write the encoder features of the series of INPUT to OUTPUT (Parquet).

    MODEL is a registered encoder, e.g. models:/japanese_vowels_encoder@champion. INPUT and the other
    options are those of `roma predict`.
    """
    _apply(("encoder",), **options)


def _apply(
    kinds: tuple[str, ...],
    model: str,
    tracking_uri: str,
    cache: Path | None,
    split: str,
    processes: int,
    input: str,
    output: str,
) -> None:
    from tqdm import tqdm

    from roma_core.serving.batch import assumed_units
    from roma_core.serving.job import RANK, Predictions, load_package

    if "://" not in input and not Path(input).exists():
        raise click.BadParameter(f"Path {input!r} does not exist.", param_hint="'INPUT'")
    if "://" in output:
        reason = f"{output} is no local path; write a file or folder here, and copy it there"
        raise click.BadParameter(reason, param_hint="'OUTPUT'")
    if Path(output).is_dir() and not output.endswith("/"):
        reason = f"{output} is a folder; name a file, or a new folder with / at its end"
        raise click.BadParameter(reason, param_hint="'OUTPUT'")
    with errors_as_messages(), _fetched(model, tracking_uri, cache) as (folder, lineage):
        predictions = Predictions(input, split, lineage, Path(output), not output.endswith("/"))
        n = sum(predictions.counts.values())
        with predictions.others(folder, processes) as run:  # they load the model meanwhile
            package = load_package(folder)
            of_features = package.golden_field == "features"
            # the code of the model may be older than its kind
            kind = getattr(package, "kind", "encoder" if of_features else "classifier")
            if kind not in kinds:
                command = "embed" if kind == "encoder" else "predict"
                expected = " or ".join(kinds)
                raise ValueError(
                    f"{model} is of kind {kind}, expected {expected}; use `roma {command}`"
                )
            if (assumed := assumed_units(input, package)) and RANK == 0:
                units = ", ".join(f"{name} in {unit}" for name, unit in assumed.items())
                click.echo(f"{input} does not state its units; assuming {units}", err=True)
            with tqdm(total=n, desc=kind, unit=" series", disable=RANK > 0 or None) as bar:
                run(package, lambda n: bar.update(n - bar.n))
    if RANK == 0:
        done = {"classifier": "classified", "encoder": "embedded"}.get(kind, "predicted")
        click.echo(f"{n} series {done} by {model} (version {lineage['model_version']}): {output}")


@contextmanager
def _fetched(
    model: str, tracking_uri: str, cache: Path | None
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of a registered model, verified, or of a package, and its lineage columns."""
    from roma_core.files import sha256_of
    from roma_core.serving import registry_client
    from roma_core.serving.pyfunc_model import verify_files

    if not model.startswith("models:/"):
        verify_files(Path(model))
        digest = sha256_of(Path(model) / "MANIFEST.json")
        yield Path(model), {"model": model, "model_version": "-", "model_sha256": digest}
        return
    client = registry_client.connect(tracking_uri)
    version = registry_client.resolve(client, model)
    lineage = {"model": version.name, "model_version": version.version}
    lineage["model_sha256"] = version.manifest_sha256 or ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry_client.fetch(client, version, cache or Path(scratch))
        yield folder, lineage
