"""``python -m tests.benchmarks.results``: figures of published protocols, reproduced with one command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_LONG_S = 600.0
_INTERRUPTED = 130  # as of a shell's command that Ctrl-C ended


@click.command()
@click.argument("rows", nargs=-1, metavar="[ROW]…")
@click.option(
    "--list", "only_list", is_flag=True, help="Print the rows and what is there; run none."
)
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case. Repeatable.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only this seed. Repeatable.")
@click.option("--again", is_flag=True, help="Run cells anew whose settings have changed since.")
@click.option(
    "--target", type=click.Choice(["local", "slurm", "kubernetes"]), help="In place of the files'."
)
@click.option("--profile", help="Of the cluster, in place of the files'.")
@click.option("--yes", is_flag=True, help="Do not ask before a run of more than ten minutes.")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("tests/benchmarks/RESULTS.md"),
    show_default=True,
    help="Markdown file whose sections of these rows are replaced.",
)
def results(
    rows: tuple[str, ...],
    only_list: bool,
    cases: tuple[str, ...],
    seeds: tuple[int, ...],
    again: bool,
    target: str | None,
    profile: str | None,
    yes: bool,
    out: Path,
) -> None:
    """Run the cells of ROWs (all of them without) and write their tables.

    A cell is one case of a row (a share of observations left out, another setting) with one seed: data
    set, pretraining, finetuning, evaluation, as jobs outside the registry. What is there already is not run again, an
    interrupted cell goes on, and the table is written after every cell. Ctrl-C ends the watch, not the
    job that runs: the same command takes it up again.
    """
    from roma_core.schema import DataError
    from roma_pipelines.launching.launcher import Rejected
    from roma_pipelines.launching.spec import JobFailed
    from roma_pipelines.storage import Storage, StorageError
    from tests.benchmarks.results.benchmarks import chosen, read_rows
    from tests.benchmarks.results.runs import JobGoesOn, run_cell
    from tests.benchmarks.results.store import ResultsStore

    try:
        storage, known = Storage.open(), read_rows()
        wanted = chosen(known, rows, cases, seeds)
        names = list(dict.fromkeys(cell.row for cell in wanted))
        book = ResultsStore(storage, {name: known[name] for name in names})
        for cell in wanted:
            click.echo(book.state(cell))
        if only_list:
            return
        missing = [cell for cell in wanted if book.is_missing(cell, again)]
        _confirm([book.expected_s(cell, _told) for cell in missing], yes)
        for n, cell in enumerate(missing, 1):
            plan = book.plan(cell)
            resources = plan.experiment.resources.at(target, profile)
            run_cell(plan, resources, storage, _told)
            click.echo(f"[{n}/{len(missing)}] {book.state(cell)}")
            book.write(cell.row, out)
        for name in names:
            book.write(name, out)
    except JobFailed as error:
        raise click.ClickException(f"{error}\nthe same command goes on from here") from error
    except JobGoesOn as error:
        click.echo(
            f"interrupted, but {error}: `roma-pipeline jobs logs -f {error.key}` shows what it does, "
            f"`roma-pipeline jobs cancel {error.key}` ends it, and the same command as before takes it "
            f"up again",
            err=True,
        )
        sys.exit(_INTERRUPTED)
    except KeyboardInterrupt:
        click.echo("interrupted, and no job runs; the same command goes on from here", err=True)
        sys.exit(_INTERRUPTED)
    except (DataError, Rejected, StorageError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"wrote {out}")


def _told(line: str) -> None:
    click.echo(f"  {line}")


def _confirm(seconds: list[float], yes: bool) -> None:
    """Say what it will cost, and ask if that is much."""
    if not seconds:
        return
    click.echo(
        f"{len(seconds)} cell{'s' if len(seconds) > 1 else ''} to run, one after another: about {sum(seconds) / 60:.0f} min of training "
        f"on one idle CPU core"
    )
    if not yes and sum(seconds) > _LONG_S:
        click.confirm("go on?", abort=True)


if __name__ == "__main__":
    results()
