"""``roma-pipeline lineage`` and ``replay``: where a version comes from, and how to make it again."""

from __future__ import annotations

import shutil
from pathlib import Path

import click


@click.command()
@click.argument("what")
def lineage(what: str) -> None:
    """Say where a version comes from, or what came of something.

    WHAT is NAME@ALIAS or NAME/VERSION; or a job key, run id, data-set version, commit or package
    (or six characters of its beginning), which lists the versions that come from it.
    """
    from roma_pipelines.cli.promotion import registry
    from roma_pipelines.registry.lineage import lineage_of, versions_from

    with registry() as (client, _):
        if "@" in what or "/" in what:
            found = lineage_of(client, what)
            click.echo(f"{found.name} version {found.version}")
            for name, value in found.facts.items():
                click.echo(f"  {name:<16} {value}")
            if found.is_dirty:
                click.echo("  the commit had changes beside it that nobody recorded")
            width = shutil.get_terminal_size().columns
            for line in found.decisions:
                click.echo(click.wrap_text(line, width, "  ", "    "))
            return
        versions = versions_from(client, what)
        if not versions:
            raise click.ClickException(f"no registered version comes from {what!r}")
        for name, version, role in versions:
            click.echo(f"{name} version {version} ({role})")


@click.command()
@click.argument("name")
@click.argument("version")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the job folders go; the default is replay/NAME-VERSION.",
)
def replay(name: str, version: str, out: Path | None) -> None:
    """Plan the training of VERSION of model NAME again: job folders and the commands to run them.

    The configurations are those that were recorded; what is different here is said. Nothing is run.
    """
    from roma_pipelines.cli.promotion import registry
    from roma_pipelines.registry.replay import plan_replay
    from roma_pipelines.storage import Storage

    with registry() as (client, _):
        out = out or Path("replay") / f"{name}-{version}"
        plan = plan_replay(client, name, version, out, Storage.open().datasets)
        for line in plan.differences:
            click.echo(f"# {line}")
        if not plan.differences:
            click.echo("# same code, same packages: the weights will be the same, bit for bit")
        click.echo("\n".join(plan.commands))
