"""``roma-pipeline backup`` and ``restore``: the state in one file, and back."""

from __future__ import annotations

from pathlib import Path

import click


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
    from roma_pipelines.operations.backup import BackupError
    from roma_pipelines.operations.restore import restore_backup
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
