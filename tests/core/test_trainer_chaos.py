"""Twenty kills at random moments, and an MLflow server that dies in between. `make chaos` runs it."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.core.training_runs import (
    Plan,
    Started,
    assert_same_end,
    is_saving,
    points,
    run,
)

pytestmark = pytest.mark.chaos
KILLS = 20
CHANGES = {"ema_decay": 0.9, "augment_drop_rate": 0.3, "epochs": 60, "log_every": 3}  # 360 steps


class Store:
    """A real MLflow store with one run, and what it holds."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri = uri
        self.client = MlflowClient(uri)
        self.run_id = self.client.create_run("0").info.run_id
        self.environment = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_RUN_ID": self.run_id}

    def points(self) -> list[tuple[str, int, float]]:
        names = self.client.get_run(self.run_id).data.metrics
        return sorted(
            (m.key, m.step, m.value)
            for name in names
            for m in self.client.get_metric_history(self.run_id, name)
        )


def assert_told_once(store: Store, folder: Path) -> None:
    from roma_core.trainer.followers import forward_to_mlflow

    metrics = folder / "checkpoints/metrics.jsonl"
    forward_to_mlflow(metrics, store.uri, store.run_id)  # as the outcome of a job does
    expected = sorted(points(folder))
    assert len({p[:2] for p in expected}) == len(expected)
    wall_clock_aside = {name for name, *_ in expected}
    assert [p for p in store.points() if p[0] in wall_clock_aside] == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_twenty_interruptions_leave_no_trace(tmp_path, store_root, number):
    """Every fourth SIGKILL waits for a save, so that some hit one."""
    seed = int(os.environ.get("ROMA_CHAOS_SEED", str(random.randrange(10**6))))
    dice = random.Random(seed)
    run(Plan(tmp_path / "unbroken", CHANGES))
    store = Store(f"sqlite:///{store_root / 'mlflow.db'}")
    broken = Plan(tmp_path / "broken", CHANGES)
    steps, hit, n_ended = [], 0, 0
    began = time.monotonic()
    for k in range(KILLS):
        started = Started(broken, **store.environment)
        while "parameters" not in started.output and started.is_running():
            time.sleep(0.001)
        wanted = number == signal.SIGKILL and k % 4 == 3
        until = time.monotonic() + dice.uniform(0, 2.5)
        while started.is_running() and time.monotonic() < until:
            time.sleep(0.0005)
        while wanted and started.is_running() and not is_saving(broken.folder):
            time.sleep(0.0002)
        started.send(number)
        started.end()
        n_ended += 0 in started.exit_codes and number == signal.SIGKILL
        hit += is_saving(broken.folder)
        found = points(broken.folder) if (broken.folder / "checkpoints").exists() else []
        steps.append(found[-1][1] if found else 0)
    output = run(broken, **store.environment)
    assert "END completed 360 1" in output
    assert_same_end(broken.folder, tmp_path / "unbroken")
    assert_told_once(store, broken.folder)
    print(
        f"seed {seed}: {KILLS} × {number.name} in {time.monotonic() - began:.0f} s, last records at steps "
        f"{steps}, {hit} in the middle of a save, {n_ended} came too late"
    )
    assert n_ended < KILLS / 2
    assert number != signal.SIGKILL or hit > 0


class Server:
    """A real MLflow server over a store, which can be killed and started again on its port."""

    def __init__(self, root: Path) -> None:
        self.root = root
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        with (self.root / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, cwd=self.root
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.root / "server.log").read_text())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def test_an_mlflow_server_that_dies_and_comes_back_misses_nothing(tmp_path, store_root):
    """It is away while a third of the run happens; the training takes no notice."""
    server = Server(store_root)
    server.start()
    try:
        store = Store(server.uri)
        plan = Plan(tmp_path, CHANGES | {"epochs": 700, "eval_every": 100, "save_every": 50})
        started = Started(plan, **store.environment, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1")
        while not store.points():
            time.sleep(0.1)
        server.kill()
        died_at = points(tmp_path)[-1][1]
        while started.is_running() and points(tmp_path)[-1][1] < died_at + 1400:
            time.sleep(0.1)
        server.start()
        came_back_at = points(tmp_path)[-1][1]
        output = started.end(200)
        assert "END completed 4200 1" in output
        assert "training goes on" in output
        print(f"the server was away from step {died_at} to {came_back_at} of 4200")
        assert_told_once(store, tmp_path)
    finally:
        server.kill()
