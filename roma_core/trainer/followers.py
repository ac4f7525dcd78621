"""MLflow and Weights & Biases follow ``metrics.jsonl``; neither can slow or end a run.

A follower sends the records between its own offset and the committed one, with each record's own
time, and then moves its offset. It runs as a thread beside rank 0, and once more at the outcome of
the job, so a tracker that was down misses nothing. Only steps that a checkpoint covers are sent,
so a resume sends no step twice.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from roma_core.files import read_json, write_json
from roma_core.settings import RomaSettings
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.metrics_log import read_records

log = logging.getLogger(__name__)
_BATCH = 1000  # MLflow takes at most this many metrics in one call
_RETRY_S = 15.0
_LAST_TRY_S = 10.0  # how long a finished run waits for its followers


class WandbConfig(RomaSettings):
    """Weights & Biases; off unless a key or a mode is given."""

    model_config = SettingsConfigDict(env_prefix="ROMA_WANDB_")

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="'auto' is online if WANDB_API_KEY is set, else disabled."
    )
    init_timeout_s: int = Field(10, gt=0, description="Longest wait for the server at the start.")

    @property
    def effective_mode(self) -> Literal["online", "offline", "disabled"]:
        if self.mode != "auto":
            return self.mode
        return "online" if os.environ.get("WANDB_API_KEY") else "disabled"


Record = dict[str, Any]
Sender = Callable[[list[Record]], None]


def forward(metrics: Path, offset_file: Path, end: int | None, send: Sender) -> int:
    """Send the records between the persisted offset and byte ``end``; returns the new offset.

    The offset is written after the tracker took a batch. A kill in between sends that batch again
    with equal times, which MLflow stores once.
    """
    start = int(read_json(offset_file)["offset"]) if offset_file.exists() else 0
    batch: list[Record] = []
    reached = start

    def flush() -> None:
        if batch:
            send(batch)
            write_json(offset_file, {"schema_version": 1, "offset": reached})
            batch.clear()

    for offset, record in read_records(metrics, start, end):
        if batch and sum(len(r["metrics"]) for r in batch) + len(record["metrics"]) > _BATCH:
            flush()
        batch.append(record)
        reached = offset
    flush()
    return reached


def mlflow_sender(tracking_uri: str, run_id: str) -> Sender:
    """Sends records to an MLflow run."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(tracking_uri=tracking_uri)

    def send(records: list[Record]) -> None:
        metrics = [
            Metric(name, value, round(record["time"] * 1000), record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        client.log_batch(run_id, metrics=metrics)

    return send


def wandb_sender(config: WandbConfig, trainer: TrainerConfig, folder: Path) -> Sender:
    """Sends records to a Weights & Biases run named after the folder; offline if no server answers."""
    import wandb

    settings = wandb.Settings(
        init_timeout=config.init_timeout_s,
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
    )
    arguments: dict[str, Any] = {
        "project": trainer.project_name,
        "entity": trainer.entity_name,
        "name": trainer.run_name or folder.name,
        "id": folder.name,
        "resume": "allow",
        "dir": str(folder),
        "settings": settings,
    }
    try:
        run = wandb.init(mode=config.effective_mode, **arguments)
    except Exception as error:
        if config.effective_mode != "online":
            raise
        log.warning("Weights & Biases did not answer (%s); logging offline", error)
        run = wandb.init(mode="offline", **arguments)
    run.define_metric("*", step_metric="trainer/global_step")

    def send(records: list[Record]) -> None:
        for record in records:
            # no step=: a replay after a resume is then a point, not a dropped row
            run.log(
                {
                    **record["metrics"],
                    "trainer/global_step": record["step"],
                    "epoch": record["epoch"],
                }
            )

    return send


class Followers:
    """The follower threads of one run."""

    def __init__(self, metrics: Path, makers: dict[str, Callable[[], Sender]]) -> None:
        self.metrics = metrics
        self._followers = [_Follower(metrics, name, maker) for name, maker in makers.items()]

    @classmethod
    def of_environment(cls, folder: Path, trainer: TrainerConfig) -> Followers:
        """MLflow if ``MLFLOW_TRACKING_URI`` and ``MLFLOW_RUN_ID`` are set; wandb as configured."""
        makers: dict[str, Callable[[], Sender]] = {}
        uri, run_id = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_RUN_ID")
        if uri and run_id:
            makers["mlflow"] = lambda: mlflow_sender(uri, run_id)
        wandb_config = WandbConfig()
        if trainer.log_wandb and wandb_config.effective_mode != "disabled":
            if importlib.util.find_spec("wandb") is None:
                raise ModuleNotFoundError("ROMA_WANDB_MODE asks for wandb, which is not installed")
            makers["wandb"] = lambda: wandb_sender(wandb_config, trainer, folder)
        return cls(folder / "metrics.jsonl", makers)

    def start(self, offset: int) -> None:
        """Begin; ``offset`` bytes of metrics.jsonl are committed already."""
        for follower in self._followers:
            follower.cut(offset)
            follower.committed = offset
            follower.start()

    def committed(self, offset: int) -> None:
        """A checkpoint now covers the first ``offset`` bytes of metrics.jsonl."""
        for follower in self._followers:
            follower.committed = offset
            follower.news.set()

    def close(self) -> None:
        """Give every follower a last, bounded chance."""
        for follower in self._followers:
            follower.ending = True
            follower.news.set()
        for follower in self._followers:
            follower.join(timeout=_LAST_TRY_S)


class _Follower(threading.Thread):
    """Forwards to one tracker; its failures are warnings."""

    def __init__(self, metrics: Path, name: str, make: Callable[[], Sender]) -> None:
        super().__init__(name=f"follower-{name}", daemon=True)
        self.metrics, self.make = metrics, make
        self.offset_file = metrics.with_name(f"{name}.offset.json")
        self.committed = 0
        self.ending = False
        self.news = threading.Event()
        self._send: Sender | None = None
        self._warned = False

    def cut(self, offset: int) -> None:
        """Forget an offset beyond the checkpoint that the run resumes from."""
        if self.offset_file.exists() and int(read_json(self.offset_file)["offset"]) > offset:
            write_json(self.offset_file, {"schema_version": 1, "offset": offset})

    def run(self) -> None:
        while True:
            ending = self.ending
            failed = not self._try()
            if ending:
                return
            self.news.wait(timeout=_RETRY_S if failed else None)
            self.news.clear()

    def _try(self) -> bool:
        try:
            if self._send is None:
                self._send = self.make()
            forward(self.metrics, self.offset_file, self.committed, self._send)
        except Exception as error:  # a tracker that is down must never end a run
            if not self._warned:
                log.warning(
                    "%s: %s; training goes on, its metrics wait in %s",
                    self.name,
                    error,
                    self.metrics,
                )
            self._warned = True
            return False
        return True
