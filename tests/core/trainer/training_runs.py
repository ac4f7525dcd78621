"""Small trainings in forked processes of their own, to be killed, stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
    Trainer,
    TrainerConfig,
)
from roma_core.trainer.checkpoint import load_newest
from roma_core.trainer.metrics import WALL_CLOCK
from tests import forked
from tests.time_limits import wait_until, within

SHAPE = {
    "encoder_config": EncoderConfig(d_model=16, nhead=2, depth=2, hidden_drop_rate=0.1),
    "tubelet_size": (1, 1, 1),
    "n_channels": 2,
    "n_pos_dims": 1,
}
DECODER = EncoderConfig(d_model=12, nhead=1, depth=1)


class Sines:
    """Two classes of noisy sines at irregular times."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict:
        g = np.random.default_rng(i)
        length, label = g.integers(4, 12), i % 2
        t = np.sort(g.uniform(0, 10, length))
        wave = np.sin(t * (1 + label))
        values = np.stack([wave, np.cos(t) + label], 1) + g.normal(0, 0.05, (length, 2))
        return {
            "values": torch.tensor(values, dtype=torch.float32)[:, :, None, None],
            "positions": torch.tensor(t, dtype=torch.float32)[None],
            "label": label,
        }


class Waves(torch.utils.data.Dataset):
    """Two classes of waves of very different lengths."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        t = np.linspace(0, 6, 5 + 3 * (i % 13))
        values = np.stack([np.sin(t * (1 + i % 2)), np.cos(t)], 1).astype(np.float32)
        item = {"values": values[:, :, None, None], "positions": t[None].astype(np.float32)}
        return {**item, "label": i % 2, "pad_mask": np.arange(len(t)) == 0}


class SlowSines(Sines):
    """Every item takes a tenth of a second."""

    def __getitem__(self, i: int) -> dict:
        time.sleep(0.1)
        return super().__getitem__(i)


class StuckSines(Sines):
    """Every second item blocks, and a loader that ends waits 1,000 s for each of its processes."""

    def __setstate__(self, state: dict) -> None:
        torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 1000.0
        self.__dict__.update(state)

    def __getitem__(self, i: int) -> dict:
        if i % 2:
            time.sleep(1000)
        return super().__getitem__(i)


def config(folder: Path | str, **changes: Any) -> TrainerConfig:
    values = {
        "base_lr": 5e-3,
        "epochs": 4,
        "batch_size": 8,
        "eval_every": 7,
        "save_every": 5,
        "log_every": 1,
        "checkpoint_dir": Path(folder) / "checkpoints",
    }
    return TrainerConfig(**values | changes)


def autoencoder() -> RoMAForPreTraining:
    torch.manual_seed(0)
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**SHAPE, decoder_config=DECODER))


def plain_autoencoder() -> RoMAForPreTraining:
    """No dropout, so nothing random depends on the process; float64, so that rounding stays small."""
    torch.manual_seed(0)
    shape = SHAPE | {"encoder_config": EncoderConfig(d_model=16, nhead=2, depth=2)}
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**shape, decoder_config=DECODER)).double()


def classifier() -> RoMAForClassification:
    torch.manual_seed(0)
    return RoMAForClassification(RoMAForClassificationConfig(**SHAPE, dim_output=2))


def autoencoder_of_windows() -> RoMAForPreTraining:
    """No dropout; with convolutions and their running statistics, in float64."""
    torch.manual_seed(0)
    shape = SHAPE | {"encoder_config": EncoderConfig(d_model=16, nhead=2, depth=2)}
    shape |= {"window": 4, "grid_step": 0.25, "stem_width": 8, "use_cls": False}
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**shape, decoder_config=DECODER)).double()


def plain_classifier() -> RoMAForClassification:
    """No dropout."""
    torch.manual_seed(0)
    shape = SHAPE | {"encoder_config": EncoderConfig(d_model=16, nhead=2, depth=2)}
    return RoMAForClassification(RoMAForClassificationConfig(**shape, dim_output=2))


@dataclass
class Plan:
    """One training, as it is passed to a process.

    Attributes:
        folder: of the run.
        changes: of the trainer's configuration.
        model: makes the model.
        train, test: the data sets.
        prepare: called first, in the process.
    """

    folder: Path
    changes: dict[str, Any]
    model: Callable[[], Any] = autoencoder
    train: Any = Sines(41)  # noqa: RUF009 - has no state
    test: Any = Sines(12)  # noqa: RUF009
    prepare: Callable[[Trainer], None] | None = None


def _train(plan: Plan) -> None:
    trainer = Trainer(config(plan.folder, **plan.changes))
    if plan.prepare is not None:
        plan.prepare(trainer)
    end = trainer.train(plan.train, plan.test, plan.model())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    line = f"END {end.status} {end.step} {end.world_size}\n"
    os.write(1, line.encode())  # at once: several processes may share the pipe


class Started:
    """The processes of one training."""

    def __init__(self, plan: Plan, processes: int = 1, **environment: str) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        plan.folder.mkdir(parents=True, exist_ok=True)
        self.folder = plan.folder
        number = len(list(plan.folder.glob("*.log")))
        self.logs = [plan.folder / f"{number + rank}.log" for rank in range(processes)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.touch()
            ranks = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            world = ranks if processes > 1 else {}
            values = dict(os.environ) | forked.ENVIRONMENT | world | environment
            self.processes.append(forked.start(_train, plan, output=log, environment=values))

    @property
    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def is_running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def end(self, seconds: float = 60) -> str:
        """Wait for all; what they said."""
        for process in self.processes:
            process.join(within(seconds))
        if self.is_running():
            said = self.output
            self.send(signal.SIGKILL)
            raise AssertionError(f"it did not end:\n{said}")
        return self.output

    @property
    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]


def run(plan: Plan, processes: int = 1, **environment: str) -> str:
    """Train to the end; what the processes said."""
    started = Started(plan, processes, **environment)
    output = started.end()
    assert set(started.exit_codes) == {0}, output
    return output


def interrupt(
    plan: Plan, when: Callable[[], bool], number: int, processes: int = 1, **environment: str
) -> Started:
    """Train, and send a signal to all processes at the moment ``when`` is true; waits for the end."""
    started = Started(plan, processes, **environment)
    while started.is_running():
        if when():
            started.send(number)
            break
        time.sleep(0.0005)
    started.end()
    return started


def records_reach(folder: Path, n: int) -> Callable[[], bool]:
    """True once more than ``n`` records are written."""
    path = folder / "checkpoints/metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") > n


def last_step(folder: Path) -> int:
    """Step of the last whole record; 0 before the first."""
    path = folder / "checkpoints/metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is half written, or was when its writer was killed."""
    return any((folder / "checkpoints").glob(".step-*"))


