"""MLflow and Weights & Biases, which follow ``metrics.jsonl``; neither can slow or end a run.

A thread for each tracker sends the records that a committed checkpoint covers, with the record's own
time. Whatever a tracker raises becomes a warning, and its records are sent later. ``RunLogger``
writes the file, and shows progress.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import secrets
import shlex
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.files import read_json, write_json
from roma_core.progress import Progress
from roma_core.settings import RomaSettings, without_credentials
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.metrics import MetricsLog, Record, read_records

log = logging.getLogger(__name__)
_MLFLOW_BATCH = 1000  # metrics that MLflow takes in one call
_NOT_UPLOADED = "not_uploaded"  # marks the folder of an online run that ended before its uploads
_ANSWER_S = 2.0  # how long a server may take to answer at all


class Tracker(Protocol):
    """One run at one tracker."""

    def send(self, records: list[Record]) -> None: ...
    def close(self) -> None: ...


def import_tracker(name: Literal["mlflow", "wandb"]) -> None:
    """Import a tracker's package, without its telemetry; in the main thread, before the training loop.

    A loader process forked during the import would inherit a lock that is never released.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # without a network, this delays the end of the process by 20 s
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    importlib.import_module(name)


def require_answer(url: str) -> None:
    """Raises ConnectionError if no server answers at ``url`` within seconds; any status is an answer.

    The trackers' own clients repeat a request for minutes first.
    """
    try:
        urllib.request.urlopen(without_credentials(url), timeout=_ANSWER_S).close()
    except urllib.error.HTTPError:
        pass
    except OSError as error:
        if not isinstance(getattr(error, "reason", error), ssl.SSLError):  # clients may trust it
            raise ConnectionError(
                f"{without_credentials(url)} does not answer ({error})"
            ) from error


class MlflowRun:
    """An existing MLflow run, by its id. MLflow stores a point sent twice with equal time once."""

    def __init__(self, tracking_uri: str, run_id: str) -> None:
        import_tracker("mlflow")
        from mlflow import MlflowClient

        self.tracking_uri, self.run_id = tracking_uri, run_id
        self.client = MlflowClient(tracking_uri=tracking_uri)

    def send(self, records: list[Record]) -> None:
        from mlflow.entities import Metric

        if self.tracking_uri.startswith(("http:", "https:")):
            require_answer(self.tracking_uri)
        metrics = [
            # MLflow rejects a whole batch for one other character, e.g. eval/f1 (macro, %)
            Metric(re.sub(r"[^\w/\-. :]", "_", name), value, round(r["time"] * 1000), r["step"])
            for r in records
            for name, value in r["metrics"].items()
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + _MLFLOW_BATCH])

    def close(self) -> None:
        """Does nothing: the run is ended where it was created."""


class WandbConfig(RomaSettings):
    """Weights & Biases; off unless a key or a mode is given."""

    model_config = SettingsConfigDict(env_prefix="ROMA_WANDB_")

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """'auto' takes WANDB_MODE of the environment, else 'online' with a key and 'disabled' without."""
    api_key: SecretStr | None = None
    """Key; null takes WANDB_API_KEY of the environment."""
    init_timeout_s: int = Field(5, gt=0)
    """Timeout of the start of a run at a server that answers, in seconds."""
    finish_timeout_s: int = Field(5, gt=0)
    """Timeout of uploads at the end, in seconds; the rest stays on disk for `wandb sync`."""

    @property
    def effective_mode(self) -> Literal["online", "offline", "disabled"]:
        """The mode that 'auto' selects in this environment."""
        if self.mode != "auto":
            return self.mode
        match os.environ.get("WANDB_MODE"):
            case "online" | "offline" | "disabled" as mode:
                return mode
        has_key = self.api_key is not None or bool(os.environ.get("WANDB_API_KEY"))
        return "online" if has_key else "disabled"


def wandb_settings(config: WandbConfig) -> Any:
    """``wandb.Settings`` of an unattended process; ``import_tracker`` comes first."""
    import wandb

    key = config.api_key
    return wandb.Settings(
        api_key=None if key is None else key.get_secret_value(),
        init_timeout=config.init_timeout_s,
        login_timeout=config.init_timeout_s,  # there is no terminal to ask for a key
        finish_timeout=config.finish_timeout_s,
        finish_timeout_raises=True,
        silent=True,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,
    )


