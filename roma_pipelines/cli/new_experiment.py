"""``roma-pipeline new-experiment``: write the ``defs.yaml`` of an experiment for given data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from roma_pipelines.cli import TARGETS


@click.command(
    "new-experiment",
    epilog="Example: roma-pipeline new-experiment waves --source 'data/*.parquet' --label kind",
)
@click.argument("name")
@click.argument("more", nargs=-1, metavar="[FILE]...")
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    help="File, pattern such as data/*.parquet, folder of tables, images or WAV files, YAML file of a "
    "data set, or name of a source that needs no file, such as plasticc. Repeatable.",
)
@click.option("--object", "object_", help="Column of the object id.")
@click.option("--time", help="Column of the time, the first position axis.")
@click.option("--axis", "axes", multiple=True, help="Column of another position axis. Repeatable.")
@click.option("--channel", "channels", multiple=True, help="Column of values. Repeatable.")
@click.option("--quantity", help="Column that names the quantity of each row's one value.")
@click.option(
    "--covariate",
    "covariates",
    multiple=True,
    help="Column of a number or category of the object that is known at prediction time. Repeatable.",
)
@click.option(
    "--missing-value",
    "missing_values",
    multiple=True,
    help="Number or word that stands for a missing number, such as -9999. Repeatable.",
)
@click.option("--label", help="Column of the class.")
@click.option(
    "--target-column",
    "targets",
    multiple=True,
    help="Column of numbers to predict, of every object or of every observation: a regression. Repeatable.",
)
@click.option("--group", help="Column of groups that must not be split, such as patient or host.")
@click.option("--split", help="Column with train, validation and test.")
@click.option(
    "--objects",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A second table, one row per object, with label, targets, group, split and covariates.",
)
@click.option("--drop-rate", type=float, help="Fraction of each series' observations to drop.")
@click.option(
    "--target", type=TARGETS, default="local", show_default=True, help="Target of the trainings."
)
@click.option("--print", "only_print", is_flag=True, help="Print the file instead of writing it.")
@click.option("--force", is_flag=True, help="Replace an existing experiment of this name.")
def new_experiment(
    name: str, more: tuple[str, ...], sources: tuple[str, ...], **options: Any
) -> None:
    """Read your data and write defs/NAME/defs.yaml in the project (ROMA_PROJECT, the working directory).

    FILEs are more sources, as from --source data/*.csv without quotes. Columns are recognised by
    name, type and content, unless options name them. Splits, position scales,
    channel transforms, model size and training length are chosen from the data; each choice is
    printed and stands in the file with its reason.
    """
    from pydantic import ValidationError

    from roma_core.data.infer_schema import ColumnRoles
    from roma_core.settings import validation_errors
    from roma_pipelines import scaffold
    from roma_pipelines.experiment import Experiment, checked_name
    from roma_pipelines.storage import Storage

    roles = {key: options[key] for key in ("time", "axes", "channels", "quantity", "covariates")}
    roles |= {key: options[key] for key in ("label", "targets", "group", "split")}
    roles["missing_values"] = tuple(map(_number_or_word, options["missing_values"]))
    try:
        checked_name(name)
        experiment = scaffold.new_experiment(
            name,
            (*sources, *more),
            ColumnRoles(object=options["object_"], **roles),
            cache=Storage.open().cache,
            **{key: options[key] for key in ("objects", "drop_rate", "target")},
        )
        if options["only_print"]:
            click.echo(experiment.text, nl=False)
            return
        experiment.write(options["force"])
    except ValidationError as error:
        problems = validation_errors(error, Experiment)
        raise click.ClickException("\n".join(map(str, problems))) from error
    for line in experiment.notes:
        click.echo(f"  {line}")
    for line in experiment.warnings:
        click.secho(f"WARNING: {line}", fg="yellow")
    click.echo(f"wrote       {experiment.path}")
    click.echo(f"next        roma-pipeline demo {name}    # trains, evaluates and registers, or")
    click.echo("            roma-pipeline up             # materialise it in the Dagster UI")


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