def points(folder: Path | str) -> list[tuple[str, int, float]]:
    """(name, step, value) of every metric in the order of the file, but for wall-clock times."""
    lines = (Path(folder) / "checkpoints/metrics.jsonl").read_text().splitlines()
    return [
        (name, r["step"], value)
        for r in map(json.loads, lines)
        for name, value in r["metrics"].items()
        if name not in WALL_CLOCK
    ]


def weights(folder: Path | str) -> tuple[Any, dict[str, torch.Tensor]]:
    """State and weights of the newest checkpoint."""
    checkpoint = load_newest(Path(folder) / "checkpoints")
    assert checkpoint is not None
    return checkpoint.state, load_file(checkpoint.path / "model.safetensors")


def assert_same_end(found: Path, expected: Path) -> None:
    """Bit-equal weights, and every metric once with the same value."""
    (state, theirs), (again, ours) = weights(expected), weights(found)
    assert state.step == again.step
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert points(found) == points(expected)


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
    """Every (name, step, value) of ``metrics.jsonl`` is in the store once, wall-clock ones aside."""
    from roma_core.trainer.trackers import forward_to_mlflow

    metrics = folder / "checkpoints/metrics.jsonl"
    forward_to_mlflow(metrics, store.uri, store.run_id)  # as the outcome of a job does
    expected = sorted(points(folder))
    assert len({p[:2] for p in expected}) == len(expected) > 0
    assert [p for p in store.points() if p[0] not in WALL_CLOCK] == expected


class MlflowServer:
    """A real MLflow server over a store, which can be killed and started again on its port."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process: Any = None
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = ["server", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # starts faster
        self.process = forked.start(
            *(forked.run_server, "mlflow", *command),
            output=self.root / "server.log",
            cwd=self.root,
            environment=environment,
        )
        wait_until(self.answers, 60, f"a server (log: {self.root / 'server.log'})")

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def stop_answering(self) -> None:
        """Connections are still accepted."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()
