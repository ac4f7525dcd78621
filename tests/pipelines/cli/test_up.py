"""``roma-pipeline up``: which ports it needs, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from click.testing import CliRunner

from roma_pipelines.cli import up as command
from roma_pipelines.registry import store
from tests.time_limits import wait_until, within

ROOT = Path(__file__).parents[3]
STUBBORN = """
import http.server, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open("pid", "w").write(str(__import__("os").getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""
SERVE = """
import sys
from pathlib import Path
from roma_pipelines.cli.up import _serve
port = sys.argv[1]
_serve({"Server": (f"http://127.0.0.1:{port}", ("stubborn", port))}, Path("logs"))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_the_port_of_a_configured_mlflow_server_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(store, "check_access", lambda settings: None)
    folders = []
    monkeypatch.setattr(command, "_serve", lambda modules, logs: folders.append(logs) or [])
    ports = ["--dagster-port", str(free_port()), "--page-port", str(free_port())]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = str(listener.getsockname()[1])
        done = CliRunner().invoke(command.up, [*ports, "--mlflow-port", taken])
        monkeypatch.delenv("ROMA_MLFLOW_TRACKING_URI")
        refused = CliRunner().invoke(command.up, [*ports, "--mlflow-port", taken])

    assert done.exit_code == 0, done.output
    assert folders == [
        Path(os.environ["ROMA_STORAGE_ROOT"]) / "logs"
    ]  # not where Dagster removes it
    assert f"port {taken} is in use" in refused.output and "--mlflow-port" in refused.output


def test_a_second_interrupt_kills_a_server_that_does_not_stop(tmp_path):
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(free_port())],
        cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if "Ctrl-C stops them" in line:
            break
    server = psutil.Process(int((tmp_path / "pid").read_text()))

    process.send_signal(signal.SIGINT)
    assert "stopping the servers" in process.stdout.readline()
    time.sleep(0.3)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)

    assert process.wait(within(20)) == 0
    assert time.monotonic() - started < 15  # not the 20 s that it would wait
    wait_until(lambda: not server.is_running(), 5, "the server's end")
