"""What there is to say about every experiment at this moment; reads and changes nothing.

Accuracies of past evaluations as an inline drawing (SVG).
Serves the overview of experiments, and reports and logs of jobs, on 127.0.0.1.
"""

from __future__ import annotations

import datetime
import logging
import re
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import dagster as dg
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.experiment import ASSET_NAMES, Experiment
from roma_pipelines.experiment_files import all_experiments
from roma_pipelines.launching.jobs import Job, all_jobs
from roma_pipelines.launching.outcome import log_tail
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage

if TYPE_CHECKING:
    from mlflow import MlflowClient

_WIDTH, _HEIGHT, _EDGE = 320.0, 84.0, 10.0


def trend(evaluations: Sequence[Evaluation]) -> Markup:
    """A dot per evaluation with its interval; hollow where the gate refused it."""
    low = min(e.low for e in evaluations)
    high = max(e.high for e in evaluations)
    span = (high - low) or 1.0

    def x(k: int) -> float:
        share = 0.5 if len(evaluations) == 1 else k / (len(evaluations) - 1)
        return _EDGE + share * (_WIDTH - 2 * _EDGE)

    def y(value: float) -> float:
        return _EDGE + (high - value) / span * (_HEIGHT - 2 * _EDGE)

    line = " ".join(f"{x(k):.1f},{y(e.accuracy):.1f}" for k, e in enumerate(evaluations))
    parts = [f'<polyline points="{line}" class="line"/>']
    for k, e in enumerate(evaluations):
        said = f"{e.accuracy:.3f} ({e.low:.3f}–{e.high:.3f})"
        said += {True: ", passed the gate", False: ", refused by the gate", None: ""}[e.passed]
        parts.append(
            f'<g><title>{escape(said)}</title><line x1="{x(k):.1f}" x2="{x(k):.1f}" y1="{y(e.low):.1f}" '
            f'y2="{y(e.high):.1f}" class="range"/><circle cx="{x(k):.1f}" cy="{y(e.accuracy):.1f}" '
            f'r="3.5" class="{"refused" if e.passed is False else "point"}"/></g>'
        )
    last = evaluations[-1]
    label = (
        f"test accuracy of the last {len(evaluations)} evaluations, {last.accuracy:.3f} at the end"
    )
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


_EVALUATIONS = 20  # in the trend
_RUNS_LOOKED_AT = 200
_RUNS_SHOWN = 5
_ALIASES = ("champion", "previous", "candidate")


