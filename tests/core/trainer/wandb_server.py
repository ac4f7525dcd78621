"""A stand-in for a Weights & Biases server: as much of its protocol as a run of metrics speaks."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.time_limits import within


class WandbServer:
    """Takes the history of runs; it can begin to listen, or go away, at any time.

    Attributes:
        url: what WANDB_BASE_URL must be, also while the server is down.
        knows_runs: whether a run was begun here.
    """

    def __init__(self, port: int) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.knows_runs = False
        self._lines: dict[tuple[str, int], dict[str, Any]] = {}
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        taken, url, me = self._lines, self.url, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _body(self) -> bytes:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                return (
                    gzip.decompress(body)
                    if self.headers.get("Content-Encoding") == "gzip"
                    else body
                )

            def _say(self, document: dict[str, Any]) -> None:
                content = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self) -> None:
                self._say({})

            def do_PUT(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._say({})

            def do_POST(self) -> None:
                document = json.loads(self._body() or b"{}")
                if self.path.endswith("/file_stream"):
                    history = document.get("files", {}).get("wandb-history.jsonl", {})
                    run = self.path.split("/")[-2]
                    for k, line in enumerate(history.get("content", [])):
                        # a line sent again, because the answer was lost, has the same place
                        taken[run, history["offset"] + k] = json.loads(line)
                    self._say({})
                else:
                    self._say({"data": _answer(document, url, me.n_lines)})
                    me.knows_runs |= "UpsertBucket" in document.get("query", "")

        self._server = _Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def n_lines(self, run: str) -> int:
        """Lines of a run's history up to now."""
        return max((n + 1 for name, n in self._lines if name == run), default=0)

    def rows(self) -> list[dict[str, Any]]:
        """The history of all runs, in the order of their lines."""
        return [self._lines[place] for place in sorted(self._lines)]


def upload(output: str, server: WandbServer, home: Path) -> None:
    """Run the ``wandb sync`` command that a training's output names."""
    *_, command = re.findall("`(wandb sync .*)`", output)
    environment = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "k" * 40, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)],
        cwd=home,  # where it writes its log
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=within(30),
    )
    assert done.returncode == 0, done.stderr


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that is gone


def _answer(document: dict[str, Any], url: str, n_lines: Callable[[str], int]) -> dict[str, Any]:
    query, variables = document.get("query", ""), document.get("variables") or {}
    if "RunResumeStatus" in query:
        bucket = None
        if n := n_lines(variables["name"]):
            bucket = {"name": variables["name"], "historyLineCount": n, "historyTail": "[]"}
            bucket |= {"eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0}
            bucket |= {"summaryMetrics": "{}", "config": "{}", "tags": [], "wandbConfig": "{}"}
        project = {"id": "m", "name": "p", "entity": {"id": "e", "name": "e"}}
        return {"model": project | {"bucket": bucket}}
    if "UpsertBucket" in query:
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "e"}}
        bucket = {
            "id": "b",
            "name": variables["name"],
            "displayName": variables["displayName"],
            "description": None,
            "config": "{}",
            "sweepName": None,
            "historyLineCount": n_lines(variables["name"]),
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if "CreateRunFiles" in query:
        files = [{"name": name, "uploadUrl": f"{url}/put/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
    return {}
