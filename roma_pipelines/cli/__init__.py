"""``roma-pipeline``: run experiments and the pages that show them."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {
    "demo": ("roma_pipelines.cli.demo", "demo"),
    "up": ("roma_pipelines.cli.up", "up"),
}


class _Lazy(click.Group):
    """Imports a command when it is asked for, so that ``roma-pipeline --help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Operate RoMA experiments: Dagster assets, training jobs and the model registry.

    State is kept under .roma/ (ROMA_STORAGE_ROOT); `up` shows it in two pages.
    """
