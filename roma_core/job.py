"""The job folder: everything about one job, on storage that the orchestrator and the job both see.

The folder alone is enough to find, judge and resume the job. Who writes what:

    spec.json                 launcher   what to run, once
    config.json               launcher   the resolved configuration the job runs from, once
    watcher.json              launcher   who watches the job now
    cancel.json               anyone     asks the watcher to end the job; gone once that is done
    decisions.jsonl           launcher   every decision: when, what was seen, what was done
    messages.offset           launcher   how far messages.jsonl was passed on
    mlflow_run.json           launcher   the MLflow run that shows the job, once there is one
    attempts/<n>.json         launcher   intent, created exclusively before submitting; then the external id and the end
    attempts/<n>/log          launcher   stdout and stderr of all processes
    attempts/<n>/script       launcher   what a scheduler was given
    attempts/<n>/owner.json   job        first act, created exclusively: a duplicate start finds it and leaves
    attempts/<n>/heartbeat    job        rank 0, from inside the training loop, never from a thread
    attempts/<n>/stop         anyone     its existence asks the job to save and end with "continue"
    attempts/<n>/exit.json    job        how the attempt ended, by rank 0
    metrics.jsonl             job        every metric, once
    messages.jsonl            job        progress and log for Dagster Pipes; losing it loses no result
    checkpoints/              job        step-…/, committed atomically
    outputs/                  job        what the job is for: weights, predictions, report
    result.json               job        written last, by rank 0: the only proof of success
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from roma_core.files import create_json, read_json, write_json

CONTINUE_EXIT_CODE = 75
"""Exit code of a process that saved and wants another attempt; behind torchrun only exit.json tells."""


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Exit(_Document):
    """How an attempt ended, in the words of the job itself."""

    schema_version: Literal[1] = 1
    status: Literal["completed", "continue", "failed"]
    step: int | None = None
    reason: str = ""


class Result(_Document):
    """Proof that the job did what it was for."""

    schema_version: Literal[1] = 1
    job_key: str
    attempt: int
    world_size: int
    step: int | None = None
    metrics: dict[str, float] = {}
    outputs: dict[str, str] = {}  # name -> path relative to the job folder
    facts: dict[str, Any] = {}  # plain JSON worth showing: seconds, tokens, device
    wall_s: float


class JobFolder:
    """Names of the files above, and the few operations both sides share."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def spec(self) -> Path:
        return self.path / "spec.json"

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def watcher(self) -> Path:
        return self.path / "watcher.json"

    @property
    def cancel(self) -> Path:
        return self.path / "cancel.json"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def messages(self) -> Path:
        return self.path / "messages.jsonl"

    @property
    def messages_offset(self) -> Path:
        return self.path / "messages.offset"

    @property
    def mlflow_run(self) -> Path:
        return self.path / "mlflow_run.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def outputs(self) -> Path:
        return self.path / "outputs"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def attempt_record(self, n: int) -> Path:
        return self.path / "attempts" / f"{n}.json"

    def attempt(self, n: int) -> Attempt:
        return Attempt(self.path / "attempts" / str(n))

    def attempt_numbers(self) -> list[int]:
        """Numbers of all attempts whose intent is recorded, ascending."""
        records = (self.path / "attempts").glob("*.json")
        return sorted(int(record.stem) for record in records if record.stem.isdigit())

    def read_result(self) -> Result | None:
        """The result, or None while there is none."""
        if not self.result.exists():
            return None
        return Result.model_validate(read_json(self.result, schema_version=1))

    def write_result(self, result: Result) -> None:
        write_json(self.result, result.model_dump(mode="json"))


class Attempt:
    """One start of the job: ``attempts/<n>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.n = int(path.name)

    @property
    def log(self) -> Path:
        return self.path / "log"

    @property
    def script(self) -> Path:
        return self.path / "script"

    @property
    def owner(self) -> Path:
        return self.path / "owner.json"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat"

    @property
    def stop(self) -> Path:
        return self.path / "stop"

    @property
    def exit(self) -> Path:
        return self.path / "exit.json"

    def claim(self, owner: dict[str, Any]) -> bool:
        """Become the one process that runs this attempt; False if another already is."""
        self.path.mkdir(parents=True, exist_ok=True)
        return create_json(self.owner, {"schema_version": 1, **owner})

    def beat(self, step: int) -> None:
        """Say that the loop is alive. One small write, not synced: it may be lost, never torn."""
        aside = self.heartbeat.with_name(".heartbeat")
        aside.write_text(json.dumps({"time": time.time(), "step": step}))
        aside.replace(self.heartbeat)

    def read_exit(self) -> Exit | None:
        if not self.exit.exists():
            return None
        return Exit.model_validate(read_json(self.exit, schema_version=1))

    def write_exit(self, end: Exit) -> None:
        write_json(self.exit, end.model_dump(mode="json"))
