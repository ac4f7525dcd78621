"""What commands of operation begin with: the storage root, Dagster's instance, MLflow's client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from roma_core.credentials import without_credentials

if TYPE_CHECKING:
    import dagster as dg
    from mlflow import MlflowClient

    from roma_pipelines.storage import Storage


@contextlib.contextmanager
def opened() -> Iterator[tuple[Storage, dg.DagsterInstance, MlflowClient]]:
    """All three; what is wrong with them, or with what is done with them, is a sentence."""
    from roma_pipelines.instance import prepare_instance
    from roma_pipelines.registry.store import MlflowSettings, StoreError, connect
    from roma_pipelines.storage import Storage, StorageError

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