@dataclass(frozen=True)
class Asset:
    """One of an experiment's assets.

    Attributes:
        made_at: of its newest materialisation, seconds since the epoch; None if there is none.
    """

    noun: str
    path: str  # in Dagster's addresses
    made_at: float | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation report.

    Attributes:
        job: key of the job that made it; None if its folder is gone.
        passed: what its gate said; None if nothing is known.
    """

    made_at: float
    accuracy: float
    low: float
    high: float
    job: str
    passed: bool | None
    objections: tuple[str, ...]


@dataclass(frozen=True)
class Version:
    """A registered version that an alias points to."""

    alias: str
    version: str
    made_at: float


@dataclass(frozen=True)
class Run:
    """A Dagster run that made, or tried to make, assets of the experiment."""

    id: str
    status: str
    started_at: float | None
    ended_at: float | None


@dataclass(frozen=True)
class View:
    """An experiment; ``problem`` is set if its file cannot be used."""

    name: str
    description: str = ""
    problem: str = ""
    assets: tuple[Asset, ...] = ()
    versions: tuple[Version, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()  # the newest last
    runs: tuple[Run, ...] = ()  # the newest first
    jobs: tuple[Job, ...] = field(default=(), repr=False)  # that wait or run

    @property
    def last_made_at(self) -> float:
        """When any of its assets was made, seconds since the epoch; 0 if none ever was."""
        return max((asset.made_at or 0.0 for asset in self.assets), default=0.0)

    @property
    def has_champion(self) -> bool:
        return any(version.alias == "champion" for version in self.versions)


def overview(
    experiments: Mapping[str, Experiment | str],
    storage: Storage,
    instance: dg.DagsterInstance,
    client: MlflowClient,
) -> list[View]:
    """A view of every experiment, the one that was at work last in front.

    Args:
        experiments: by name; a text says why one cannot be used.
    """
    records = instance.get_run_records(limit=_RUNS_LOOKED_AT)
    waiting = [job for job in all_jobs(storage.jobs) if job.open_attempt is not None]
    usable = [
        experiment for experiment in experiments.values() if isinstance(experiment, Experiment)
    ]
    made_at = _made_at(usable, instance)
    views = [
        View(name, problem=experiment)
        if isinstance(experiment, str)
        else View(
            name=name,
            description=experiment.description,
            assets=_assets(experiment, made_at),
            versions=_versions(client, name),
            evaluations=_evaluations(experiment, instance),
            runs=_runs(name, records),
            jobs=tuple(job for job in waiting if job.asset.startswith(f"{name}/")),
        )
        for name, experiment in experiments.items()
    ]
    return sorted(views, key=lambda view: (-view.last_made_at, view.name))


def _made_at(
    experiments: Iterable[Experiment], instance: dg.DagsterInstance
) -> dict[dg.AssetKey, float]:
    """When each asset was last materialised, those that were; one question for all."""
    keys = [experiment.key(noun) for experiment in experiments for noun in ASSET_NAMES]
    entries = [record.asset_entry for record in instance.get_asset_records(keys)]
    return {
        entry.asset_key: entry.last_materialization.timestamp
        for entry in entries
        if entry.last_materialization is not None
    }


def _assets(experiment: Experiment, made_at: Mapping[dg.AssetKey, float]) -> tuple[Asset, ...]:
    keys = {noun: experiment.key(noun) for noun in ASSET_NAMES}
    return tuple(Asset(noun, "/".join(key.path), made_at.get(key)) for noun, key in keys.items())


def _evaluations(experiment: Experiment, instance: dg.DagsterInstance) -> tuple[Evaluation, ...]:
    records = instance.fetch_materializations(
        experiment.key("evaluation_report"), limit=_EVALUATIONS
    ).records
    found = []
    for record in reversed(records):
        materialisation = record.asset_materialization
        if materialisation is None or "job_folder" not in materialisation.metadata:
            continue
        folder = Path(str(materialisation.metadata["job_folder"].value))
        if (evaluation := _evaluation(folder, record.timestamp)) is not None:
            found.append(evaluation)
    return tuple(found)


def _evaluation(folder: Path, made_at: float) -> Evaluation | None:
    """From its job folder; None if that was removed."""
    metrics, gate = folder / "outputs" / "metrics.json", folder / "outputs" / "gate.json"
    if not metrics.exists():
        return None
    accuracy = read_json(metrics)["accuracy"]
    checks: list[dict[str, Any]] = read_json(gate)["checks"] if gate.exists() else []
    return Evaluation(
        made_at=made_at,
        accuracy=accuracy["value"],
        low=accuracy["low"],
        high=accuracy["high"],
        job=folder.name,
        passed=all(check["passed"] for check in checks) if gate.exists() else None,
        objections=tuple(check["explanation"] for check in checks if not check["passed"]),
    )


def _versions(client: MlflowClient, name: str) -> tuple[Version, ...]:
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return ()
        raise
    return tuple(
        Version(
            alias,
            str(aliases[alias]),
            client.get_model_version(name, aliases[alias]).creation_timestamp / 1000,
        )
        for alias in _ALIASES
        if alias in aliases
    )


def _runs(name: str, records: Iterable[dg.RunRecord]) -> tuple[Run, ...]:
    of_it = [
        record
        for record in records
        if any(key.path[0] == name for key in record.dagster_run.asset_selection or ())
    ]
    return tuple(
        Run(
            record.dagster_run.run_id,
            record.dagster_run.status.value,
            record.start_time,
            record.end_time,
        )
        for record in of_it[:_RUNS_SHOWN]
    )


_JOB = re.compile(r"/jobs/([0-9a-f]{12,64})/(report|log)")
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_log = logging.getLogger(__name__)


class Pages:
    """Renders the pages from the state under one storage root."""

    def __init__(self, storage: Storage, dagster: str, mlflow: str) -> None:
        """
        Args:
            dagster: address of the Dagster page, for links.
            mlflow: address of the MLflow page.
        """
        self.storage, self.dagster, self.mlflow = storage, dagster, mlflow
        self.client = connect(MlflowSettings(), storage.mlflow)
        environment = Environment(
            loader=PackageLoader("roma_pipelines.pages", "."),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {
            "ago": lambda then: _span(time.time() - then) + " ago",
            "duration": _span,
            "moment": _moment,
            "trend": trend,
        }
        self._template = environment.get_template("overview.html.jinja")

    def index(self) -> str:
        """The page of all experiments."""
        with dg.DagsterInstance.get() as instance:
            views = overview(all_experiments(), self.storage, instance, self.client)
        return self._template.render(
            views=views, now=time.time(), dagster=self.dagster, mlflow=self.mlflow
        )

    def report(self, key: str) -> bytes | None:
        """An evaluation's report; None if the job has none."""
        path = self.storage.jobs / key / "outputs" / "report.html"
        return path.read_bytes() if path.is_file() else None

    def log(self, key: str) -> str | None:
        """The end of the last attempt's log; None if there is none."""
        folder = JobFolder(self.storage.jobs / key)
        numbers = folder.attempt_numbers() if folder.path.is_dir() else []
        return log_tail(folder.attempt(numbers[-1]).log) if numbers else None


def serve(pages: Pages, port: int) -> ThreadingHTTPServer:
    """A server that is listening on 127.0.0.1; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in _LOCAL_NAMES:  # a page of the internet whose name was bound to us
                self._answer(HTTPStatus.FORBIDDEN, "this page answers to localhost only")
                return
            try:
                self._route(self.path.partition("?")[0])
            except Exception:  # told on the page and in the log; the server goes on
                _log.exception("%s failed", self.path)
                self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, traceback.format_exc(limit=-3))

        do_HEAD = do_GET  # the same without the content, see _answer

        def _route(self, path: str) -> None:
            if path == "/":
                self._answer(HTTPStatus.OK, pages.index(), "text/html")
            elif (job := _JOB.fullmatch(path)) is None:
                self._answer(HTTPStatus.NOT_FOUND, f"there is no page {path}; the first one is /")
            elif job[2] == "report" and (report := pages.report(job[1])) is not None:
                self._answer(HTTPStatus.OK, report.decode(), "text/html")
            elif job[2] == "log" and (log := pages.log(job[1])) is not None:
                self._answer(HTTPStatus.OK, log)
            else:
                self._answer(HTTPStatus.NOT_FOUND, f"job {job[1]} has no {job[2]}")

        def _answer(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            _log.info(format, *arguments)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--dagster", required=True, help="Address of the Dagster page.")
@click.option("--mlflow", required=True, help="Address of the MLflow page.")
def main(port: int, dagster: str, mlflow: str) -> None:
    """Serve the overview of experiments on 127.0.0.1."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    serve(Pages(Storage.open(), dagster, mlflow), port).serve_forever()


if __name__ == "__main__":
    main()
