"""``roma-pipeline new-experiment``: from somebody's files to an experiment's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("new-experiment")
@click.argument("name")
@click.option(
    "--source",
    "sources",
    multiple=True,
    required=True,
    help="A file, a pattern such as 'data/*.parquet', a folder of pictures or WAV files, a data "
    "set's YAML file, or the name of a source that needs no file, such as plasticc. Repeatable.",
)
@click.option("--object", "object_", help="Column of the object's id.")
@click.option("--time", help="Column of the time, the first position axis.")
@click.option(
    "--axis", "axes", multiple=True, help="Column of a further position axis. Repeatable."
)
@click.option("--channel", "channels", multiple=True, help="Column of values. Repeatable.")
@click.option("--label", help="Column of the class.")
@click.option("--group", help="Column of what must not be split: patient, host.")
@click.option("--split", help="Column that says train or test.")
@click.option(
    "--objects",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A second table, with a row per object, that holds label, group and split.",
)
@click.option("--drop-rate", type=float, help="Share of each series' observations to leave out.")
@click.option(
    "--target",
    type=click.Choice(["local", "slurm", "kubernetes"]),
    default="local",
    show_default=True,
)
@click.option("--print", "only_print", is_flag=True, help="Print the file instead of writing it.")
@click.option("--force", is_flag=True, help="Replace an experiment of this name.")
def new_experiment(name: str, sources: tuple[str, ...], **options: Any) -> None:
    """Look at your data and write roma_pipelines/defs/NAME/defs.yaml for them.

    What is a column of what is guessed from names and types, and can be said. The split, the scale of
    positions, the transform of channels, the size of the model and the length of the trainings are
    chosen by what the data are like; each choice is printed and stands in the file with its reason.
    """
    from pydantic import ValidationError

    from roma_core.data.infer_schema import Roles
    from roma_core.settings import validation_errors
    from roma_pipelines import scaffold
    from roma_pipelines.experiment import Experiment, checked_name
    from roma_pipelines.storage import Storage, StorageError

    try:
        roles = Roles(
            object=options["object_"],
            **{
                name: options[name]
                for name in ("time", "axes", "channels", "label", "group", "split")
            },
        )
        checked_name(name)
        guess, dataset = scaffold.source_of(sources, roles, options["objects"])
        if options["drop_rate"] is not None:
            dataset["drop_rate"] = options["drop_rate"]
        made = scaffold.new_experiment(
            name, guess, Storage.open().cache, dataset, options["target"]
        )
        if options["only_print"]:
            click.echo(made.text, nl=False)
            return
        path = scaffold.write(made, options["force"])
    except ValidationError as error:
        problems = validation_errors(error, Experiment)
        raise click.ClickException("\n".join(map(str, problems))) from error
    except (ValueError, StorageError, OSError) as error:
        raise click.ClickException(str(error)) from error
    for line in made.said:
        click.echo(f"  {line}")
    for line in made.warnings:
        click.secho(f"look at this: {line}", fg="yellow")
    click.echo(f"wrote       {path}")
    click.echo(f"next        roma-pipeline demo {name}    # trains, judges and registers it, or")
    click.echo("            roma-pipeline up             # the page, where it can be materialised")
