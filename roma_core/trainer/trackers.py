"""The trackers that can follow a run: MLflow, and Weights & Biases where it is configured.

A tracker takes records as ``metrics.jsonl`` has them, with the record's own time. Building one and
sending may raise whatever the tracker raises; :mod:`roma_core.trainer.trackers` copes with that.

MLflow and Weights & Biases follow ``metrics.jsonl``; neither can slow or end a run.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import secrets
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import read_json, write_json
from roma_core.settings import RomaSettings
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.metrics import Record, read_records

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


MLFLOW_RUN_VARIABLE = "ROMA_JOB_MLFLOW_RUN"
_BATCH = 500  # records sent before the bookmark moves
_RETRY_S = 15.0
_RUN_WITHIN_S = 30.0
_LAST_TRY_S = 10.0  # how long a finished run waits for its followers


class Bookmark:
    """How much one run at a tracker has been told: ``<tracker>.offset.json``.

    Attributes:
        run_id: of the run at the tracker; a bookmark of another run is not believed.
        offset: bytes of ``metrics.jsonl`` that were sent.
        step: the last step that was sent; -1 if none was.
        names: the metrics of that step that were sent. A step's evaluation may follow later than
            its training loss, if a stop request came in between.
    """

    def __init__(
        self, path: Path, run_id: str | None = None, resumed_at: int | None = None
    ) -> None:
        """Open ``path``.

        Args:
            path: of the bookmark; it need not exist.
            run_id: at the tracker; None takes the one in the file, or a new one.
            resumed_at: bytes that the checkpoint covers from which the run goes on. 0 is a new
                training, whose steps were not sent yet, whatever the bookmark says.
        """
        found = read_json(path, schema_version=1) if path.exists() else None
        if found and (run_id not in (None, found["run_id"]) or (resumed_at == 0 < found["offset"])):
            found = None
        self.path = path
        self.run_id: str = run_id or (found["run_id"] if found else secrets.token_hex(8))
        self.offset: int = found["offset"] if found else 0
        self.step: int = found["step"] if found else -1
        self.names: set[str] = set(found.get("names", [])) if found else set()
        if resumed_at is not None:
            self.offset = min(self.offset, resumed_at)
        self._write()

    def unsent(self, record: Record) -> Record | None:
        """The part of a record that was not sent before the run fell back; None if all was."""
        if record["step"] != self.step:
            return record if record["step"] > self.step else None
        new = {k: v for k, v in record["metrics"].items() if k not in self.names}
        return {**record, "metrics": new} if new else None

    def move(self, offset: int, sent: list[Record]) -> None:
        """Everything up to ``offset`` was sent, with these records as the last."""
        step = sent[-1]["step"]
        if step > self.step:
            self.names = set()
        self.names |= {name for r in sent if r["step"] == step for name in r["metrics"]}
        self.offset, self.step = offset, step
        self._write()

    def _write(self) -> None:
        document = {"run_id": self.run_id, "offset": self.offset, "step": self.step}
        write_json(self.path, {"schema_version": 1, **document, "names": sorted(self.names)})


def forward(
    metrics: Path, bookmark: Bookmark, end: int | None, send: Callable[[list[Record]], None]
) -> None:
    """Send the records between the bookmark and byte ``end``; None is the end of the file.

    The bookmark moves after the tracker took a batch. A kill in between sends that batch again with
    equal times, which MLflow stores once.
    """
    batch: list[Record] = []
    reached = bookmark.offset
    for offset, record in read_records(metrics, bookmark.offset, end):
        if (unsent := bookmark.unsent(record)) is not None:
            # a batch ends where a step does, or the bookmark's step would be half sent
            if len(batch) >= _BATCH and record["step"] > batch[-1]["step"]:
                send(batch)
                bookmark.move(reached, batch)
                batch = []
            batch.append(unsent)
        reached = offset
    if batch:
        send(batch)
        bookmark.move(reached, batch)


def forward_to_mlflow(metrics: Path, tracking_uri: str, run_id: str) -> None:
    """Send an MLflow run what the thread beside a training could not, once that has ended.

    Raises:
        Exception: whatever MLflow raises; nothing is lost then, and another call goes on from there.
    """
    bookmark = Bookmark(_bookmark_of(metrics, "mlflow"), run_id)
    forward(metrics, bookmark, None, MlflowRun(tracking_uri, run_id).send)


def _bookmark_of(metrics: Path, tracker: str) -> Path:
    return metrics.with_name(f"{tracker}.offset.json")


def _run_in(path: Path) -> str | None:
    """The id of the MLflow run in a file that the orchestrator is about to write; None without one.

    It writes it two seconds after this job was accepted; torch alone takes longer to be here.
    """
    deadline = time.monotonic() + _RUN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            log.warning("%s did not come; MLflow gets the metrics when the job is over", path)
            return None
        time.sleep(0.1)
    return str(read_json(path, schema_version=1)["run_id"])


class Followers:
    """The follower threads of one run."""

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics
        self._followers: list[_Follower] = []

    @classmethod
    def of_environment(cls, folder: Path, trainer: TrainerConfig) -> Followers:
        """MLflow if ``MLFLOW_TRACKING_URI`` and a run are named; wandb as configured.

        ``MLFLOW_RUN_ID`` names the run, or the file that ``ROMA_JOB_MLFLOW_RUN`` names does: a job may
        have started before its run was made.

        Raises:
            ModuleNotFoundError: a tracker is configured and not installed.
        """
        followers = cls(folder / "metrics.jsonl")
        uri, mlflow_run = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get("MLFLOW_RUN_ID")
        to_come = os.environ.get(MLFLOW_RUN_VARIABLE)
        if uri and (mlflow_run or to_come):
            import_tracker("mlflow")
            if to_come and not mlflow_run:
                mlflow_run = _run_in(Path(to_come))
        if uri and mlflow_run:
            followers.add("mlflow", lambda run_id: MlflowRun(uri, run_id), mlflow_run)
        wandb = WandbConfig()
        if trainer.log_wandb and wandb.effective_mode != "disabled":
            import_tracker("wandb")

            def run_in(mode: Literal["online", "offline"]) -> Callable[[str], Tracker]:
                return lambda run_id: WandbRun(wandb, trainer, folder, run_id, mode)

            if wandb.effective_mode == "offline":
                followers.add("wandb", run_in("offline"))
            else:
                followers.add("wandb", run_in("online"), at_last=run_in("offline"))
        return followers

    def add(
        self,
        name: str,
        make: Callable[[str], Tracker],
        run_id: str | None = None,
        at_last: Callable[[str], Tracker] | None = None,
    ) -> None:
        """Let a tracker follow.

        Args:
            name: of the tracker.
            make: connects to a run by its id; called again and again while the tracker is down.
            run_id: at the tracker; None takes a run of its own.
            at_last: makes what is told instead if the tracker was down from the start to the end.
        """
        self._followers.append(_Follower(self.metrics, name, make, run_id, at_last))

    def start(self, offset: int) -> None:
        """Begin; ``offset`` bytes of metrics.jsonl are committed already."""
        for follower in self._followers:
            follower.resumed_at = follower.committed = offset
            follower.start()

    def committed(self, offset: int) -> None:
        """A checkpoint now covers the first ``offset`` bytes of metrics.jsonl."""
        for follower in self._followers:
            follower.committed = offset
            follower.news.set()

    def close(self) -> None:
        """Give every follower a last chance, for at most ten seconds in all."""
        started = [f for f in self._followers if f.ident is not None]
        for follower in started:
            follower.ending = True
            follower.news.set()
        deadline = time.monotonic() + _LAST_TRY_S
        for follower in started:
            follower.join(timeout=max(0.0, deadline - time.monotonic()))
            if not follower.up_to_date:
                log.warning(
                    "%s has not taken all metrics; they are in %s, and resuming the run sends the rest",
                    follower.name,
                    self.metrics,
                )


class _Follower(threading.Thread):
    """Forwards to one tracker; its failures are warnings."""

    def __init__(
        self,
        metrics: Path,
        name: str,
        make: Callable[[str], Tracker],
        run_id: str | None,
        at_last: Callable[[str], Tracker] | None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.metrics, self.make, self.run_id, self.at_last = metrics, make, run_id, at_last
        self.resumed_at = self.committed = 0
        self.ending = False
        self.up_to_date = False
        self.news = threading.Event()
        self._bookmark: Bookmark | None = None
        self._tracker: Tracker | None = None
        self._is_down = False

    def run(self) -> None:
        while True:
            ending = self.ending
            if ending and self._is_down and self._tracker is None and self.at_last is not None:
                self.make, self._is_down = self.at_last, False
            self._try(self._catch_up)
            if ending:
                break
            self.news.wait(timeout=_RETRY_S if self._is_down else None)
            self.news.clear()
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _catch_up(self) -> None:
        self.up_to_date = False
        if self._bookmark is None:
            path = _bookmark_of(self.metrics, self.name)
            self._bookmark = Bookmark(path, self.run_id, self.resumed_at)
        if self._tracker is None:
            self._tracker = self.make(self._bookmark.run_id)
        forward(self.metrics, self._bookmark, self.committed, self._tracker.send)
        self.up_to_date = True

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a tracker that is down must never end a run
            if not self._is_down:
                log.warning(
                    "%s: %s; training goes on, its metrics wait in %s",
                    self.name,
                    error,
                    self.metrics,
                )
            self._is_down = True
            return
        if self._is_down:
            log.info("%s answers again", self.name)
        self._is_down = False
