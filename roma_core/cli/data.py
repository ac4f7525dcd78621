"""``roma data``: build a data set, look at one, check one, and take one elsewhere."""

from __future__ import annotations

import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roma_core.cli import job_option, json_option, print_json
from roma_core.data.store import StoredDataset
from roma_core.files import write_bytes
from roma_core.job import Attempt, JobFolder, StopRequests
from roma_core.run_job import Work

if TYPE_CHECKING:
    from roma_core.data.profile import DataProfile

_FOLDER = click.Path(file_okay=False, path_type=Path)
_DATASET = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group(epilog="Example: roma data inspect data/waves/3f2a9c")
def data() -> None:
    """Build, inspect, validate and export data sets."""


def _run(folder: JobFolder, attempt: Attempt) -> Work:
    from roma_core.data.job import run_dataset_job

    return run_dataset_job(folder, attempt)


@data.command(epilog="Example: roma data build waves.yaml --out data")
@job_option(_run)
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--out",
    required=True,
    type=_FOLDER,
    help="Folder of data sets; the set goes to OUT/<name>/<version>/.",
)
@click.option(
    "--cache",
    default=Path(".roma/cache"),
    show_default=True,
    type=_FOLDER,
    help="Folder for what the source fetches.",
)
def build(config: Path, out: Path, cache: Path) -> None:
    """Build the data set that CONFIG (YAML) describes and print its folder.

    Equal input gives an equal version; one that is there already is verified and used. What went to
    which split, and what was repaired, is printed on stderr. To resume an interrupted call, repeat it.
    """
    from roma_core.data.build import build_dataset
    from roma_core.data.config import DatasetConfig
    from roma_core.data.manifest import read_manifest

    with warnings.catch_warnings(), StopRequests() as requests:
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
        settings = DatasetConfig.from_yaml(config)
        path = build_dataset(settings, out, cache, should_stop=requests.requested)
        manifest = read_manifest(path)
    total = sum(n.n_series for n in manifest.counts.values())
    sizes = (
        f"{split} {n.n_series:,} series ({n.n_series / total:.1%}) with {n.n_observations:,} observations"
        for split, n in manifest.counts.items()
    )
    click.echo(", ".join(sizes), err=True)
    counts = manifest.repairs.model_dump() if manifest.repairs else {}
    repairs = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if n)
    if repairs:
        click.echo(f"repaired: {repairs}", err=True)
    click.echo(path)


@data.command(epilog="Example: roma data inspect data/waves/3f2a9c")
@click.argument("path", type=_DATASET)
@json_option
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page with these tables, plots and the findings of all checks to this file instead.",
)
def inspect(path: Path, as_json: bool, html: Path | None) -> None:
    """Print what the data set in PATH looks like: counts, lengths, classes, gaps, values."""
    from roma_core.data.profile import profile_dataset

    dataset = StoredDataset(path)
    profile = profile_dataset(dataset)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(html, _page(profile, dataset).encode())
    if as_json:
        print_json(profile.model_dump(mode="json"))
    else:
        click.echo(profile.to_markdown() if html is None else f"{html}\n", nl=False)


def _page(profile: DataProfile, dataset: StoredDataset) -> str:
    from roma_core.data.profile import plot_profile, plot_values
    from roma_core.data.quality import check_dataset
    from roma_core.evaluation.report import Plot, render_page

    plots = {"Series": plot_profile(profile, dataset), "Values as delivered": plot_values(dataset)}
    content = {
        "title": f"Data set {profile.name}",
        "summary": f"{len(dataset):,} series, {profile.fraction_dropped:.1%} of the delivered observations "
        f"dropped, version {profile.digest[:12]}",
        "created": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "findings": check_dataset(dataset.path),
        "tables": profile.tables(),
        "plots": [Plot(title=t, caption="", alt=t, png=png) for t, png in plots.items()],
    }
    return render_page("dataset", content)


@data.command(epilog="Example: roma data validate data/waves/3f2a9c --strict")
@click.argument("path", type=_DATASET)
@click.option(
    "--against",
    type=_DATASET,
    help="An earlier version: report objects that changed split or content or were removed, and drift.",
)
@click.option("--strict", is_flag=True, help="Let warnings fail too.")
@json_option
def validate(path: Path, against: Path | None, strict: bool, as_json: bool) -> None:
    """Check the data set in PATH; exit with 1 if there is an error in it.

    Errors: damaged files, columns that do not fit, numbers that are not finite, an object, group or
    equal content in two splits (the latter two: unless the set was built with leakage: warn or ignore).
    """
    from roma_core.data.quality import check_dataset
    from roma_core.data.versions import compare_versions

    found = check_dataset(path)
    errors = sum(f.severity == "error" for f in found)
    if against is not None and not errors:
        found += compare_versions(StoredDataset(path, verify=False), StoredDataset(against))
        errors = sum(f.severity == "error" for f in found)
    if as_json:
        print_json([f.model_dump() for f in found])
    else:
        for f in found:
            for line in f.lines():
                click.echo(f"{f.severity}: {line}")
    if errors or (strict and found):
        warned = f" and {len(found) - errors} warnings" if len(found) > errors else ""
        click.echo(f"{path}: {errors} error{'s' if errors != 1 else ''}{warned}", err=True)
        sys.exit(1)
    if not as_json:
        click.echo(f"{path}: sound")


@data.command(epilog="Example: roma data export data/waves/3f2a9c waves.parquet --split test")
@click.argument("path", type=_DATASET)
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Export only this split."
)
def export(path: Path, target: Path, split: str | None) -> None:
    """Write the data set in PATH to TARGET, a Parquet file with one row per series."""
    if target.suffix.lower() != ".parquet":
        raise click.BadParameter(f"expected a file that ends in .parquet, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    n = StoredDataset(path).to_parquet(target, split)  # type: ignore[arg-type]
    click.echo(f"{target}: {n} series")