class WandbRun:
    """A Weights & Biases run, new or continued, in a folder below that of the training."""

    def __init__(
        self,
        config: WandbConfig,
        trainer: TrainerConfig,
        folder: Path,
        mode: Literal["online", "offline"],
        run_id: str,
    ) -> None:
        """Begin or resume the run.

        Raises ConnectionError without an answer within two seconds; else what wandb raises.
        """
        import_tracker("wandb")
        import wandb

        if mode == "online":  # setup has read the server's address from all settings files
            require_answer(wandb.setup().settings.base_url)
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
                settings=wandb_settings(config),
            )
        except Exception:
            wandb.teardown()  # else the id of the failed start counts as in use
            raise
        self.run.define_metric("*", step_metric="trainer/global_step")
        self.folder = Path(self.run.dir).parent

    def send(self, records: list[Record]) -> None:
        for record in records:
            # no step=: a replay after a resume is then a point, not a dropped row
            place = {"trainer/global_step": record["step"], "epoch": record["epoch"]}
            self.run.log({**record["metrics"], **place, "_timestamp": record["time"]})

    def close(self) -> None:
        """Wait for the uploads, at most ``finish_timeout_s``; name the folders that are left to upload.

        Every attempt of a training has a folder of its own. They are uploaded in one command, in the
        order of the attempts: one alone would replace the others.
        """
        try:
            self.run.finish()
        except TimeoutError:
            (self.folder / _NOT_UPLOADED).touch()
        of_run = self.folder.parent.glob(f"*run-*-{self.run.id}")
        waiting = [
            folder
            for folder in sorted(of_run, key=lambda folder: folder.name.removeprefix("offline-"))
            if not list(folder.glob("*.wandb.synced"))
            and (folder.name.startswith("offline-") or (folder / _NOT_UPLOADED).exists())
        ]
        if waiting:
            command = ["wandb", "sync", "--include-online", "--id", self.run.id, *map(str, waiting)]
            message = "Weights & Biases has not received all metrics; `%s` uploads them"
            log.warning(message, shlex.join(command))


MLFLOW_RUN_VARIABLE = "ROMA_JOB_MLFLOW_RUN"
_BATCH = 500  # records sent before the bookmark moves
_RETRY_S = 15.0
_CLOSE_TIMEOUT_S = 10.0  # how long a finished run waits for its trackers


class Bookmark:
    """How far the records were sent to one run at a tracker: ``<tracker>.offset.json``."""

    def __init__(
        self, path: Path, run_id: str | None = None, resumed_at: int | None = None
    ) -> None:
        """Open ``path``, which need not exist, and is ignored if it is of another run.

        Args:
            run_id: at the tracker; None takes the one in the file, or a new one.
            resumed_at: bytes covered by the checkpoint that the run resumes from; 0: a new training.
        """
        found = read_json(path, schema_version=1) if path.exists() else {}
        if found and (run_id not in (None, found["run_id"]) or (resumed_at == 0 < found["offset"])):
            found = {}
        self.path = path
        self.run_id: str = run_id or found.get("run_id") or secrets.token_hex(8)
        self.offset: int = found.get("offset", 0)  # bytes of metrics.jsonl that were sent
        self.step: int = found.get("step", -1)  # the last that was sent
        # its metrics that were sent: its evaluation may follow later, after a stop request
        self.names = set(found.get("names", []))
        if resumed_at is not None:
            self.offset = min(self.offset, resumed_at)
        self._write()

    def unsent(self, record: Record) -> Record | None:
        """The part of a record that was not sent before the run resumed; None if all was."""
        if record["step"] != self.step:
            return record if record["step"] > self.step else None
        new = {k: v for k, v in record["metrics"].items() if k not in self.names}
        return {**record, "metrics": new} if new else None

    def move(self, offset: int, sent: list[Record]) -> None:
        """Record that everything up to ``offset`` was sent, these records last."""
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

    A kill after a batch was received sends it again with equal times, which MLflow stores once.
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
    """After a training has ended, send MLflow the records that its thread could not.

    Whatever MLflow raises, nothing is lost, and another call continues there.
    """
    bookmark = Bookmark(metrics.with_name("mlflow.offset.json"), run_id)
    forward(metrics, bookmark, None, MlflowRun(tracking_uri, run_id).send)


class Trackers:
    """The trackers that follow one run, each in a thread."""

    def __init__(self, *threads: TrackerThread) -> None:
        self.threads = threads

    @classmethod
    def from_environment(cls, folder: Path, trainer: TrainerConfig) -> Trackers:
        """MLflow if ``MLFLOW_TRACKING_URI`` and a run are named; wandb as configured.

        The run's id is in ``MLFLOW_RUN_ID``, or in the file named by ``ROMA_JOB_MLFLOW_RUN``, which
        is written after the job began, or much later if the server is away. ModuleNotFoundError
        if a tracker is configured and not installed.
        """
        metrics, threads = folder / "metrics.jsonl", []
        uri, run_file = os.environ.get("MLFLOW_TRACKING_URI"), os.environ.get(MLFLOW_RUN_VARIABLE)
        run_id = os.environ.get("MLFLOW_RUN_ID") or (Path(run_file) if run_file else None)
        if uri and run_id:
            import_tracker("mlflow")
            make = functools.partial(MlflowRun, uri)
            threads.append(TrackerThread(metrics, "mlflow", make, run_id))
        wandb = WandbConfig()
        if trainer.log_wandb and wandb.effective_mode != "disabled":
            import_tracker("wandb")
            connect, offline = (
                functools.partial(WandbRun, wandb, trainer, folder, mode)
                for mode in (wandb.effective_mode, "offline")
            )
            threads.append(TrackerThread(metrics, "wandb", connect, fallback=offline))
        return cls(*threads)

    def start(self, offset: int) -> None:
        """Start the threads; ``offset`` bytes of metrics.jsonl are committed already."""
        for thread in self.threads:
            thread.resumed_at = thread.committed = offset
            thread.start()

    def committed(self, offset: int) -> None:
        """A checkpoint now covers the first ``offset`` bytes of metrics.jsonl."""
        for thread in self.threads:
            thread.committed = offset
            thread.wake_up.set()

    def close(self) -> None:
        """Let every tracker finish, for at most ten seconds in all."""
        started = [thread for thread in self.threads if thread.ident is not None]
        for thread in started:
            thread.ending = True
            thread.wake_up.set()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in started:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
            if not thread.up_to_date:
                rest = "they are in %s, and resuming the run sends the rest"
                log.warning(f"%s has not received all metrics; {rest}", thread.name, thread.metrics)


