"""The overview page: every experiment's champion, past metrics, runs and jobs, on 127.0.0.1.

Serves the page, and reports and logs of jobs, which a browser cannot open from a file. It reads
Dagster, MLflow and the job folders and changes nothing.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click
import dagster as dg
import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from roma_core.evaluation.metrics import LABELS
from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.definitions import load, load_experiments
from roma_pipelines.experiment import Experiment, all_experiments
from roma_pipelines.launching.jobs import Job, all_jobs
from roma_pipelines.launching.outcome import duration, log_tail
from roma_pipelines.registry.promotion import CHAMPION, PREVIOUS
from roma_pipelines.registry.runs import SHORT_S, limit_requests
from roma_pipelines.registry.store import MlflowSettings, answers, connect
from roma_pipelines.registry.versions import CANDIDATE, aliased_version
from roma_pipelines.storage import Storage, defs_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion


@dataclass(frozen=True)
class Evaluation:
    """One evaluation report."""

    metric: str  # the primary one, as in a sentence
    value: float
    low: float  # 95 % interval
    high: float
    job: str  # key of the job that made it
    passed: bool | None  # the gate; None if there was none
    objections: tuple[str, ...]  # explanations of the gate's failed checks


@dataclass(frozen=True)
class View:
    """An experiment."""

    name: str
    description: str = ""
    problem: str = ""  # why its file cannot be used
    assets: Mapping[dg.AssetKey, float | None] = field(default_factory=dict)  # time of the newest
    versions: Mapping[str, ModelVersion] = field(default_factory=dict)  # by alias
    evaluations: Sequence[Evaluation] = ()  # the newest last
    runs: Sequence[dg.RunRecord] = ()  # the newest first
    jobs: Sequence[Job] = ()  # those that wait or run


def overview(
    experiments: Mapping[str, Experiment | str],
    storage: Storage,
    instance: dg.DagsterInstance,
    client: MlflowClient | None,
) -> list[View]:
    """A view of every experiment, or of the error of its file; the last materialised one first.

    Without a client, as MLflow is away, there are no versions.
    """
    run_records = instance.get_run_records(limit=200)
    active = [job for job in all_jobs(storage.jobs) if job.open_attempt is not None]
    usable = {e.name: e for e in experiments.values() if isinstance(e, Experiment)}
    keys = {name: [e.key(asset) for asset in e.asset_names] for name, e in usable.items()}
    asset_records = instance.get_asset_records([key for own in keys.values() for key in own])
    entries = [record.asset_entry for record in asset_records]
    made_at = {
        e.asset_key: e.last_materialization.timestamp for e in entries if e.last_materialization
    }
    views = [View(name, problem=e) for name, e in experiments.items() if isinstance(e, str)]
    for name, experiment in usable.items():
        runs = [
            record
            for record in run_records
            if any(key.path[0] == name for key in record.dagster_run.asset_selection or ())
        ]
        view = View(
            name=name,
            description=experiment.description,
            assets={key: made_at.get(key) for key in keys[name]},
            versions={
                alias: version
                for alias in (CHAMPION, PREVIOUS, CANDIDATE)
                if client and (version := aliased_version(client, name, alias)) is not None
            },
            evaluations=_evaluations(experiment, instance),
            runs=runs[:5],
            jobs=[job for job in active if job.asset.startswith(f"{name}/")],
        )
        views.append(view)
    return sorted(
        views, key=lambda view: (-max(filter(None, view.assets.values()), default=0), view.name)
    )


def _evaluations(experiment: Experiment, instance: dg.DagsterInstance) -> list[Evaluation]:
    """The newest ones with one primary metric, whose job folders are not removed."""
    key = experiment.key("evaluation_report")
    found = []
    for record in reversed(instance.fetch_materializations(key, limit=20).records):
        made = record.asset_materialization
        if made is None or "job_folder" not in made.metadata:
            continue
        folder = JobFolder(str(made.metadata["job_folder"].value))
        metrics, gate = folder.outputs / "metrics.json", folder.outputs / "gate.json"
        if not metrics.exists():
            continue
        document = read_json(metrics)
        primary = document.get("primary_metric", "accuracy")
        checks: list[dict[str, Any]] = read_json(gate)["checks"] if gate.exists() else []
        evaluation = Evaluation(
            metric=LABELS[primary],
            **{name: document[primary][name] for name in ("value", "low", "high")},
            job=folder.path.name,
            passed=all(check["passed"] for check in checks) if gate.exists() else None,
            objections=tuple(check["explanation"] for check in checks if not check["passed"]),
        )
        found.append(evaluation)
    return [one for one in found if one.metric == found[-1].metric]


_WIDTH, _HEIGHT, _MARGIN = 320.0, 84.0, 10.0


def trend(evaluations: Sequence[Evaluation]) -> Markup:
    """Primary metrics as an SVG: a dot with its interval each, hollow if the gate rejected it."""
    low = min(e.low for e in evaluations)
    span = (max(e.high for e in evaluations) - low) or 1.0

    def x(k: int) -> float:
        fraction = 0.5 if len(evaluations) == 1 else k / (len(evaluations) - 1)
        return _MARGIN + fraction * (_WIDTH - 2 * _MARGIN)

    def y(value: float) -> float:
        return _HEIGHT - _MARGIN - (value - low) / span * (_HEIGHT - 2 * _MARGIN)

    line = " ".join(f"{x(k):.1f},{y(e.value):.1f}" for k, e in enumerate(evaluations))
    parts = [f'<polyline points="{line}" class="line"/>']
    for k, e in enumerate(evaluations):
        title = f"{e.value:.3f} ({e.low:.3f}–{e.high:.3f})"
        title += {True: ", passed the gate", False: ", rejected by the gate", None: ""}[e.passed]
        parts.append(
            f'<g><title>{title}</title><line x1="{x(k):.1f}" x2="{x(k):.1f}" y1="{y(e.low):.1f}" '
            f'y2="{y(e.high):.1f}" class="range"/><circle cx="{x(k):.1f}" cy="{y(e.value):.1f}" '
            f'r="3.5" class="{"rejected" if e.passed is False else "point"}"/></g>'
        )
    n, last = len(evaluations), evaluations[-1]
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="test {last.metric} of '
        f'{n} evaluations, the last {last.value:.3f}">{"".join(parts)}</svg>'
    )


# -- the server ----------------------------------------------------------------------------------

_JOB_KEY = re.compile(r"[0-9a-f]{12,64}")
_HEADERS = {"X-Content-Type-Options": "nosniff"}


def create_app(storage: Storage, dagster: str, mlflow: str) -> Starlette:
    """The application; it answers requests to localhost only, and links to the two addresses."""
    limit_requests(SHORT_S)
    client = connect(MlflowSettings(), storage.mlflow)
    environment = Environment(
        loader=PackageLoader("roma_pipelines.pages", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        ago=lambda then: duration(time.time() - then) + " ago",
        duration=duration,
        moment=lambda then: f"{datetime.fromtimestamp(then).astimezone():%Y-%m-%d %H:%M:%S %Z}",
        trend=trend,
    )
    template = environment.get_template("overview.html.jinja")

    def index(request: Request) -> Response:
        with dg.DagsterInstance.get() as instance:
            there = answers(MlflowSettings())
            given = all_experiments()
            others = defs_files().keys() - given  # of other types
            given |= load()[1] if others else load_experiments(given)[1]
            views = overview(given, storage, instance, client if there else None)
        known = {"views": views, "now": time.time(), "dagster": dagster, "mlflow": mlflow}
        page = template.render(**known, mlflow_answers=there)
        return HTMLResponse(page, headers=_HEADERS)

    def folder_of(request: Request) -> JobFolder:
        key = request.path_params["key"]
        if not _JOB_KEY.fullmatch(key):
            raise HTTPException(404, f"{key!r} is not a job key")
        return JobFolder(storage.jobs / key)

    def report(request: Request) -> Response:
        path = folder_of(request).outputs / "report.html"
        if not path.is_file():
            raise HTTPException(404, "this job has no report")
        return FileResponse(path, media_type="text/html", headers=_HEADERS)

    def log(request: Request) -> Response:
        folder = folder_of(request)
        if not (attempts := folder.attempt_numbers()):
            raise HTTPException(404, "this job has no log")
        return PlainTextResponse(log_tail(folder.attempt(attempts[-1]).log), headers=_HEADERS)

    def error(request: Request, exception: Exception) -> Response:
        text = "".join(traceback.format_exception(exception, limit=-3))
        return PlainTextResponse(text, 500, headers=_HEADERS)

    return Starlette(
        routes=[
            Route("/", index),
            Route("/jobs/{key}/report", report),
            Route("/jobs/{key}/log", log),
        ],
        # a page of the internet whose name resolves to 127.0.0.1 gets nothing
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
        exception_handlers={Exception: error},
    )


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--dagster", required=True, help="Address of the Dagster page.")
@click.option("--mlflow", required=True, help="Address of the MLflow page.")
def main(port: int, dagster: str, mlflow: str) -> None:
    """Serve the overview of experiments on 127.0.0.1."""
    uvicorn.run(create_app(Storage.open(), dagster, mlflow), host="127.0.0.1", port=port)


if __name__ == "__main__":
    main()
