"""Serves the overview of experiments, and reports and logs of jobs, on 127.0.0.1.

    /                        every experiment
    /jobs/KEY/report         an evaluation's report
    /jobs/KEY/log            the end of the log of a job's last attempt

Run by ``roma-pipeline up`` as ``python -m roma_pipelines.pages.server``. It answers GET and HEAD
alone, and opens no file but those two of a job whose key is a key.
"""

from __future__ import annotations

import datetime
import logging
import re
import time
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click
import dagster as dg
from jinja2 import Environment, PackageLoader, StrictUndefined

from roma_core.job import JobFolder
from roma_pipelines.experiment_files import all_experiments
from roma_pipelines.launching.evidence import log_tail
from roma_pipelines.pages.overview import overview
from roma_pipelines.pages.trend import trend
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage

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
