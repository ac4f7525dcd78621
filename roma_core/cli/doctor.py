"""``roma doctor``: versions, devices, world, storage and trackers, as a training would find them."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_COLOURS = {"ok": "green", "note": "yellow", "failed": "red"}


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="the working directory",
    help="Folder that runs are written to; its speed is measured with 64 MB.",
)
def doctor(out: Path) -> None:
    """Look at what a training needs, and say what is missing.

    Leaves with 1 if something failed. A tracker is asked for two seconds at most.
    """
    from roma_core.doctor import findings

    failed = 0
    for finding in findings(out):
        failed += finding.verdict == "failed"
        verdict = click.style(f"{finding.verdict:<7}", fg=_COLOURS[finding.verdict])
        click.echo(f"{verdict} {finding.topic:<18} {finding.text}")
    sys.exit(1 if failed else 0)
