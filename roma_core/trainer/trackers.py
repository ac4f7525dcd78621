"""The trackers that can follow a run: MLflow, and Weights & Biases where it is configured.

A tracker takes records as ``metrics.jsonl`` has them, with the record's own time. Building one and
sending may raise whatever the tracker raises; :mod:`roma_core.trainer.followers` copes with that.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.metrics_log import Record

log = logging.getLogger(__name__)
_MLFLOW_BATCH = 1000  # metrics that MLflow takes in one call
_ANSWER_S = 2.0  # how long a server is given to say anything at all
_Mode = Literal["online", "offline", "disabled"]


class Tracker(Protocol):
    """One run at one tracker."""

    def send(self, records: list[Record]) -> None: ...
    def close(self) -> None: ...


def import_tracker(name: Literal["mlflow", "wandb"]) -> None:
    """Import a tracker's package, without its telemetry.

    Called in the main thread before the training loop: a loader process that is forked while
    another thread imports would inherit a lock that nobody releases.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # without a network, this one alone delays the end of the process by 20 s
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    importlib.import_module(name)


class MlflowRun:
    """An existing MLflow run, by its id. A point that arrives twice with equal time is kept once."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        import_tracker("mlflow")
        from mlflow import MlflowClient

        self.run_id = run_id
        self.client = MlflowClient(tracking_uri=tracking_uri)

    def send(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_mlflow_name(name), value, round(record["time"] * 1000), record["step"])
            for record in records
            for name, value in record["metrics"].items()
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _MLFLOW_BATCH])

    def close(self) -> None:
        """Nothing: whoever made the run ends it."""


def _mlflow_name(name: str) -> str:
    """MLflow refuses a whole batch for one other character, e.g. ``eval/f1 (macro)``."""
    return re.sub(r"[^\w/\-. :]", "_", name)


class WandbConfig(RomaSettings):
    """Weights & Biases; off unless a key or a mode is given."""

    model_config = SettingsConfigDict(env_prefix="ROMA_WANDB_")

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto",
        description="'auto' takes WANDB_MODE of the environment, else is online if there is a key, "
        "else disabled.",
    )
    api_key: SecretStr | None = Field(
        None, description="Key; null takes WANDB_API_KEY of the environment."
    )
    init_timeout_s: int = Field(
        5, gt=0, description="Longest wait for a server that answers to begin a run, in seconds."
    )
    finish_timeout_s: int = Field(
        5,
        gt=0,
        description="Longest wait for uploads at the end, in seconds; what is left stays on disk "
        "for `wandb sync`.",
    )

    @property
    def effective_mode(self) -> _Mode:
        """What 'auto' comes to in this environment."""
        if self.mode != "auto":
            return self.mode
        match os.environ.get("WANDB_MODE"):
            case "online" | "offline" | "disabled" as mode:
                return mode
        has_key = self.api_key is not None or bool(os.environ.get("WANDB_API_KEY"))
        return "online" if has_key else "disabled"


class WandbRun:
    """A Weights & Biases run, new or continued, in a folder below that of the training."""

    def __init__(
        self,
        config: WandbConfig,
        trainer: TrainerConfig,
        folder: Path,
        run_id: str,
        mode: Literal["online", "offline"],
    ) -> None:
        """Begin, or go on.

        Raises:
            ConnectionError: online, and the server does not answer; seen after two seconds at most.
            Exception: whatever else wandb raises.
        """
        import_tracker("wandb")
        import wandb

        key = config.api_key
        settings = wandb.Settings(
            api_key=None if key is None else key.get_secret_value(),
            init_timeout=config.init_timeout_s,
            login_timeout=config.init_timeout_s,  # nobody answers a question asked here
            finish_timeout=config.finish_timeout_s,
            finish_timeout_raises=True,
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_stats=True,
        )
        if mode == "online":
            # wandb itself would ask again and again; setup knows the server of every settings file
            _must_answer(wandb.setup().settings.base_url)
        try:
            self.run = wandb.init(
                mode=mode,
                project=trainer.project_name,
                entity=trainer.entity_name,
                name=trainer.run_name or folder.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=trainer.model_dump(mode="json"),
                settings=settings,
            )
        except Exception:
            wandb.teardown()  # else the id of the failed start counts as in use
            raise
        self.run.define_metric("*", step_metric="trainer/global_step")
        self.folder = Path(self.run.dir).parent
        if mode == "offline":
            log.warning(
                "Weights & Biases: offline; `wandb sync %s` uploads the metrics", self.folder
            )

    def send(self, records: list[Record]) -> None:
        for record in records:
            # no step=: a replay after a resume is then a point, not a dropped row
            place = {"trainer/global_step": record["step"], "epoch": record["epoch"]}
            self.run.log({**record["metrics"], **place, "_timestamp": record["time"]})

    def close(self) -> None:
        """Wait for the uploads, but not longer than configured."""
        try:
            self.run.finish()
        except TimeoutError:
            log.warning(
                "Weights & Biases has not taken everything; `wandb sync %s` uploads the rest",
                self.folder,
            )


def _must_answer(url: str) -> None:
    """Raise ConnectionError if nobody answers at ``url``; whatever is said will do."""
    try:
        urllib.request.urlopen(url, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise ConnectionError(f"{url} does not answer ({error})") from error
