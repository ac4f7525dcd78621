"""``python -m tests.benchmarks.results``: figures of published protocols, reproduced with one command."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_LONG_S = 600.0
_INTERRUPTED = 130  # as of a shell's command that Ctrl-C ended


@click.command()
@click.argument("benchmarks", nargs=-1, metavar="[BENCHMARK]…")
@click.option(
    "--list", "only_list", is_flag=True, help="Print the benchmarks and what is there; run none."
)
@click.option("--case", "cases", multiple=True, metavar="NAME", help="Only this case. Repeatable.")
@click.option("--seed", "seeds", multiple=True, type=int, help="Only this seed. Repeatable.")
@click.option(
    "--rerun-stale", is_flag=True, help="Run runs anew whose settings have changed since."
)
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
    help="Markdown file whose sections of these benchmarks are replaced.",
)
def results(
    benchmarks: tuple[str, ...],
    only_list: bool,
    cases: tuple[str, ...],
    seeds: tuple[int, ...],
    rerun_stale: bool,
    target: str | None,
    profile: str | None,
    yes: bool,
    out: Path,
) -> None:
    """Run the runs of each BENCHMARK (of all without one) and write their tables.

    A run is one case of a benchmark (a share of observations left out, another setting) with one seed: data
    set, pretraining, finetuning, evaluation, as jobs outside the registry. What is there already is not repeated, an
    interrupted run goes on, and the table is written after every run. Ctrl-C ends the watch, not the
    job that runs: the same command takes it up again.
    """
    from roma_core.schema import DataError
    from roma_pipelines.launching.launcher import Rejected
    from roma_pipelines.launching.spec import JobFailed
    from roma_pipelines.storage import Storage, StorageError
    from tests.benchmarks.results.benchmarks import chosen, read_benchmarks
    from tests.benchmarks.results.runs import StillRunning, execute
    from tests.benchmarks.results.store import ResultsStore

    try:
        storage, known = Storage.open(), read_benchmarks()
        wanted = chosen(known, benchmarks, cases, seeds)
        names = list(dict.fromkeys(run.benchmark for run in wanted))
        store = ResultsStore(storage, {name: known[name] for name in names})
        for run in wanted:
            click.echo(store.state(run))
        if only_list:
            return
        missing = [run for run in wanted if store.is_missing(run, rerun_stale)]
        _confirm([store.expected_s(run, log) for run in missing], yes)
        for n, run in enumerate(missing, 1):
            plan = store.plan(run)
            resources = plan.experiment.resources.at(target, profile)
            execute(plan, resources, storage, log)
            click.echo(f"[{n}/{len(missing)}] {store.state(run)}")
            store.write(run.benchmark, out)
        for name in names:
            store.write(name, out)
    except JobFailed as error:
        raise click.ClickException(f"{error}\nthe same command goes on from here") from error
    except StillRunning as error:
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


def log(line: str) -> None:
    click.echo(f"  {line}")


def _confirm(seconds: list[float], yes: bool) -> None:
    """Say what it will cost, and ask if that is much."""
    if not seconds:
        return
    click.echo(
        f"{len(seconds)} run{'s' if len(seconds) > 1 else ''} to run, one after another: about {sum(seconds) / 60:.0f} min of training "
        f"on one idle CPU core"
    )
    if not yes and sum(seconds) > _LONG_S:
        click.confirm("go on?", abort=True)


if __name__ == "__main__":
    results()
