"""Registries: the embedded store, and a real server as others would run it."""

import contextlib
import os
import signal
import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from roma_core.serving import registry_client
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.runs import find_or_create_run
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.registry.versions import COMPARED_TAG, EVIDENCE_TAGS, register
from tests import forked
from tests.core.serving import toy
from tests.time_limits import within


@pytest.fixture
def client(store_root):
    return connect(MlflowSettings.from_values({}), store_root)


@pytest.fixture(scope="session")
def other_package(tmp_path_factory):
    """One with other weights."""
    folder = tmp_path_factory.mktemp("packages") / "other"
    return folder, toy.build_toy(folder, module=toy.Toy(seed=1))


def registered_as(client, package, name, job_key, **tags):
    """The version of a package that passed the gate."""
    run_id = find_or_create_run(client, f"roma/{name}", job_key, "register", {}, {})
    evidence = {tag: f"value of {tag}" for tag in EVIDENCE_TAGS}
    gate = {GATE_TAG: "passed", COMPARED_TAG: "none"}
    return register(client, package[0], name, job_key, run_id, evidence | gate | tags, {})


@contextlib.contextmanager
def served(command, folder, ready, port=0, **environment):
    """A server process on a port of 127.0.0.1; yields its address and ends it afterwards."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        port = listener.getsockname()[1]
    # mlflow starts uvicorn by its name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    further = {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", "PATH": path}
    log = folder / "server.log"
    process = forked.start(
        *(forked.run_server, "mlflow", *command, "--host", "127.0.0.1", "--port", str(port)),
        output=log,
        cwd=folder,
        environment=os.environ | further | environment,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + within(60)
        while True:
            assert process.is_alive(), log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address + ready, timeout=5).close()
                break
            time.sleep(0.3)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.join(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def tracking_server(folder, port=0):
    """A real tracking server and registry with proxied artifacts, on the database in the folder."""
    command = [
        *("server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"),
        *("--artifacts-destination", (folder / "artifacts").as_uri()),
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return served(command, folder, "/health", port, **quiet)


@pytest.fixture(scope="session")
def mlflow_server(store_template, tmp_path_factory):
    """Address of a real tracking server and registry."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "mlflow.db").write_bytes(store_template.read_bytes())
    with tracking_server(folder) as address:
        yield address


@pytest.fixture(scope="session")
def server(mlflow_server):
    """A client of that server."""
    return registry_client.connect(mlflow_server)
