"""How long people wait for a page: ``python -m tests.benchmarks.pages [--storage postgres]``.

A real run of a tiny experiment is repeated in the history until there are so many materialisations,
with its plots, checks, observations and job folders, under the keys of a shipped experiment. Then
``roma-pipeline up`` serves it, and headless Chromium opens every page until what people came for is
seen. Printed: the median and the slowest time, and the CPU time of the servers and of the browser for a
page, which other programs change less. ``--materialisations 5`` is the real run alone, to compare with.
``--folder`` keeps the history (of SQLite), and a later call goes on with it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable,
    SqlEventLogStorageTable,
)
from dagster._core.storage.runs.schema import RunsTable, RunTagsTable

from roma_core.job import JobFolder
from roma_pipelines.storage import Storage, prepare_instance
from tests.end_to_end.served import Pages, chromium
from tests.pipelines import tiny
from tests.pipelines.real_postgres import real_postgres

EXPERIMENT = "japanese_vowels"  # that of the definitions which `up` serves
_HOUR_S = 3600.0
_TIMES = 3  # after one that fills the browser's cache
_SETTLE_S = 10.0  # the daemon's first ticks are over then
_WHOLE = 30  # newest runs that have every event
_COPY = "-0000-4000-8000-000000000000"  # how the id of a repeated run ends
_COPIED_JOB = "c0c0"  # how the key of its job begins


@dataclass(frozen=True)
class Visit:
    """One page, opened once."""

    seconds: float
    server_cpu_s: float
    browser_cpu_s: float


def pages_of(pages: Pages, a_run: str) -> dict[str, tuple[str, Callable[[Any], None]]]:
    """Page -> its address, and what waits for its content."""
    asset = f"{pages.dagster}/assets/{EXPERIMENT}"

    def with_curves(page: Any) -> None:
        page.get_by_text("Plots", exact=True).click()
        page.locator("canvas").first.wait_for()

    def with_plot(page: Any) -> None:
        row = page.locator("tr", has=page.get_by_text("confusion", exact=True))
        row.get_by_text("Show Markdown").click()
        page.get_by_alt_text("confusion matrix").evaluate("image => image.decode()")

    def text(wanted: str) -> Callable[[Any], None]:
        return lambda page: page.get_by_text(wanted).first.wait_for()

    return {
        "asset catalogue": (f"{pages.dagster}/assets", text("finetuned_classifier")),
        "an asset, with a plot": (f"{asset}/evaluation_report", with_plot),
        "an asset, curves of past runs": (f"{asset}/evaluation_report", with_curves),
        "an asset, past events": (f"{asset}/finetuned_classifier?view=events", text("eval/loss")),
        "an asset, checks": (f"{asset}/evaluation_report?view=checks", text("class_floor")),
        "runs": (
            f"{pages.dagster}/runs",
            lambda page: page.locator(f"a[href*='/runs/{a_run}']").first.wait_for(),
        ),
        "a run": (f"{pages.dagster}/runs/{a_run}", text(f"{EXPERIMENT}__evaluation_report")),
        "overview of experiments": (
            pages.overview,
            lambda page: page.locator(f"#{EXPERIMENT} .big").wait_for(),
        ),
    }


def visit_all(folder: Path, settings: dict[str, str], a_run: str) -> dict[str, list[Visit]]:
    """Page -> its visits, with a browser that has been there before."""
    pages = Pages(folder, settings)
    try:
        time.sleep(_SETTLE_S)
        with chromium() as browser:
            context = browser.new_context(viewport={"width": 1500, "height": 1000})
            found = {}
            for name, (address, wait) in pages_of(pages, a_run).items():
                visits = [_visit(context, pages, address, wait) for _ in range(_TIMES + 1)]
                found[name] = visits[1:]
        return found
    finally:
        pages.stop()


def _visit(context: Any, pages: Pages, address: str, wait: Callable[[Any], None]) -> Visit:
    page = context.new_page()
    page.set_default_timeout(60_000)
    servers, browser = _cpu_s(pages.child.pid), _cpu_s(os.getpid()) - _cpu_s(pages.child.pid)
    start = time.perf_counter()
    page.goto(address, wait_until="commit")
    wait(page)
    seconds = time.perf_counter() - start
    now = _cpu_s(pages.child.pid)
    visit = Visit(seconds, now - servers, _cpu_s(os.getpid()) - now - browser)
    page.close()
    return visit


def _cpu_s(root: int) -> float:
    """CPU time of all living descendants of a process."""
    total = 0.0
    for child in psutil.Process(root).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = child.cpu_times()
            total += times.user + times.system
    return total


def history(folder: Path, instance: dg.DagsterInstance, n: int, jobs: Path) -> str:
    """Make it n runs long, or longer than it is; the id of the run that was written last."""
    runs = instance.get_runs()
    real = [run for run in runs if not run.run_id.endswith(_COPY)]
    run = real[0] if real else one_real_run(folder, instance)
    start = time.monotonic()
    repeat(instance, run, range(len(runs) - len(real), n - 1), jobs)
    print(f"history written in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return instance.get_runs(limit=1)[0].run_id


def one_real_run(folder: Path, instance: dg.DagsterInstance) -> dg.DagsterRun:
    """The five assets of a tiny experiment, made as always."""
    definitions = tiny.definitions(tiny.attributes(folder) | {"name": EXPERIMENT})
    job = definitions.resolve_implicit_global_asset_job_def()
    done = job.execute_in_process(instance=instance, raise_on_error=False)
    run = instance.get_run_by_id(done.run_id)
    if not done.success or run is None:
        raise RuntimeError("the tiny experiment failed; its events are above")
    return run


def repeat(instance: dg.DagsterInstance, run: dg.DagsterRun, copies: range, jobs: Path) -> None:
    """The same run, an hour apart into the past, each with job folders of its own.

    The newest are told to Dagster event by event; the others are rows of its tables, copied, and
    have no logs of their own: what pages over many runs read.
    """
    folders = [JobFolder(path) for path in jobs.iterdir() if not path.name.startswith(_COPIED_JOB)]
    for k in copies:
        run_id, earlier_s = f"{k:08d}{_COPY}", (copies.stop - k) * _HOUR_S
        for number, folder in enumerate(folders):
            _copy_of(folder, jobs / f"{_COPIED_JOB}{k:08x}{number:08x}")
        if copies.stop - k > _WHOLE:
            _copy_rows(instance, run.run_id, run_id, earlier_s)
        else:
            _tell(instance, run, run_id, earlier_s)


def _tell(instance: dg.DagsterInstance, run: dg.DagsterRun, run_id: str, earlier_s: float) -> None:
    instance.add_run(run._replace(run_id=run_id, status=dg.DagsterRunStatus.NOT_STARTED))
    for entry in instance.all_logs(run.run_id):
        moved = entry._replace(run_id=run_id, timestamp=entry.timestamp - earlier_s)
        instance.handle_new_event(moved)


def _copy_rows(instance: dg.DagsterInstance, old: str, new: str, earlier_s: float) -> None:
    """The rows of a run in the tables of runs, asset events and checks."""
    runs: Any = instance.run_storage
    events: Any = instance.event_log_storage
    with runs.connect() as connection:
        for table in (RunsTable, RunTagsTable):
            _copied(connection, table, old, new, earlier_s)
    with events.index_connection() as connection:
        for table in (SqlEventLogStorageTable, AssetCheckExecutionsTable):
            _copied(connection, table, old, new, earlier_s)


def _copied(connection: Any, table: Any, old: str, new: str, earlier_s: float) -> None:
    rows = []
    for found in connection.execute(table.select().where(table.c.run_id == old)).mappings():
        row = {name: value for name, value in found.items() if name != "id"}
        for name, value in row.items():
            if name in ("start_time", "end_time") and value is not None:
                row[name] = value - earlier_s
            elif isinstance(value, datetime):
                row[name] = value - timedelta(seconds=earlier_s)
            elif isinstance(value, str):
                row[name] = value.replace(old, new)
        if "event" in row:
            body = json.loads(row["event"])
            row["event"] = json.dumps(body | {"timestamp": body["timestamp"] - earlier_s})
        rows.append(row)
    if rows:
        connection.execute(table.insert(), rows)


def _copy_of(job: JobFolder, path: Path) -> None:
    """Without what is large: weights, packages, checkpoints."""
    large = shutil.ignore_patterns("checkpoints", "package", "*_package", "model")
    shutil.copytree(job.path, path, ignore=large, dirs_exist_ok=True)


def _unsafe_but_quick() -> None:
    """SQLite waits for no disk while the history is written; only this process is so."""
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "connect")
    def _(connection: Any, record: object) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous=OFF")


@contextlib.contextmanager
def _settings(storage: str, folder: Path) -> Iterator[dict[str, str]]:
    """Variables that name a new root, and for PostgreSQL a new server."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.env").touch()
    common = {
        "ROMA_STORAGE_ROOT": str(folder / "roma"),
        "ROMA_ENV_FILE": str(folder / "empty.env"),
    }
    if storage == "sqlite":
        yield common
        return
    with real_postgres() as server:
        yield common | {"ROMA_STORAGE_DATABASE_URL": server.create("pages")}


