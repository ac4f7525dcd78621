"""Alerts: ``alerts.jsonl`` under the storage root, and the command or webhook in the settings.

Each alert has an id and is delivered once; the reconcile sensor delivers pending ones.
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
from pydantic import SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.job import JobFolder
from roma_core.settings import RomaSettings
from roma_pipelines._compat import SerializableErrorInfo
from roma_pipelines.launching.outcome import log_tail
from roma_pipelines.storage import Storage

FILE = "alerts.jsonl"
ATTEMPT_TAG = "roma/attempt"  # of runs that automation requests: number of the attempt at a step
AGAIN_AFTER_H = (4.0, 12.0, 24.0)  # a failed run is requested again so long after its request
_MISTAKES = {"DataError", "Rejected", "SettingsError", "StoreError", "ValidationError"}
_MISTAKES |= {"NonFiniteLoss", "ValueError"}  # classes of errors that are the same in every attempt
_JOB_ERROR = re.compile(r".*JobFailed: job \w+ failed in attempt \d+: (\w+): ")
_LAST_LINES = 50
_TIMEOUT_S = 20.0
_log = logging.getLogger(__name__)


class AlertSettings(RomaSettings):
    """Recipients of alerts besides the log and alerts.jsonl under the storage root."""

    model_config = SettingsConfigDict(env_prefix="ROMA_ALERT_")

    command: str | None = None
    """Command that receives the alert on standard input; split like a shell command line, but run
    without a shell. Example: mail -s 'RoMA' team@example.org"""
    webhook_url: SecretStr | None = None
    """URL that receives {"text": …} as JSON by POST, the format of chat services."""


def send_alert(storage: Storage, kind: str, subject: str, text: str, *, key: Sequence[str]) -> bool:
    """Record and deliver an alert unless one of that kind and key is recorded; whether it is new."""
    identity = ":".join((kind, *key))
    alert = {"id": identity, "time": time.time(), "kind": kind, "subject": subject, "text": text}
    with _locked(storage):
        if any(entry["id"] == identity for entry in read_alerts(storage)):
            return False
        _append(storage, {**alert, "delivered": False})
        _log.warning("%s\n%s", subject, text)
        _deliver(storage, alert)
    return True


def deliver_pending(storage: Storage) -> int:
    """Deliver pending alerts until one fails; returns the number of delivered ones."""
    delivered = 0
    with _locked(storage):
        for alert in read_alerts(storage):
            if not alert["delivered"]:
                if not _deliver(storage, alert):
                    break
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


def _deliver(storage: Storage, alert: dict) -> bool:
    """Whether every configured recipient accepted the alert; records it."""
    settings, path, delivered = AlertSettings(), storage.root / FILE, True
    text = f"{alert['subject']}\n\n{alert['text']}\n"
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
    if delivered:
        _append(storage, {**alert, "delivered": True})
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
        if kind == "failed" and ATTEMPT_TAG in run.tags:
            _, follows = again_after(context.instance, run)
            context.instance.add_run_tags(run.run_id, {"roma/next": follows})
            text = f"{follows}\n{text}"
        send_alert(Storage.open(), kind, subject, text, key=[run.run_id])


def again_after(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[float | None, str]:
    """Hours after its request when a failed run is requested again, None for never; a sentence."""
    attempt, failed = int(run.tags.get(ATTEMPT_TAG, 1)), f"run {run.run_id} failed"
    advice = "materialise it manually, or change data or settings"
    if name := _mistake(instance, run.run_id):
        return None, f"{failed}, attempt {attempt}; waiting: a {name} would come again; {advice}"
    if attempt > len(AGAIN_AFTER_H):
        return None, f"{failed}, attempt {attempt}; waiting: {advice}"
    hours, n = AGAIN_AFTER_H[attempt - 1], len(AGAIN_AFTER_H) + 1
    again = f"it is tried again {hours:g} h after its request, as attempt {attempt + 1} of {n}"
    return hours, f"{failed}; {again}"


def _mistake(instance: dg.DagsterInstance, run_id: str) -> str:
    """Class of the error with which a step of a failed run, or its job, would fail again; or empty."""
    failures = instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    for record in failures.records:
        event = record.event_log_entry.dagster_event
        error = None if event is None else event.step_failure_data.error
        while error is not None:
            of_job = _JOB_ERROR.match(error.message)
            name = of_job[1] if of_job else error.cls_name
            if name in _MISTAKES:
                return str(name)
            error = error.cause
    return ""


def _describe(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[str, str, str]:
    """Kind, subject and text of the alert of a failed run."""

    def events(kind: dg.DagsterEventType) -> list[dg.DagsterEvent]:
        records = instance.get_records_for_run(run.run_id, of_type=kind).records
        return [event for record in records if (event := record.event_log_entry.dagster_event)]

    planned = events(dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    experiments = sorted({event.asset_key.path[0] for event in planned if event.asset_key})
    name = ", ".join(experiments) or run.job_name
    lines = [f"Dagster run {run.run_id}"]
    checks = [
        check
        for event in events(dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        if not (check := event.asset_check_evaluation_data).passed
        and check.severity is dg.AssetCheckSeverity.ERROR
    ]
    if checks:
        names = [f"{check.check_name} of {check.asset_key.path[-1]}" for check in checks]
        lines += [f"{k}: {v.value}" for check in checks for k, v in check.metadata.items()]
        return "check", f"{name}: check failed: {', '.join(names)}", "\n".join(lines)
    folder: Path | None = None
    for event in events(dg.DagsterEventType.STEP_FAILURE):
        data = event.step_failure_data
        if data.user_failure_data is not None:
            text = data.user_failure_data.description or ""
            if (found := data.user_failure_data.metadata.get("job_folder")) is not None:
                folder = Path(str(found.value))
        else:
            text = "" if data.error is None else message_of(root_cause(data.error))
        first_line = text.partition("\n")[0]
        lines.append(f"step {event.step_key}: {first_line}")
    lines += [f"last {_LAST_LINES} lines:", *_last_lines(instance, run, folder)]
    return "failed", f"{name}: run {run.run_id[:8]} failed", "\n".join(lines)


def root_cause(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """The first error below Dagster's own; it says more than what it was raised from."""
    while error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    return error


def message_of(error: SerializableErrorInfo) -> str:
    """Its message without the class name, unless only that explains it, as in ``KeyError: 'path'``."""
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
            if job.attempt(n).log.exists():
                return log_tail(job.attempt(n).log).splitlines()
    records = instance.get_records_for_run(run.run_id, limit=_LAST_LINES, ascending=False).records
    return [
        re.sub(r"\s+", " ", record.event_log_entry.user_message or record.event_log_entry.message)
        for record in reversed(records)
    ]
