"""``roma-pipeline up``: the Dagster page, the MLflow page and an overview over the same state."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from roma_core.files import write_json
from roma_pipelines.registry import store
from roma_pipelines.storage import Storage, prepare_instance


@click.command(epilog="Example: roma-pipeline up --dagster-port 3001")
@click.option("--dagster-port", default=3000, show_default=True, help="Port of the Dagster page.")
@click.option("--mlflow-port", default=5000, show_default=True, help="Port of the MLflow page.")
@click.option("--page-port", default=8000, show_default=True, help="Port of the overview.")
def up(dagster_port: int, mlflow_port: int, page_port: int) -> None:
    """Serve Dagster (with its daemon: schedules and sensors), MLflow and an overview on 127.0.0.1.

    The overview shows every experiment with its champion, past accuracies and last runs, and links
    to reports and logs. All pages show the state under .roma/, or in the database of
    ROMA_STORAGE_DATABASE_URL. Ctrl-C stops them; running training jobs continue and are found again.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # its job queue serves features that are not used here, with four more processes
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    settings = store.MlflowSettings()
    elsewhere = store.is_server(settings.tracking_uri or "")
    ports = {"dagster": dagster_port, "page": page_port}
    for name, port in (ports if elsewhere else {**ports, "mlflow": mlflow_port}).items():
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as error:
                raise click.ClickException(
                    f"port {port} is in use ({error.strerror}); stop what uses it, or give another "
                    f"one with --{name}-port"
                ) from error
    storage = Storage.open()
    home = prepare_instance(storage)
    store.check_access(settings)
    uri = settings.tracking_uri or store.own_store(storage.mlflow)

    # the location's name is that of workspace.yaml: schedules and runs belong to a location by name
    module = {"module_name": "roma_pipelines.definitions", "location_name": "roma_pipelines"}
    write_json(home / "workspace.yaml", {"load_from": [{"python_module": module}]})
    dagster, overview = f"http://127.0.0.1:{dagster_port}", f"http://127.0.0.1:{page_port}"
    mlflow = uri if elsewhere else f"http://127.0.0.1:{mlflow_port}"
    modules: dict[str, tuple[str, Sequence[str]]] = {}
    workspace = ("-w", str(home / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(dagster_port))
    modules["Dagster"] = dagster, ("dagster", "dev", *workspace)
    if elsewhere:
        click.echo(f"MLflow    {uri} (configured; not started here)")
    else:
        artifacts = ("--artifacts-destination", (storage.mlflow / "artifacts").as_uri())
        server = ("--host", "127.0.0.1", "--port", str(mlflow_port), "--workers", "1")
        modules["MLflow"] = (
            mlflow,
            ("mlflow", "server", "--backend-store-uri", uri, *artifacts, *server),
        )
    pages = ("--port", str(page_port), "--dagster", dagster, "--mlflow", mlflow)
    modules["Overview"] = overview, ("roma_pipelines.pages.overview", *pages)
    # links on assets lead there, unless other addresses are configured
    os.environ.setdefault("ROMA_PAGE_OVERVIEW_URL", overview)
    os.environ.setdefault("ROMA_PAGE_MLFLOW_URL", mlflow)
    addresses = {name: address for name, (address, _) in modules.items()}
    write_json(storage.root / "servers.json", addresses)  # for `roma-pipeline status`
    logs = storage.root / "logs"  # not in DAGSTER_HOME: Dagster sends and removes all in its `logs`
    if ended := _serve(modules, logs):
        raise click.ClickException(f"{ended[0]} exited; see its log in {logs}")
    click.echo("stopped")


def _serve(modules: dict[str, tuple[str, Sequence[str]]], logs: Path) -> list[str]:
    """Run modules until Ctrl-C, or until one exits, then stop all; returns those that exited.

    ``modules``: name -> address that answers when it is ready; module and arguments.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: it is ignored in a process that a shell started in the background
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    logs.mkdir(exist_ok=True)
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, (_, module) in modules.items():
            with (logs / f"{name.lower()}.log").open("ab") as log:
                io: Any = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                command = [sys.executable, "-m", *module]
                children[name] = subprocess.Popen(command, start_new_session=True, **io)
        for name, (address, _) in modules.items():
            _wait_until_answering(children[name], address, name, logs / f"{name.lower()}.log")
            click.echo(f"{name:<9} {address}")
        ended: list[str] = []
        with contextlib.suppress(KeyboardInterrupt):
            # inside: who reads this line may interrupt before ``echo`` has returned
            click.echo(f"logs      {logs}\nCtrl-C stops them.")
            while not ended:
                time.sleep(0.5)
                ended = [name for name, child in children.items() if child.poll() is not None]
        click.echo("stopping the servers; training jobs continue")
        return ended
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for child in children.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
            deadline = time.monotonic() + 20.0
            # a second Ctrl-C kills them at once
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                for child in children.values():
                    child.wait(max(0.1, deadline - time.monotonic()))


def _wait_until_answering(
    child: subprocess.Popen[bytes], address: str, name: str, log: Path
) -> None:
    deadline = time.monotonic() + 120.0
    while time.monotonic() < deadline and child.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.3)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise click.ClickException(f"{name} did not start; the end of {log}:\n{tail}")
