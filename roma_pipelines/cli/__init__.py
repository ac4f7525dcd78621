"""``roma-pipeline``: run experiments and the pages that show them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from roma_core.cli import LazyGroup, errors_as_messages
from roma_core.settings import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

_COMMANDS = {
    "demo": "roma_pipelines.cli.demo:demo",
    "up": "roma_pipelines.cli.up:up",
    "plan": "roma_pipelines.cli.plan:plan",
    "tune": "roma_pipelines.cli.tune:tune",
    "launch": "roma_pipelines.cli.jobs:launch",
    "jobs": "roma_pipelines.cli.jobs:jobs",
    "promote": "roma_pipelines.cli.registry:promote",
    "reject": "roma_pipelines.cli.registry:reject",
    "rollback": "roma_pipelines.cli.registry:rollback",
    "lineage": "roma_pipelines.cli.registry:lineage",
    "replay": "roma_pipelines.cli.registry:replay",
    "new-experiment": "roma_pipelines.cli.new_experiment:new_experiment",
    "health": "roma_pipelines.cli.operations:health",
    "gc": "roma_pipelines.cli.operations:gc",
    "backup": "roma_pipelines.cli.operations:backup",
    "restore": "roma_pipelines.cli.operations:restore",
}


TARGETS = click.Choice(["local", "slurm", "kubernetes"])


@click.group(
    cls=LazyGroup, commands_at=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """Operate RoMA experiments: Dagster assets, training jobs and the model registry.

    State is kept under .roma/ (ROMA_STORAGE_ROOT); `up` serves it as web pages.
    """


@contextmanager
def open_registry() -> Iterator[MlflowClient]:
    """The configured registry; its errors become one-line messages."""
    from mlflow.exceptions import MlflowException

    from roma_pipelines.registry.runs import limit_requests, no_answer
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.storage import Storage

    limit_requests(120)
    try:
        with errors_as_messages():
            yield connect(MlflowSettings(), Storage.open().mlflow)
    except MlflowException as error:
        message = no_answer(error) or without_credentials(error.message)
        raise click.ClickException(message) from error
