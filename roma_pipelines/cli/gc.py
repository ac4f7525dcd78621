"""``roma-pipeline gc``: remove what nothing needs any more."""

from __future__ import annotations

import click

from roma_pipelines.cli.opening import opened


@click.command()
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Younger than this stays.",
)
@click.option(
    "--keep-versions",
    type=click.IntRange(min=2),
    default=3,
    show_default=True,
    help="Newest versions of every data set that stay in any case.",
)
@click.option("--yes", is_flag=True, help="Remove it; without, it is only listed.")
def gc(days: float, keep_versions: int, yes: bool) -> None:
    """List, or with --yes remove, what nothing needs: jobs, checkpoints, data sets, MLflow runs.

    Jobs that ended, checkpoints of completed jobs, old versions of data sets, MLflow runs that were
    deleted on MLflow's page, and cached models that have no alias. What a registered version or the
    newest materialisation of an asset was made of stays, whatever its age, and so does what runs and
    what an experiment predicts.
    """
    from roma_pipelines.operations.retention import operations_lock, removals

    with opened() as (storage, instance, client), operations_lock(storage):
        found = removals(storage, instance, client, days=days, keep_versions=keep_versions)
        total = 0
        for removal in found:
            if yes and not removal.remove():
                click.echo(f"kept          it is needed again: {removal.what}")
                continue
            total += removal.n_bytes
            verb = "removed" if yes else "would remove"
            click.echo(f"{verb:<13} {removal.n_bytes:>14,} bytes  {removal.what}")
        click.echo(f"{'removed' if yes else 'would remove'} {total:,} bytes in all")
        if found and not yes:
            click.echo("--yes removes it")
