"""``roma``: data, training, evaluation and prediction on the command line."""

from __future__ import annotations

import importlib
import logging

import click

_COMMANDS = {
    "data": ("roma_core.cli.data", "data"),
    "pretrain": ("roma_core.cli.training", "pretrain"),
    "finetune": ("roma_core.cli.training", "finetune"),
    "evaluate": ("roma_core.cli.evaluation", "evaluate"),
    "predict": ("roma_core.cli.prediction", "predict"),
}


class _Lazy(click.Group):
    """Imports a command when it is asked for, so that ``roma --help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train, judge and use RoMA, the Rotary Masked Autoencoder.

    Settings come from options, the environment, one .env file and defaults, in this order.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
