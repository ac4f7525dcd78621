"""``roma``: data, training, evaluation and prediction on the command line.

Commands are imported on use, so that ``--help`` is fast.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from roma_core.job import Attempt, Interrupted, JobFolder
from roma_core.run_job import Work, run_in_folder

INTERRUPTED = 130  # exit code, as of a shell after SIGINT


class LazyGroup(click.Group):
    """``commands_at`` maps a command's name to ``module:attribute``, in the order of the help text.

    A command ends with one message for a ValueError, RuntimeError or OSError, and for Ctrl-C with that of
    its KeyboardInterrupt and exit code 130. A closed pipe is none: click ends quietly.
    """

    def __init__(self, *arguments: Any, commands_at: dict[str, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands_at = commands_at

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands_at)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.commands_at:
            return None
        module, _, attribute = self.commands_at[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (KeyboardInterrupt, Interrupted) as error:
            after_echo = "\n" if sys.stderr.isatty() else ""  # a terminal shows ^C
            click.echo(f"{after_echo}{str(error) or 'interrupted'}", err=True)
            ctx.exit(INTERRUPTED)
        except (ValueError, RuntimeError, OSError) as error:
            raise click.ClickException(str(error)) from error


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else to stdout."
)


def print_json(result: Any) -> None:
    """What ``--json`` prints: one document, whose keys stay."""
    click.echo(json.dumps(result, indent=2, ensure_ascii=False))


def echo_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of equally many words, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        click.echo(line.rstrip())


def with_options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One decorator of several, in the order of the help text."""

    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def job_option(work: Callable[[JobFolder, Attempt], Work]) -> Callable[[Any], Any]:
    """``--job FOLDER``: do the work of a job in its folder, and exit."""

    def run(context: click.Context, option: click.Parameter, folder: Path | None) -> None:
        if folder is not None:
            sys.exit(run_in_folder(JobFolder(folder.absolute()), work))

    return click.option(
        "--job",
        type=click.Path(file_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=run,
        help="Run the job planned in this folder; takes no other option.",
    )


_COMMANDS = {
    "data": "roma_core.cli.data:data",
    "pretrain": "roma_core.cli.train:pretrain",
    "finetune": "roma_core.cli.train:finetune",
    "evaluate": "roma_core.cli.evaluate:evaluate",
    "drift": "roma_core.cli.evaluate:drift",
    "predict": "roma_core.cli.predict:predict",
    "embed": "roma_core.cli.predict:embed",
    "explain": "roma_core.cli.predict:explain",
    "doctor": "roma_core.cli.doctor:doctor",
}


@click.group(
    epilog="Example: roma data build waves.yaml --out data",
    cls=LazyGroup,
    commands_at=_COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
def main() -> None:
    """Train, evaluate and use RoMA, the Rotary Masked Autoencoder.

    Settings are taken from options, the environment, one .env file and defaults, in this order.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for library in ("httpx", "torch"):
        logging.getLogger(library).setLevel(logging.WARNING)
