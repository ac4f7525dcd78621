"""Run a job from inside a Dagster asset: its log and progress appear there while it runs.

Dagster Pipes is the protocol, over an append-only file in the job folder. It carries log lines and
progress only: the supervisor decides whether the job succeeded, and the asset alone reports a
materialisation. Materialisations and checks that a job reports are not passed on.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg
from dagster_pipes import PipesDefaultMessageWriter, PipesParams

from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.spec import JobSpec, JobState, Outcome, Phase, job_key, root_of
from roma_pipelines.launching.supervisor import Leave, supervise
from roma_pipelines.storage import Storage


class MessageReader:
    """Reads a job's ``messages.jsonl`` while it grows, from where the last reader stopped."""

    def __init__(self, folder: JobFolder) -> None:
        self.path, self.saved = folder.messages, folder.messages_offset
        self.skipped = 0  # lines that were not JSON objects
        try:  # bytes of the file that were read, whole lines only
            self.offset = int(read_json(self.saved, schema_version=1)["offset"])
        except (FileNotFoundError, ValueError, KeyError):
            self.offset = 0

    def read(self) -> list[dict[str, Any]]:
        """Messages whose lines are complete by now; a half-written last line waits."""
        if not self.path.exists():
            return []
        if self.path.stat().st_size < self.offset:
            self.offset = 0  # another file by the same name: read it from its beginning
        with self.path.open("rb") as file:
            file.seek(self.offset)
            content = file.read()
        complete = content[: content.rfind(b"\n") + 1]
        self.offset += len(complete)
        messages = []
        for line in complete.splitlines():
            try:
                message = json.loads(line or b"{}")
            except ValueError:  # not JSON, or not UTF-8
                message = None
            if not isinstance(message, dict):
                self.skipped += 1
            elif message:
                messages.append(message)
        return messages

    def save(self) -> None:
        """Save the offset for the next reader. Not synced: losing it replays a few log lines."""
        aside = self.saved.with_name(f".{self.saved.name}")
        aside.write_text(json.dumps({"schema_version": 1, "offset": self.offset}))
        aside.replace(self.saved)


_LEVELS = frozenset({"debug", "info", "warning", "error", "critical"})
_CANCELLED = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


class JobMessageReader(dg.PipesMessageReader):
    """Passes on messages.jsonl whenever ``pump`` is called, in the caller's thread."""

    def __init__(
        self, context: dg.AssetExecutionContext, folder: JobFolder, observe_every_s: float
    ) -> None:
        self.context, self.folder, self.observe_every_s = context, folder, observe_every_s
        self.messages = MessageReader(folder)
        self._handler: dg.PipesMessageHandler
        self._opened = False
        self._closed: Any = {"method": "closed", "params": {}}
        self._progress: dict[str, Any] | None = None  # newest, not shown yet
        self._observed_at = -math.inf
        self._waits_for = ""
        self._skipped = 0
        self._ignored: set[str] = set()

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        """Yields the parameters with which the job writes to the file.

        The handler sees one opening and one closing whatever the job writes; without them it warns of a
        job that was adopted or sends nothing, and of every message after the first attempt.
        """
        self._handler = handler
        if self.messages.offset:  # an earlier reader saw it open
            self._open()
        try:
            yield {PipesDefaultMessageWriter.FILE_PATH_KEY: str(self.folder.messages.resolve())}
        finally:
            self.pump()
            if self._progress:
                self._observe(self._progress)
            self._open()
            handler.handle_message(self._closed)

    @property
    def expected_writer_count(self) -> int:
        return 1  # rank 0 alone; the base class returns the same, with a deprecation warning

    def no_messages_debug_text(self) -> str:
        return f"The job should append to {self.folder.messages}; see the log of its attempts."

    def pump(self) -> None:
        """Pass on what was written since the last call."""
        before = self.messages.offset
        for message in self.messages.read():
            self._pass_on(message)
        if (skipped := self.messages.skipped) > self._skipped:
            self._skipped = skipped
            self.context.log.warning(f"{skipped} line(s) of {self.messages.path} are not messages")
        if self.messages.offset != before:
            self.messages.save()
        if time.monotonic() - self._observed_at >= self.observe_every_s and self._progress:
            self._observe(self._progress)

    def show(self, state: JobState) -> None:
        """Show on the asset's page why the job does not run, whenever the reason changes."""
        self.pump()
        if state.phase not in (Phase.WAITING, Phase.UNKNOWN):
            self._waits_for = ""
        elif state.reason and state.reason != self._waits_for:
            self._waits_for = state.reason
            self._log_observation({"phase": str(state.phase), "queue": state.reason, **state.queue})

    def _pass_on(self, message: Mapping[str, Any]) -> None:
        method, params = message.get("method"), message.get("params") or {}
        payload = params.get("payload") if isinstance(params, dict) else None
        if method == "opened":
            self._open()
        elif method == "closed" and isinstance(params, dict):
            self._closed = {**message, "params": params}  # that of the last attempt is used
        elif method == "log":
            level = str(params.get("level")).lower()
            level = level if level in _LEVELS else "info"
            self.context.log.log(level, str(params.get("message", "")))
        elif isinstance(payload, dict) and payload.get("kind") == "progress":
            self._progress = payload
            if self._observed_at == -math.inf:  # the first
                self._observe(payload)
        elif str(method) not in self._ignored:
            self._ignored.add(str(method))
            self.context.log.debug(f"messages of the job by {method!r} are not passed on")

    def _open(self) -> None:
        if not self._opened:
            self._opened = True
            opened: Any = {"method": "opened", "params": {"extras": {}}}
            self._handler.handle_message(opened)

    def _observe(self, progress: Mapping[str, Any]) -> None:
        self._progress, self._observed_at = None, time.monotonic()
        shown = {k: v for k, v in progress.items() if k != "kind" and v is not None}
        for name, value in shown.items():  # NaN and infinity are not valid JSON
            if isinstance(value, float) and not math.isfinite(value):
                shown[name] = str(value)
        self._log_observation(shown)

    def _log_observation(self, shown: dict[str, Any]) -> None:
        partition = self.context.partition_key if self.context.has_partition_key else None
        self.context.log_event(
            dg.AssetObservation(self.context.asset_key, metadata=shown, partition=partition)
        )


