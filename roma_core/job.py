"""The job folder: everything about one job, on storage that the orchestrator and the job share.

The folder alone is enough to find, check and resume the job. Which side writes what:

    spec.json                 launcher   what to run, once
    config.json               launcher   the resolved configuration the job runs from, once
    lease.json                launcher   which process supervises the job now
    cancel.json               any        asks the supervisor to cancel the job; removed once done
    events.jsonl              launcher   every event: when, what was observed, what was done
    messages.offset           launcher   how much of messages.jsonl was passed on
    mlflow_record.json        launcher   what MLflow should hold of the job's run
    mlflow_run.json           launcher   that run, once there is one, and the record that it received
    attempts/<n>.json         launcher   intent, created exclusively before submitting; then the external id and the end
    attempts/<n>/log          launcher   stdout and stderr of all processes
    attempts/<n>/script       launcher   the batch script or manifests that were submitted
    attempts/<n>/owner.json   job        first act, created exclusively: a duplicate start finds it and leaves
    attempts/<n>/heartbeat    job        rank 0 of a training, from inside its loop; of other work any
                                         process, as long as it uses its CPU
    attempts/<n>/stop         any        its existence asks the job to save and end with "continue"
    attempts/<n>/ending.json  launcher   why the attempt is being ended, before it is
    attempts/<n>/exit.json    job        how the attempt ended, by rank 0
    metrics.jsonl             job        every metric, once
    messages.jsonl            job        progress and log for Dagster Pipes; losing it loses no result
    checkpoints/              job        step-…/, committed atomically
    outputs/                  job        weights, predictions, report
    result.json               job        written last, by rank 0: the only proof of success
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pydantic import Field

from roma_core.files import read_json, write_json
from roma_core.settings import Frozen


class Exit(Frozen):
    """How an attempt ended, as the job itself reports it; ``exit.json``."""

    schema_version: Literal[1] = 1
    status: Literal["completed", "continue", "failed"]
    step: int | None = None
    reason: str = ""


class Result(Frozen):
    """The job's result, which proves its success; ``result.json``."""

    schema_version: Literal[1] = 1
    job_key: str
    attempt: int
    world_size: int
    step: int | None = None
    metrics: dict[str, float] = Field({})
    outputs: dict[str, str] = Field({})  # name -> path relative to the job folder
    facts: dict[str, Any] = Field({})  # plain JSON to show: seconds, tokens, device
    wall_s: float


class JobFolder:
    """Paths of the files above, and the few operations both sides share."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.spec = self.path / "spec.json"
        self.config = self.path / "config.json"
        self.lease = self.path / "lease.json"
        self.cancel = self.path / "cancel.json"
        self.events = self.path / "events.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.messages = self.path / "messages.jsonl"
        self.messages_offset = self.path / "messages.offset"
        self.mlflow_record = self.path / "mlflow_record.json"
        self.mlflow_run = self.path / "mlflow_run.json"
        self.checkpoints = self.path / "checkpoints"
        self.outputs = self.path / "outputs"
        self.result = self.path / "result.json"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JobFolder) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)

    def attempt_record(self, n: int) -> Path:
        return self.path / "attempts" / f"{n}.json"

    def attempt(self, n: int) -> Attempt:
        return Attempt(self.path / "attempts" / str(n))

    def attempt_numbers(self) -> list[int]:
        """Numbers of all attempts whose intent is recorded, ascending."""
        records = (self.path / "attempts").glob("*.json")
        return sorted(int(record.stem) for record in records if record.stem.isdigit())

    def read_result(self) -> Result | None:
        if not self.result.exists():
            return None
        return Result.model_validate(read_json(self.result, schema_version=1))

    def mark_checkpoint(self, n: int) -> None:
        """Let work that keeps its own files count as a checkpoint: after a crash, another attempt follows."""
        made = self.checkpoints / f"step-{n}"
        made.mkdir(parents=True, exist_ok=True)
        for former in {*committed(self.checkpoints)} - {made}:  # a larger one if work began anew
            former.rmdir()

    def write_result(self, result: Result) -> None:
        write_json(self.result, result.model_dump(mode="json"))


_BUSY = 0.01  # of one core, above which a process is not merely waiting


class Attempt:
    """One start of the job: ``attempts/<n>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n = int(path.name)
        self.log = path / "log"
        self.script = path / "script"
        self.owner = path / "owner.json"
        self.heartbeat = path / "heartbeat"
        self.stop = path / "stop"
        self.ending = path / "ending.json"
        self.exit = path / "exit.json"

    def beat(self, step: int = 0) -> None:
        """Record that the work advances. Not synced: a beat may be lost, never torn."""
        aside = self.heartbeat.with_name(f".heartbeat-{os.environ.get('RANK', '0')}")
        aside.write_text(json.dumps({"time": time.time(), "step": step}))
        aside.replace(self.heartbeat)

    @contextmanager
    def beating(self, interval_s: float = 5.0) -> Iterator[threading.Event]:
        """Beat while this process computes, in work whose steps may take longer than a beat may be late.

        While it waits, for a lock, a disk or another process, it uses no CPU, and there are no beats
        unless it sets the event that this yields, before every beat.
        """
        ended, advanced = threading.Event(), threading.Event()

        def beat() -> None:
            used_s = time.process_time()
            while not ended.wait(interval_s):
                now_s = time.process_time()
                if advanced.is_set() or now_s - used_s > _BUSY * interval_s:
                    advanced.clear()
                    with suppress(OSError):  # a full disk, say
                        self.beat()
                used_s = now_s

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield advanced
        finally:
            ended.set()
            thread.join()

    def read_owner(self) -> dict[str, Any] | None:
        if not self.owner.exists():
            return None
        return dict(read_json(self.owner, schema_version=1))

    def read_exit(self) -> Exit | None:
        if not self.exit.exists():
            return None
        return Exit.model_validate(read_json(self.exit, schema_version=1))

    def write_exit(self, end: Exit) -> None:
        write_json(self.exit, end.model_dump(mode="json"))


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first; other files of the folder are ignored."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.glob("step-*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_STOP_FILE_POLL_S = 0.5


class Interrupted(Exception):
    """A stop request arrived during work that can be repeated later."""


class StopRequests:
    """Requests to save and end with "continue": a signal to this process, or a stop file.

    The processes of a training agree on them where they sum the loss count. As a context manager it
    handles SIGTERM, SIGINT and SIGUSR1, in the main thread only; a second SIGINT interrupts at once.
    A nested one starts with the request that the outer one received, so a program can handle signals
    before it imports what training needs.
    """

    _innermost: StopRequests | None = None

    def __init__(self, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.reason = ""
        self._previous: dict[int, object] = {}
        self._outer: StopRequests | None = None
        self._last_poll = float("-inf")

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
            self._outer, StopRequests._innermost = StopRequests._innermost, self
            if self._outer is not None:
                self.reason = self._outer.reason
        return self

    def __exit__(self, *exception: object) -> None:
        if self._previous:
            StopRequests._innermost = self._outer
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT and self.reason == name:
            raise KeyboardInterrupt
        self.reason = name

    def requested(self) -> bool:
        """True after a request; checks for the stop file at most twice a second."""
        now = time.monotonic()
        if not self.reason and self.stop_file and now - self._last_poll >= _STOP_FILE_POLL_S:
            self._last_poll = now
            self.reason = "stop file" if self.stop_file.exists() else ""
        return bool(self.reason)
