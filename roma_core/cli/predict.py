"""``roma predict`` and ``roma embed``: a registered model, applied to a file of series."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


def _options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(
        (
            click.option(
                "--model",
                required=True,
                help="Registered model, e.g. models:/japanese_vowels@champion, or a package folder.",
            ),
            click.option(
                "--tracking-uri",
                envvar="MLFLOW_TRACKING_URI",
                default="sqlite:///.roma/mlflow/mlflow.db",
                show_default=True,
                help="MLflow server or store that knows the model.",
            ),
            click.option(
                "--cache",
                type=click.Path(file_okay=False, path_type=Path),
                help="Keep downloaded models in this folder; else they are removed afterwards.",
            ),
            click.option(
                "--split",
                default="test",
                show_default=True,
                type=click.Choice(["train", "validation", "test"]),
                help="Series to take if INPUT is a data set.",
            ),
            click.argument("input", type=click.Path(exists=True, path_type=Path)),
            click.argument("output", type=click.Path(dir_okay=False, path_type=Path)),
        )
    ):
        command = option(command)
    return command


@click.command()
@_options
def predict(
    model: str, tracking_uri: str, cache: Path | None, split: str, input: Path, output: Path
) -> None:
    """Classify the series of INPUT and write one row each to OUTPUT (Parquet).

    INPUT is a data-set folder, a Parquet file with one row per series (a list column per position
    axis and per channel, optionally `id`), such as `roma data export` writes, or a .jsonl file of
    {"positions": {…}, "values": {…}, "units": {…}}. An interrupted call is continued by the same
    command.
    """
    _apply("classifier", model, tracking_uri, cache, split, input, output)


@click.command()
@_options
def embed(
    model: str, tracking_uri: str, cache: Path | None, split: str, input: Path, output: Path
) -> None:
    """Write the features of the series of INPUT to OUTPUT (Parquet).

    MODEL is a registered encoder, e.g. models:/japanese_vowels_encoder@champion. INPUT and the rest
    are as for `roma predict`.
    """
    _apply("encoder", model, tracking_uri, cache, split, input, output)


def _apply(
    kind: str,
    model: str,
    tracking_uri: str,
    cache: Path | None,
    split: str,
    source: Path,
    output: Path,
) -> None:
    from tqdm import tqdm

    from roma_core.serving.batch import assumed_units, count_series, score_file
    from roma_core.serving.registry_client import FetchError

    try:
        with _opened(model, tracking_uri, cache) as (package, lineage):
            found = "encoder" if package.golden_field == "features" else "classifier"
            if found != kind:
                other = "embed" if found == "encoder" else "predict"
                raise ValueError(f"{model} is of kind {found}; use `roma {other}`")
            if assumed := assumed_units(source, package):
                units = ", ".join(f"{name} in {unit}" for name, unit in assumed.items())
                click.echo(f"{source} does not say its units; taken to be {units}", err=True)
            total = count_series(source, split)
            with tqdm(total=total, desc=kind, unit=" series", disable=None) as bar:
                n = score_file(
                    package,
                    lineage,
                    source,
                    split,
                    output,
                    progress=lambda done: bar.update(done - bar.n),
                )
    except (FetchError, RuntimeError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    done = "classified" if kind == "classifier" else "embedded"
    click.echo(f"{n} series {done} by {model} (version {lineage['model_version']}): {output}")


@contextmanager
def _opened(
    model: str, tracking_uri: str, cache: Path | None
) -> Iterator[tuple[Any, dict[str, str]]]:
    """The verified package behind a name or in a folder, and its lineage columns."""
    from roma_core.files import sha256_of
    from roma_core.serving import registry_client as fetching

    if not model.startswith("models:/"):
        from roma_core.serving import pyfunc_model as logged_model

        package: Any = logged_model.open_package(Path(model))
        package.module = logged_model
        digest = sha256_of(Path(model) / "MANIFEST.json")
        yield package, {"model": model, "model_version": "-", "model_sha256": digest}
        return
    client = fetching.connect(tracking_uri)
    version = fetching.resolve(client, model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = fetching.fetch(client, version, cache or Path(scratch))
        yield (
            fetching.load(folder),
            {
                "model": version.name,
                "model_version": version.version,
                "model_sha256": version.manifest_sha256 or "",
            },
        )
