"""Alerts: ``alerts.jsonl`` under the storage root, and the command or webhook in the settings.

Each alert has an id and is delivered once. One that could not be delivered stays in the file as
pending, and the next tick of the reconcile sensor delivers it.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import dagster as dg
from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.job import JobFolder
from roma_core.settings import RomaSettings
from roma_pipelines._compat import SerializableErrorInfo
from roma_pipelines.storage import Storage

FILE = "alerts.jsonl"
LAST_LINES = 50
_TIMEOUT_S = 20.0
_log = logging.getLogger(__name__)


class AlertSettings(RomaSettings):
    """Recipients of alerts besides the log and alerts.jsonl under the storage root."""

    model_config = SettingsConfigDict(env_prefix="ROMA_ALERT_")

    command: str | None = Field(
        None,
        description="Command that receives the alert on standard input; split like a shell command "
        "line, but run without a shell. Example: mail -s 'RoMA' team@example.org",
    )
    webhook_url: SecretStr | None = Field(
        None,
        description='URL that receives {"text": …} as JSON by POST, the format of chat services.',
    )


def send_alert(storage: Storage, kind: str, subject: str, text: str, *, key: Sequence[str]) -> bool:
    """Record an alert and deliver it, unless its id is recorded already.

    Args:
        kind: ``failed``, ``check``, ``drift``, ``budget``, …; the first part of the id.
        subject: one line.
        text: the body; may have many lines.
        key: further parts of the id.

    Returns:
        Whether the alert is new.
    """
    identity = ":".join((kind, *key))
    with _locked(storage):
        if any(entry["id"] == identity for entry in read_alerts(storage)):
            return False
        entry = {"id": identity, "time": time.time(), "kind": kind, "subject": subject}
        _append(storage, {**entry, "text": text, "delivered": False})
        _log.warning("%s\n%s", subject, text)
        if _deliver(AlertSettings(), f"{subject}\n\n{text}\n", storage.root / FILE):
            _append(storage, {**entry, "text": text, "delivered": True})
    return True


def deliver_pending(storage: Storage) -> int:
    """Deliver recorded alerts whose delivery failed before; stops at the first failure.

    Returns:
        Number of delivered alerts.
    """
    settings, delivered = AlertSettings(), 0
    with _locked(storage):
        for entry in read_alerts(storage):
            if entry["delivered"]:
                continue
            message = f"{entry['subject']}\n\n{entry['text']}\n"
            if not _deliver(settings, message, storage.root / FILE):
                break
            _append(storage, {**entry, "delivered": True})
            delivered += 1
    return delivered


def read_alerts(storage: Storage) -> list[dict]:
    """Every alert in its last state, oldest first; an incomplete line of a crash is skipped."""
    path = storage.root / FILE
    if not path.exists():
        return []
    found: dict[str, dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[entry["id"]] = entry
    return list(found.values())


def _locked(storage: Storage) -> FileLock:
    return FileLock(storage.root / ".alerts.lock")


def _append(storage: Storage, entry: dict) -> None:
    path = storage.root / FILE
    line = json.dumps({"schema_version": 1, **entry}) + "\n"
    incomplete = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * incomplete + line)


def _deliver(settings: AlertSettings, text: str, path: Path) -> bool:
    """Whether every configured recipient accepted the alert."""
    delivered = True
    if settings.command:
        try:
            subprocess.run(
                shlex.split(settings.command),
                input=text,
                text=True,
                check=True,
                capture_output=True,
                timeout=_TIMEOUT_S,
            )
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            _log.error("ROMA_ALERT_COMMAND failed (%s); the alert is in %s", error, path)
            delivered = False
    if settings.webhook_url is not None:
        request = urllib.request.Request(
            settings.webhook_url.get_secret_value(),
            json.dumps({"text": text}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except (OSError, ValueError, HTTPException) as error:  # its text may contain the secret URL
            kind = type(error).__name__
            _log.error("ROMA_ALERT_WEBHOOK_URL failed (%s); the alert is in %s", kind, path)
            delivered = False
    return delivered


@dg.run_failure_sensor(
    name="alert_on_failure",
    monitor_all_code_locations=True,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Sends an alert of every failed run and of every check that did not pass, unless "
    "the run will be retried.",
)
def alert_on_failure(context: dg.RunFailureSensorContext) -> None:
    """One alert for each failed run; Dagster keeps the cursor."""
    run = context.dagster_run
    if run.tags.get("dagster/will_retry") != "true":
        kind, subject, text = _describe(context.instance, run)
        send_alert(Storage.open(), kind, subject, text, key=[run.run_id])


def _describe(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[str, str, str]:
    """Kind, subject and text of the alert of a failed run."""
    name, where = _experiments_of(instance, run), f"Dagster run {run.run_id}"
    checks = [
        evaluation
        for record in instance.get_records_for_run(
            run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION
        ).records
        if (evaluation := record.event_log_entry.asset_check_evaluation) is not None
        and not evaluation.passed
        and evaluation.severity is dg.AssetCheckSeverity.ERROR
    ]
    if checks:
        names = [f"{check.check_name} of {check.asset_key.path[-1]}" for check in checks]
        lines = [f"{k}: {v.value}" for check in checks for k, v in check.metadata.items()]
        return "check", f"{name}: check failed: {', '.join(names)}", "\n".join([where, *lines])
    failures = instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE
    ).records
    lines = [where]
    folder: Path | None = None
    for record in failures:
        event = record.event_log_entry.dagster_event
        if event is None or event.step_key is None:
            continue
        data = event.step_failure_data
        lines.append(f"step {event.step_key}: {_first_line(data)}")
        metadata = data.user_failure_data.metadata if data.user_failure_data else {}
        if (found := metadata.get("job_folder")) is not None:
            folder = Path(str(found.value))
    lines += [f"last {LAST_LINES} lines:", *_last_lines(instance, run, folder)]
    return "failed", f"{name}: run {run.run_id[:8]} failed", "\n".join(lines)


def _experiments_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    planned = instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    ).records
    events = [record.event_log_entry.dagster_event for record in planned]
    keys = [event.asset_key for event in events if event is not None]
    return ", ".join(sorted({key.path[0] for key in keys if key})) or run.job_name


def _first_line(data: dg.StepFailureData) -> str:
    if data.user_failure_data is not None:
        return str(data.user_failure_data.description or "").partition("\n")[0]
    text = "" if data.error is None else message_of(root_cause(data.error))
    return text.partition("\n")[0]


def root_cause(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """The error that caused the others, which are Dagster's own."""
    while error.cause is not None:
        error = error.cause
    return error


def message_of(error: SerializableErrorInfo) -> str:
    """Its message without the class name that Dagster prepends, if a sentence is left.

    For an error such as ``KeyError: 'path'`` the class name is needed to understand it.
    """
    text = error.message.strip()
    before, _, message = text.partition(": ")
    is_class = before.rpartition(".")[-1] == error.cls_name
    return message.strip() if is_class and " " in message.strip() else text


def _last_lines(
    instance: dg.DagsterInstance, run: dg.DagsterRun, folder: Path | None
) -> Sequence[str]:
    """Last lines of the log of the failed job, or of the run's events if there was no job."""
    if folder is not None:
        job = JobFolder(folder)
        for n in reversed(job.attempt_numbers()):
            log = job.attempt(n).log
            if log.exists():
                return _tail(log)
    records = instance.get_records_for_run(run.run_id, limit=LAST_LINES, ascending=False).records
    return [
        re.sub(r"\s+", " ", record.event_log_entry.user_message or record.event_log_entry.message)
        for record in reversed(records)
    ]


def _tail(log: Path) -> list[str]:
    with log.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - 64 * 1024))
        return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