def measure(storage: str, folder: Path, n: int) -> tuple[int, dict[str, list[Visit]]]:
    """Materialisations there were, and the visits of every page."""
    with _settings(storage, folder) as settings:
        os.environ |= settings
        os.environ.pop("DAGSTER_HOME", None)
        root = Storage.open()
        prepare_instance(root)
        with dg.DagsterInstance.get() as instance:
            a_run = history(folder, instance, max(1, n // len(tiny.ASSET_NAMES)), root.jobs)
            there = 0
            for noun in tiny.ASSET_NAMES:
                key = dg.AssetKey([EXPERIMENT, noun])
                there += len(instance.fetch_materializations(key, limit=5000).records)
        return there, visit_all(folder, settings, a_run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", choices=["sqlite", "postgres"], default="sqlite")
    parser.add_argument("--materialisations", type=int, default=2000)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    _unsafe_but_quick()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        n, found = measure(options.storage, folder, options.materialisations)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{n} materialisations in {options.storage}, {cores} core(s), load {load:.1f}")
    print(f"{'page':<30} {'median (slowest)':>18} {'servers, CPU':>14} {'browser, CPU':>14}")
    for name, visits in found.items():
        seconds = [visit.seconds for visit in visits]
        shown = f"{statistics.median(seconds):.2f} ({max(seconds):.2f}) s"
        servers = statistics.median(visit.server_cpu_s for visit in visits)
        browser = statistics.median(visit.browser_cpu_s for visit in visits)
        print(f"{name:<30} {shown:>18} {servers:>12.2f} s {browser:>12.2f} s")


if __name__ == "__main__":
    main()
