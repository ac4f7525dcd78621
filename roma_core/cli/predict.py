"""``roma predict``, ``embed`` and ``explain``: apply a registered model to a file of series."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from roma_core.cli import echo_table, job_option, json_option, print_json, with_options
from roma_core.job import Attempt, JobFolder
from roma_core.run_job import Work

_model_options = with_options(
    click.option(
        "--model",
        required=True,
        help="Registered model, e.g. models:/japanese_vowels@champion, or a package folder.",
    ),
    click.option(
        "--tracking-uri",
        envvar=["MLFLOW_TRACKING_URI", "ROMA_MLFLOW_TRACKING_URI"],
        default=lambda: f"sqlite:///{os.getenv('ROMA_STORAGE_ROOT', '.roma')}/mlflow/mlflow.db",
        help="MLflow server or store of the model (default: that in ROMA_STORAGE_ROOT, or in .roma).",
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
        type=click.Choice(["train", "validation", "test", "all"]),
        help="Split to read if INPUT is a data set, or all of them.",
    ),
)
_options = with_options(
    _model_options,
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

    _check_input(input)
    if "://" in output:
        reason = f"{output} is no local path; write a file or folder here, and copy it there"
        raise click.BadParameter(reason, param_hint="'OUTPUT'")
    if Path(output).is_dir() and not output.endswith("/"):
        reason = f"{output} is a folder; name a file, or a new folder with / at its end"
        raise click.BadParameter(reason, param_hint="'OUTPUT'")
    with _fetched(model, tracking_uri, cache) as (folder, lineage):
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


def _check_input(input: str) -> None:
    if "://" not in input and not Path(input).exists():
        raise click.BadParameter(f"Path {input!r} does not exist.", param_hint="'INPUT'")


@click.command(
    epilog="Example: roma explain --model models:/waves@champion waves.parquet --html a.html"
)
@_model_options
@click.argument("input")
@click.option(
    "--series", "name", help="Its id, or its number from 0 if it has none (default: the first)."
)
@click.option(
    "--windows",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="Windows of equal width on the first axis.",
)
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page.")
@json_option
def explain(
    input: str,
    split: str,
    name: str | None,
    windows: int,
    html: Path | None,
    as_json: bool,
    **where: Any,
) -> None:
    """Print how much each window, channel and category of one series contributes to its prediction.

    The importance of a part is the output of the whole series minus that without the part: the logarithm
    of the predicted class's probability, or the targets in their units. INPUT is that of `roma predict`.
    """
    from roma_core.evaluation import explain as occlusion
    from roma_core.files import write_bytes
    from roma_core.serving.batch import read_series
    from roma_core.serving.job import load_package

    _check_input(input)
    with _fetched(**where) as (folder, lineage):
        package = load_package(folder)
        for number, row in enumerate(read_series(input, split, package)):
            if name in (None, str(number) if row.get("id") is None else row["id"]):
                break
        else:
            raise ValueError(
                f"{input} has no series {name or '0'!r}; give another --series, or --split of a data set"
            )
        found = occlusion.explain(package, row, windows)
        version = f"{lineage['model']} (version {lineage['model_version']})"
        if html is not None:
            html.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(html, occlusion.render_explanation(found, row, version).encode())
    if as_json:
        print_json({**lineage, **found.model_dump(exclude_none=True)})
        return
    click.echo(f"series {found.id or number}: {found.prediction}, by {version}")
    rows = [("PART", "OBSERVATIONS", *found.outputs)]
    for part in filter(lambda part: part.n_observations, found.parts):
        numbers = (f"{part.importance[output]:+.4g}" for output in found.outputs)
        rows.append((part.text, str(part.n_observations), *numbers))
    echo_table(rows)


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
