"""``roma-pipeline up``: the Dagster page, the MLflow page and an overview over the same state."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import click

from roma_core.files import write_json

if TYPE_CHECKING:
    from roma_pipelines.storage import Storage

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 20.0


@click.command()
@click.option("--dagster-port", default=3000, show_default=True, help="Port of the Dagster page.")
@click.option("--mlflow-port", default=5000, show_default=True, help="Port of the MLflow page.")
@click.option("--page-port", default=8000, show_default=True, help="Port of the overview.")
def up(dagster_port: int, mlflow_port: int, page_port: int) -> None:
    """Serve Dagster (with its daemon: schedules and sensors), MLflow and an overview on 127.0.0.1.

    The overview shows every experiment with its champion, its past accuracies and its last runs, and
    leads to reports and logs. All show what is under .roma/, or in the database of
    ROMA_STORAGE_DATABASE_URL. Ctrl-C stops them; training jobs that are running go on and are found
    again.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # its queue of background jobs serves features that are not used here, with four more processes
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    for name, port, option in (
        ("Dagster", dagster_port, "--dagster-port"),
        ("MLflow", mlflow_port, "--mlflow-port"),
        ("Overview", page_port, "--page-port"),
    ):
        _check_free(name, port, option)
    from roma_pipelines.pages.links import announce
    from roma_pipelines.registry.store import (
        MlflowSettings,
        StoreError,
        check_access,
        is_server,
        own_store,
    )
    from roma_pipelines.storage import Storage, StorageError, prepare_instance

    try:
        storage = Storage.open()
        home = prepare_instance(storage)
        settings = MlflowSettings()
        check_access(settings)
        uri = settings.tracking_uri or own_store(storage.mlflow)
    except (StorageError, StoreError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error

    dagster, mlflow = f"http://127.0.0.1:{dagster_port}", f"http://127.0.0.1:{mlflow_port}"
    commands = {"Dagster": (_dagster(dagster_port, home), dagster)}
    if not is_server(uri):
        commands["MLflow"] = (_mlflow(mlflow_port, uri, storage), mlflow)
    else:
        mlflow = uri
        click.echo(f"MLflow    {uri} (configured; not started here)")
    overview = f"http://127.0.0.1:{page_port}"
    commands["Overview"] = (_overview(page_port, dagster, mlflow), overview)
    announce(overview, mlflow)
    logs = home / "logs"
    logs.mkdir(exist_ok=True)
    with _Servers(logs) as servers:
        for name, (command, _) in commands.items():
            servers.start(name, command)
        for name, (_, address) in commands.items():
            servers.wait_until_answering(name, address)
            click.echo(f"{name:<9} {address}")
        click.echo(f"logs      {logs}\nCtrl-C stops them.")
        ended = servers.wait()
        click.echo("stopping the servers; training jobs go on")
    if ended:
        raise click.ClickException(f"{ended} ended by itself; see its log in {logs}")
    click.echo("stopped")


def _check_free(name: str, port: int, option: str) -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise click.ClickException(
                f"port {port}, for {name}, is in use ({error.strerror}); stop what uses it, or give another "
                f"with {option}"
            ) from error


def _dagster(port: int, home: Path) -> list[str]:
    # the name that workspace.yaml gives too: schedules and runs belong to a location by its name
    module = {"module_name": "roma_pipelines.definitions", "location_name": "roma_pipelines"}
    write_json(home / "workspace.yaml", {"load_from": [{"python_module": module}]})
    return [
        *(sys.executable, "-m", "dagster", "dev", "-w", str(home / "workspace.yaml")),
        *("-h", "127.0.0.1", "-p", str(port)),
    ]


def _mlflow(port: int, uri: str, storage: Storage) -> list[str]:
    return [
        *(sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri),
        *("--artifacts-destination", (storage.mlflow / "artifacts").as_uri()),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]


def _overview(port: int, dagster: str, mlflow: str) -> list[str]:
    return [
        *(sys.executable, "-m", "roma_pipelines.pages.overview", "--port", str(port)),
        *("--dagster", dagster, "--mlflow", mlflow),
    ]


class _Servers:
    """Child processes, each with its own process group, stopped together."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> _Servers:
        def stop(number: int, frame: object) -> None:
            raise KeyboardInterrupt

        # SIGINT too: a shell that started us in the background has it ignored
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for child in self.children.values():
            self._signal(child, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        for child in self.children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, deadline - time.monotonic()))
            self._signal(child, signal.SIGKILL)
            child.wait()

    def start(self, name: str, command: list[str]) -> None:
        log = (self.logs / f"{name.lower()}.log").open("ab")
        self.children[name] = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @staticmethod
    def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)

    def wait_until_answering(self, name: str, address: str) -> None:
        """Raises ClickException if the server ends, or is silent for two minutes."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self.children[name].poll() is not None:
                break
            try:
                urllib.request.urlopen(address, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.3)
        log = self.logs / f"{name.lower()}.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise click.ClickException(f"{name} did not start; the end of {log}:\n{tail}")

    def wait(self) -> str | None:
        """Until Ctrl-C (None), or until a server ends by itself (its name)."""
        try:
            while True:
                for name, child in self.children.items():
                    if child.poll() is not None:
                        return name
                time.sleep(0.5)
        except KeyboardInterrupt:
            return None
