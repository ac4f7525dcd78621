"""``roma-pipeline health``, ``gc``, ``backup`` and ``restore``: operating an installation."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from roma_core.cli import errors_as_messages


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of results.")
@click.option("--strict", is_flag=True, help="A warning counts as an error.")
def health(as_json: bool, strict: bool) -> None:
    """Check all components; exit 1 on any error."""
    from roma_core.cli.doctor import report
    from roma_pipelines.operations.health import checks

    sys.exit(report(checks(), as_json=as_json, strict=strict))


@click.command()
@click.option(
    "--days",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Keep everything newer than this many days.",
)
@click.option(
    "--keep-versions",
    type=click.IntRange(min=2),
    default=3,
    show_default=True,
    help="Newest versions to keep of every data set.",
)
@click.option("--yes", is_flag=True, help="Remove; the default is to list only.")
def gc(days: float, keep_versions: int, yes: bool) -> None:
    """List, or with --yes remove, what is not needed: jobs, checkpoints, data sets, MLflow runs.

    Removed are ended jobs, checkpoints of completed jobs, old versions of data sets, MLflow runs
    that were deleted on the MLflow page, and cached models without an alias. Kept at any age is what
    a registered version or the newest materialisation of an asset was made of, what is running, and
    the inputs of predictions.
    """
    from roma_core.settings import without_credentials
    from roma_pipelines.operations.retention import operations_lock, removals
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.storage import Storage, prepare_instance

    with errors_as_messages():
        storage = Storage.open()
        prepare_instance(storage)
        client = connect(MlflowSettings(), storage.mlflow)
    import dagster as dg
    from mlflow.exceptions import MlflowException  # after connect(), which sets telemetry

    verb, total = "removed" if yes else "would remove", 0
    try:
        with errors_as_messages(), operations_lock(storage), dg.DagsterInstance.get() as instance:
            found = removals(storage, instance, client, days=days, keep_versions=keep_versions)
            for removal in found:
                if yes and not removal.remove():
                    click.echo(f"kept          needed again: {removal.what}")
                    continue
                total += removal.n_bytes
                click.echo(f"{verb:<13} {removal.n_bytes:>14,} bytes  {removal.what}")
    except MlflowException as error:
        raise click.ClickException(without_credentials(str(error))) from error
    click.echo(f"{verb} {total:,} bytes in total")
    if found and not yes:
        click.echo("--yes removes it")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--with-datasets", is_flag=True, help="Include data sets; they can be built again.")
def backup(file: Path, with_datasets: bool) -> None:
    """Write the state to FILE, a tar: databases, the registry's artifacts, the record of every job.

    Everything may run meanwhile. The file is read back and compared with its sha256 before it gets
    its name.

    Not included: caches, checkpoints of jobs, logs of servers, data sets (see --with-datasets), and
    state that is kept elsewhere: by an MLflow server (ROMA_MLFLOW_TRACKING_URI), or by a DAGSTER_HOME
    outside the root or with its own storage. The command names what applies; back that up there.
    """
    from roma_pipelines.operations.backup import kept_elsewhere, write_backup
    from roma_pipelines.operations.retention import operations_lock
    from roma_pipelines.storage import Storage

    with errors_as_messages():
        storage = Storage.open()
        with operations_lock(storage):
            n_bytes = write_backup(storage, file.absolute(), with_datasets=with_datasets)
        elsewhere = kept_elsewhere(storage)
    click.echo(f"{file}: {n_bytes:,} bytes, verified; `roma-pipeline restore {file}` restores it")
    datasets = "" if with_datasets else ", data sets (--with-datasets)"
    click.echo(f"not included: caches, checkpoints of jobs, logs of servers{datasets}")
    for what in elsewhere:
        click.echo(f"NOT INCLUDED: {what}; back it up there")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def restore(file: Path) -> None:
    """Restore FILE into ROMA_STORAGE_ROOT, which must be empty, as must the database."""
    from roma_pipelines.operations.backup import restore_backup
    from roma_pipelines.storage import StorageSettings

    root = StorageSettings().root
    with errors_as_messages():
        original = restore_backup(file, root)
    click.echo(f"restored into {root}")
    if original:
        click.echo(
            f"the backup was made of {original}: models load from the new place, but the history of "
            f"assets refers to the old one until they are materialised again"
        )
