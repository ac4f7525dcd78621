"""``roma-pipeline up`` as a process of its own, and a real browser that opens its pages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.time_limits import within

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
NO_CHROMIUM = "no chromium on this computer (Debian: apt install chromium)"
# fmt: off
_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]
# fmt: on


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser of Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer; an idle computer needs so many seconds at most."""
    deadline = time.monotonic() + within(seconds)
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"{what} did not come within {within(seconds):g} s"
        time.sleep(0.2)
    return answer


def processes_with(variable: str, start: str) -> list[psutil.Process]:
    """Living processes whose environment has such a value."""
    return [
        process
        for process in psutil.process_iter(["environ", "status"])
        if (process.info["environ"] or {}).get(variable, "").startswith(start)
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]


class Pages:
    """The three servers over ``folder/roma``, and GraphQL requests to Dagster.

    Attributes:
        output: what ``up`` printed until the pages were there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        """
        Args:
            settings: more variables of its environment.

        Raises:
            RuntimeError: the pages did not start; the text has what was printed.
        """
        self.folder = folder
        self.storage = folder / "roma"
        with contextlib.ExitStack() as held:
            sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
            ports = [listener.getsockname()[1] for listener in sockets]
        self.dagster, self.mlflow, self.overview = (f"http://127.0.0.1:{port}" for port in ports)
        (folder / "empty.env").touch()
        self.child = subprocess.Popen(
            [
                *(sys.executable, "-m", "roma_pipelines.cli", "up"),
                *("--dagster-port", str(ports[0]), "--mlflow-port", str(ports[1])),
                *("--page-port", str(ports[2])),
            ],
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"}
            | {
                "HOME": str(folder),
                "PYTHONPATH": str(ROOT),
                "PYTHONUNBUFFERED": "1",
                "ROMA_ENV_FILE": str(folder / "empty.env"),
                "ROMA_STORAGE_ROOT": str(self.storage),
                **(settings or {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.output += line
            if "Ctrl-C stops them" in line:
                return
        raise RuntimeError(f"the pages did not start:\n{self.output}")

    def stop(self) -> None:
        """Stop as Ctrl-C does, and check that no process is left.

        Raises:
            AssertionError: a process over this storage root was left; it is killed.
        """
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            self.child.wait(within(20))
        left = processes_with("ROMA_STORAGE_ROOT", str(self.storage))
        for process in left:
            process.kill()
        assert left == []

    def ask(self, query: str, **variables: Any) -> Any:
        """The data of a GraphQL answer."""
        request = urllib.request.Request(
            f"{self.dagster}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=within(10)) as answer:
            document = json.load(answer)
        assert "errors" not in document, document
        return document["data"]

    def runs(self) -> list[dict[str, Any]]:
        """All Dagster runs, the newest first."""
        query = "{ runsOrError { ... on Runs { results { runId status } } } }"
        return self.ask(query)["runsOrError"]["results"]

    def story(self, run_id: str) -> str:
        """The run's last events, for messages of failed tests."""
        query = """query ($id: ID!) { runOrError(runId: $id) { ... on Run { eventConnection { events {
            ... on MessageEvent { message }
            ... on ExecutionStepFailureEvent { error { message cause { message } } } } } } } }"""
        events = self.ask(query, id=run_id)["runOrError"]["eventConnection"]["events"]
        return "\n".join(str(event) for event in events[-12:])

    def status(self, run_id: str) -> str:
        return next(run["status"] for run in self.runs() if run["runId"] == run_id)
