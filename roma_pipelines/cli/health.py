"""``roma-pipeline health``: whether stores, daemons, disk and jobs are well."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import dagster as dg
    from mlflow import MlflowClient


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For machines: a list of findings.")
@click.option("--strict", is_flag=True, help="A warning counts as an error.")
def health(as_json: bool, strict: bool) -> None:
    """Ask every part how it is; exit code 1 if one is in error."""
    from dataclasses import asdict

    from roma_pipelines.instance import prepare_instance
    from roma_pipelines.operations.health import Finding, findings
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.storage import Storage, StorageError

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
