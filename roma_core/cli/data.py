"""``roma data``: build a data set, look at one, and check one."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def data() -> None:
    """Build, inspect and validate data sets."""


@data.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of data sets; the set goes to OUT/<name>/<version>/.",
)
@click.option(
    "--cache",
    default=Path(".roma/cache"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for what the source fetches.",
)
def build(config: Path, out: Path, cache: Path) -> None:
    """Build the data set that CONFIG (YAML) describes and print its folder.

    Equal input gives an equal version; one that is there already is verified and used.
    """
    from pydantic import ValidationError

    from roma_core.data.building import build_dataset
    from roma_core.data.config import DatasetConfig
    from roma_core.data.errors import DataError

    try:
        path = build_dataset(DatasetConfig.from_yaml(config), out, cache)
    except (DataError, ValidationError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(path)


@data.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
def inspect(path: Path) -> None:
    """Print what the data set in PATH looks like: counts, lengths, classes, gaps, values."""
    from roma_core.data.errors import DataError
    from roma_core.data.profile import as_markdown, profile_of
    from roma_core.data.store import StoredDataset

    try:
        profile = profile_of(StoredDataset(path))
    except DataError as error:
        raise click.ClickException(str(error)) from error
    click.echo(as_markdown(profile), nl=False)


@data.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
def validate(path: Path) -> None:
    """Check the data set in PATH; exit with 1 and a list if anything is wrong with it."""
    from roma_core.data.checks import problems

    found = problems(path)
    for problem in found:
        click.echo(problem)
    if found:
        click.echo(f"{path}: {len(found)} problem{'s' if len(found) > 1 else ''}", err=True)
        sys.exit(1)
    click.echo(f"{path}: sound")