class TrackerThread(threading.Thread):
    """Forwards to one tracker; its errors are warnings.

    ``make`` connects to a run by its id and is retried while the tracker is down; if it was down all
    the time, ``fallback`` replaces it at the end.
    """

    def __init__(
        self,
        metrics: Path,
        name: str,
        make: Callable[[str], Tracker],
        run_id: str | Path | None = None,
        fallback: Callable[[str], Tracker] | None = None,
    ) -> None:
        """``run_id`` is the id, or the file that will have it; None starts a new run."""
        super().__init__(name=name, daemon=True)
        self.metrics, self.make, self.run_id, self.fallback = metrics, make, run_id, fallback
        self.resumed_at = self.committed = 0
        self.ending = False
        self.up_to_date = False
        self.wake_up = threading.Event()
        self._bookmark: Bookmark | None = None
        self._tracker: Tracker | None = None
        self._is_down = False

    def run(self) -> None:
        while True:
            ending = self.ending
            if ending and self._is_down and self._tracker is None and self.fallback is not None:
                self.make, self._is_down = self.fallback, False
            self._try(self._catch_up)
            if ending:
                break
            self.wake_up.wait(timeout=_RETRY_S if self._is_down else None)
            self.wake_up.clear()
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _catch_up(self) -> None:
        self.up_to_date = False
        run_id = self.run_id
        if isinstance(run_id, Path):
            self.up_to_date = not self.committed
            if self.up_to_date:
                return
            if not run_id.exists():
                raise FileNotFoundError(
                    f"{run_id} was not written yet; MLflow gets the metrics when the job has ended"
                )
            run_id = self.run_id = str(read_json(run_id, schema_version=1)["run_id"])
        if self._bookmark is None:
            path = self.metrics.with_name(f"{self.name}.offset.json")
            self._bookmark = Bookmark(path, run_id, self.resumed_at)
        if self._tracker is None:
            self._tracker = self.make(self._bookmark.run_id)
        forward(self.metrics, self._bookmark, self.committed, self._tracker.send)
        self.up_to_date = True

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a tracker that is down must never end a run
            if not self._is_down:
                message = "%s: %s; training continues, its metrics are kept in %s"
                log.warning(message, self.name, error, self.metrics)
            self._is_down = True
            return
        if self._is_down:
            log.info("%s is reachable again", self.name)
        self._is_down = False


class RunLogger:
    """Logs the metrics of one run; a context manager.

    Every process has one; only the main process's logs, and has ``metrics_log`` and ``trackers``.
    """

    def __init__(
        self,
        progress: Progress,
        folder: Path,
        config: TrainerConfig,
        *,
        batches_per_epoch: int,
        offset: int,
        is_main: bool,
    ) -> None:
        """``offset`` bytes of ``metrics.jsonl`` in ``folder`` belong to the steps finished so far."""
        self._progress, self.folder, self.config = progress, folder, config
        self.batches_per_epoch, self.first_offset, self.is_main = batches_per_epoch, offset, is_main
        self.latest: dict[str, float] = {}  # the newest value of every metric
        self._stack = ExitStack()

    def __enter__(self) -> RunLogger:
        if not self.is_main:
            return self
        with ExitStack() as stack:
            self.metrics_log = MetricsLog(self.folder / "metrics.jsonl", self.first_offset)
            stack.callback(self.metrics_log.close)
            self.trackers = Trackers.from_environment(self.folder, self.config)
            stack.callback(self.trackers.close)
            stack.enter_context(self._progress)
            self.trackers.start(self.first_offset)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """Print one line."""
        if self.is_main:
            self._progress.say(text)

    def log_training(self, step: int, metrics: dict[str, float]) -> None:
        """Log training metrics, with epoch and remaining time."""
        position = {
            "train/epoch": step / self.batches_per_epoch,
            "train/eta_s": self._progress.eta_s(step),
        }
        self.log(step, metrics | position, show=step == self._progress.total_steps)

    def log(self, step: int, metrics: dict[str, float], *, show: bool = True) -> None:
        """Log metrics; without ``show`` the terminal has them at most every few seconds."""
        if self.is_main:
            self.latest |= metrics
            self.metrics_log.append(step, step / self.batches_per_epoch, metrics)
            self._progress.update(step, self.latest, force=show)
