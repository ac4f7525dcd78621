"""``roma-pipeline``: run experiments and the pages that show them."""

from __future__ import annotations

import click

from roma_core.cli import LazyGroup

_COMMANDS = {
    "demo": "roma_pipelines.cli.demo:demo",
    "up": "roma_pipelines.cli.up:up",
    "plan": "roma_pipelines.cli.plan:plan",
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
