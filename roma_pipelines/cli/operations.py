"""``roma-pipeline backup`` and ``restore``: the state in one file, and back.

What commands of operation begin with: the storage root, Dagster's instance, MLflow's client.
``roma-pipeline health``: whether stores, daemons, disk and jobs are well.
``roma-pipeline gc``: remove what nothing needs any more.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roma_core.settings import without_credentials

if TYPE_CHECKING:
    import dagster as dg
    from mlflow import MlflowClient

    from roma_pipelines.storage import Storage


@contextlib.contextmanager
def opened() -> Iterator[tuple[Storage, dg.DagsterInstance, MlflowClient]]:
    """All three; what is wrong with them, or with what is done with them, is a sentence."""
    from roma_pipelines.registry.store import MlflowSettings, StoreError, connect
    from roma_pipelines.storage import Storage, StorageError, prepare_instance

    try:
        storage = Storage.open()
        prepare_instance(storage)
        client = connect(MlflowSettings(), storage.mlflow)
        import dagster as dg
        from mlflow.exceptions import MlflowException  # connect() sets telemetry first

        with dg.DagsterInstance.get() as instance:
            try:
                yield storage, instance, client
            except MlflowException as error:
                raise click.ClickException(without_credentials(str(error))) from error
    except (StorageError, StoreError, ValueError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of findings.")
@click.option("--strict", is_flag=True, help="A warning counts as an error.")
def health(as_json: bool, strict: bool) -> None:
    """Ask every part how it is; exit code 1 if one is in error."""
    from dataclasses import asdict

    from roma_pipelines.operations.health import Finding, findings
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.storage import Storage, StorageError, prepare_instance

    found: list[Finding] = []
    with contextlib.ExitStack() as stack:
        try:
            storage = Storage.open()
        except StorageError as error:
            found.append(Finding("storage", "error", str(error)))
        else:

            def instance() -> dg.DagsterInstance:
                import dagster as dg

                prepare_instance(storage)
                return stack.enter_context(dg.DagsterInstance.get())

            def client() -> MlflowClient:
                return connect(MlflowSettings(), storage.mlflow)

            found += findings(storage, instance, client)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=2))
    else:
        for one in found:
            click.echo(f"{one.status:<8} {one.part:<14} {one.detail}")
    bad = {"error", "warning"} if strict else {"error"}
    sys.exit(any(one.status in bad for one in found))


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


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--with-datasets", is_flag=True, help="Data sets, too; they can be built again.")
def backup(file: Path, with_datasets: bool) -> None:
    """Write the state to FILE, a tar: databases, the registry's artifacts, the record of every job.

    Everything may go on meanwhile. The file is read back and compared with its sha256 before it
    gets its name.

    Not in it: caches, checkpoints of jobs, logs of servers, data sets (but see --with-datasets),
    and what is kept elsewhere: by an MLflow server (ROMA_MLFLOW_TRACKING_URI), or by a DAGSTER_HOME
    outside the root or with a storage of its own. The command names what applies; back that up
    where it is.
    """
    from roma_pipelines.operations.backup import BackupError, kept_elsewhere, write_backup
    from roma_pipelines.operations.retention import operations_lock
    from roma_pipelines.storage import Storage, StorageError

    try:
        storage = Storage.open()
        with operations_lock(storage):
            n_bytes = write_backup(storage, file.absolute(), with_datasets=with_datasets)
        elsewhere = kept_elsewhere(storage)
    except (StorageError, BackupError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{file}: {n_bytes:,} bytes, verified; `roma-pipeline restore {file}` puts it back")
    left_out = "caches, checkpoints of jobs, logs of servers"
    click.echo(f"not in it: {left_out}{'' if with_datasets else ', data sets (--with-datasets)'}")
    for what in elsewhere:
        click.echo(f"NOT IN IT: {what}; back it up there")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def restore(file: Path) -> None:
    """Put the state of FILE into ROMA_STORAGE_ROOT, which must be empty, as must the database."""
    from roma_pipelines.operations.backup import BackupError, restore_backup
    from roma_pipelines.storage import StorageError, StorageSettings

    root = StorageSettings().root
    try:
        moved = restore_backup(file, root)
    except (StorageError, BackupError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"restored into {root}")
    if moved:
        click.echo(
            f"it was made of {moved}: models load from the new place, but the history of assets "
            f"names the old one until they are made again"
        )
