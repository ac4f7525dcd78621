"""``roma``: data, training, evaluation and prediction on the command line."""

from __future__ import annotations

import logging

import click

from roma_core.cli.lazy_group import LazyGroup

_COMMANDS = {
    "data": "roma_core.cli.data:data",
    "pretrain": "roma_core.cli.training:pretrain",
    "finetune": "roma_core.cli.training:finetune",
    "evaluate": "roma_core.cli.evaluation:evaluate",
    "predict": "roma_core.cli.prediction:predict",
    "embed": "roma_core.cli.prediction:embed",
    "doctor": "roma_core.cli.doctor:doctor",
}


@click.group(
    cls=LazyGroup, places=_COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
def main() -> None:
    """Train, judge and use RoMA, the Rotary Masked Autoencoder.

    Settings come from options, the environment, one .env file and defaults, in this order.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
