"""``roma predict`` and ``roma embed``: apply a registered model to a file of series."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from roma_core.cli import errors_as_messages, with_options

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
    click.argument("input", type=click.Path(exists=True, path_type=Path)),
    click.argument("output", type=click.Path(dir_okay=False, path_type=Path)),
)


@click.command()
@_options
def predict(**options: Any) -> None:
    """Classify the series of INPUT and write one row each to OUTPUT (Parquet).

    INPUT is a data-set folder, a Parquet file with one row per series (a list column per position
    axis and per channel, optionally `id`), such as `roma data export` writes, or a .jsonl file of
    {"positions": {…}, "values": {…}, "units": {…}}. To resume an interrupted call, repeat the
    command.
    """
    _apply("classifier", **options)


@click.command()
@_options
def embed(**options: Any) -> None:
    """Write the encoder features of the series of INPUT to OUTPUT (Parquet).

    MODEL is a registered encoder, e.g. models:/japanese_vowels_encoder@champion. INPUT and the other
    options are those of `roma predict`.
    """
    _apply("encoder", **options)


def _apply(
    kind: str,
    model: str,
    tracking_uri: str,
    cache: Path | None,
    split: str,
    input: Path,
    output: Path,
) -> None:
    from tqdm import tqdm

    from roma_core.serving.batch import assumed_units, count_series, score_file

    with errors_as_messages(), _load(model, tracking_uri, cache) as (package, lineage):
        found = "encoder" if package.golden_field == "features" else "classifier"
        if found != kind:
            other = "embed" if found == "encoder" else "predict"
            raise ValueError(f"{model} is of kind {found}; use `roma {other}`")
        if assumed := assumed_units(input, package):
            units = ", ".join(f"{name} in {unit}" for name, unit in assumed.items())
            click.echo(f"{input} does not state its units; assuming {units}", err=True)
        total = count_series(input, split)
        with tqdm(total=total, desc=kind, unit=" series", disable=None) as bar:
            inputs = input, split, output
            n = score_file(package, lineage, *inputs, progress=lambda n: bar.update(n - bar.n))
    done = "classified" if kind == "classifier" else "embedded"
    click.echo(f"{n} series {done} by {model} (version {lineage['model_version']}): {output}")


@contextmanager
def _load(
    model: str, tracking_uri: str, cache: Path | None
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The verified package of a registered model or in a folder, and its lineage columns."""
    from roma_core.files import sha256_of
    from roma_core.serving import pyfunc_model, registry_client

    if not model.startswith("models:/"):
        package: Any = pyfunc_model.open_package(Path(model))
        package.module = pyfunc_model
        digest = sha256_of(Path(model) / "MANIFEST.json")
        yield package, {"model": model, "model_version": "-", "model_sha256": digest}
        return
    client = registry_client.connect(tracking_uri)
    version = registry_client.resolve(client, model)
    lineage = {"model": version.name, "model_version": version.version}
    lineage["model_sha256"] = version.manifest_sha256 or ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry_client.fetch(client, version, cache or Path(scratch))
        yield registry_client.load(folder), lineage