def job_folder(context: dg.AssetExecutionContext) -> JobFolder:
    """Folder of the job that this execution of the asset starts or adopts; its name is the key."""

    def tags_of(run_id: str) -> Mapping[str, str] | None:
        run = context.instance.get_run_by_id(run_id)
        return run.tags if run else None

    root = root_of(context.run_id, context.run.tags, tags_of)
    partition = f"|{context.partition_key}" if context.has_partition_key else ""
    key = job_key(context.asset_key.to_user_string() + partition, root)
    return JobFolder(Storage.open().jobs / key)


def on_interrupt(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Leave:
    """Whether an interrupted Dagster run cancels its job.

    Terminate marks the run before it interrupts it. A deploy, a drained node and a crash do not:
    then the job runs on, and a retry adopts it. A run without a code location was started in a
    terminal or a test: no retry would ever adopt its job.
    """
    if run.remote_job_origin is None:
        return "cancel"
    now = instance.get_run_by_id(run.run_id)
    return "cancel" if now is None or now.status in _CANCELLED else "detach"


def run_job(
    context: dg.AssetExecutionContext,
    launcher: Launcher,
    folder: JobFolder,
    spec: JobSpec,
    config: Any,
    *,
    environment: Mapping[str, str] | None = None,
    observe_every_s: float = 5.0,
    on_accepted: Callable[[], None] = lambda: None,
    **options: Any,
) -> Outcome:
    """Run a job to its end inside an asset, which then returns its own MaterializeResult.

    Args:
        observe_every_s: progress is observed at most this often; the first and the last always.
        on_accepted: called once, when the target has accepted the job.
        options: of ``Supervisor``: poll_every_s, heartbeat_timeout_s, max_attempts.

    Raises:
        JobFailed: it failed or was cancelled; the message has the reason and the end of the log.
    """
    holder = {"dagster_run_id": context.run_id, "asset_key": context.asset_key.to_user_string()}
    reader = JobMessageReader(context, folder, observe_every_s)
    accepted = False

    def on_poll(state: JobState) -> None:
        nonlocal accepted
        if not accepted:
            accepted = True
            on_accepted()
        reader.show(state)

    with dg.open_pipes_session(context, dg.PipesEnvContextInjector(), reader) as session:
        return supervise(
            launcher,
            folder,
            spec,
            config,
            environment={**session.get_bootstrap_env_vars(), **(environment or {})},
            holder=holder,
            on_poll=on_poll,
            on_note=context.log.info,
            on_interrupt=lambda error: on_interrupt(context.instance, context.run),
            **options,
        )
