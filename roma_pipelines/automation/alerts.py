"""Telling people: a line in ``alerts.jsonl``, and the command or webhook that the settings name.

Every alert has an id and is told once: whoever tells it again, after a restart or from another
process, finds the id and is silent. What cannot be delivered is logged and stays in the file.

Why a step of a Dagster run failed, in the words of the error that began it.
Sensor: people are told of a run that failed for good, with the end of its log.
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
from datetime import UTC, datetime, timedelta
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.job import JobFolder
from roma_core.settings import RomaSettings
from roma_pipelines.storage import Storage, instance_of

if TYPE_CHECKING:
    from dagster._utils.error import SerializableErrorInfo


def first_of(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """The error that caused the others, which are Dagster's own."""
    while error.cause is not None:
        error = error.cause
    return error


def words_of(error: SerializableErrorInfo) -> str:
    """Its message without the class that Dagster puts before it, if a sentence is left.

    Of an error that nobody foresaw, such as ``KeyError: 'path'``, the class is half of what it says.
    """
    text = error.message.strip()
    before, _, words = text.partition(": ")
    is_class = before.rpartition(".")[-1] == error.cls_name
    return words.strip() if is_class and " " in words.strip() else text


FILE = "alerts.jsonl"
_TIMEOUT_S = 20.0
_log = logging.getLogger(__name__)


class AlertSettings(RomaSettings):
    """Whom to tell, beside the log and alerts.jsonl under the storage root."""

    model_config = SettingsConfigDict(env_prefix="ROMA_ALERT_")

    command: str | None = Field(
        None,
        description="Command that is given the alert on standard input; split as a shell would, "
        "but no shell is involved. Example: mail -s 'RoMA' team@example.org",
    )
    webhook_url: SecretStr | None = Field(
        None, description='URL that is sent {"text": …} as JSON by POST, as chat services take it.'
    )


def alert(storage: Storage, kind: str, subject: str, text: str, *, once: Sequence[str]) -> bool:
    """Tell people, unless this was told already.

    Args:
        kind: ``failed``, ``drift``, ``budget``, …
        subject: one line.
        text: the rest; may have many lines.
        once: parts of the id.

    Returns:
        Whether it was told now.
    """
    identity = ":".join((kind, *once))
    path = storage.root / FILE
    with FileLock(storage.root / ".alerts.lock"):
        if any(entry["id"] == identity for entry in read_alerts(storage)):
            return False
        entry = {"id": identity, "time": time.time(), "kind": kind, "subject": subject}
        line = json.dumps({"schema_version": 1, **entry, "text": text}) + "\n"
        cut_short = path.exists() and path.read_bytes()[-1:] not in (b"\n", b"")
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut_short + line)
    _log.warning("%s\n%s", subject, text)
    _deliver(AlertSettings(), f"{subject}\n\n{text}\n", path)
    return True


def read_alerts(storage: Storage) -> list[dict[str, str]]:
    """Every alert so far, oldest first; a line that was cut short by a crash is left out."""
    path = storage.root / FILE
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _deliver(settings: AlertSettings, text: str, path: Path) -> None:
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
    if settings.webhook_url is not None:
        request = urllib.request.Request(
            settings.webhook_url.get_secret_value(),
            json.dumps({"text": text}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except (OSError, ValueError, HTTPException) as error:  # its text may name the URL: a secret
            kind = type(error).__name__
            _log.error("ROMA_ALERT_WEBHOOK_URL failed (%s); the alert is in %s", kind, path)


LAST_LINES = 50
_AT_ONCE = 25
_OVERLAP = timedelta(seconds=5)  # of two looks: clocks of databases and processes differ


@dg.sensor(
    name="tell_of_failures",
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Writes failed runs and checks that did not pass to alerts.jsonl, and tells whom "
    "ROMA_ALERT_COMMAND or ROMA_ALERT_WEBHOOK_URL names.",
)
def tell_of_failures(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Looks at every run that failed since the last tick."""
    told, cursor = look_at_failures(instance_of(context), Storage.open(), context.cursor)
    context.update_cursor(cursor)
    return dg.SkipReason("; ".join(told) or "no other run failed")


def look_at_failures(
    instance: dg.DagsterInstance, storage: Storage, cursor: str | None
) -> tuple[list[str], str]:
    """Tell of each failed run once; a run that will be retried is no news yet.

    Args:
        cursor: what the look before returned. None, at the first one, looks at nothing before now.
    """
    now = datetime.now(UTC)
    since = datetime.fromisoformat(cursor) if cursor else now
    limit = _AT_ONCE
    told: list[str] = []
    looked_at: set[str] = set()
    while True:
        records = instance.get_run_records(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since - _OVERLAP),
            limit=limit,
            order_by="update_timestamp",
            ascending=True,
        )
        for run in (record.dagster_run for record in records):
            if run.run_id in looked_at or run.tags.get("dagster/will_retry") == "true":
                continue
            looked_at.add(run.run_id)
            kind, subject, text = _about(instance, run)
            if alert(storage, kind, subject, text, once=[run.run_id]):
                told.append(subject)
        if len(records) < limit:
            return told, now.isoformat()
        last = records[-1].update_timestamp
        last = last.replace(tzinfo=last.tzinfo or UTC)
        if told or last > since:
            return told, max(since, last).isoformat()
        limit *= 2  # the overlap alone fills the page, which would come back for ever


def _about(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[str, str, str]:
    """Kind, subject and text of the alert about a failed run."""
    name, where = _name(instance, run), f"Dagster run {run.run_id}"
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
        asked = [f"{check.check_name} of {check.asset_key.path[-1]}" for check in checks]
        lines = [f"{k}: {v.value}" for check in checks for k, v in check.metadata.items()]
        return "check", f"{name}: did not pass: {', '.join(asked)}", "\n".join([where, *lines])
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


def _name(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    """The experiments whose assets it was to make."""
    planned = instance.get_records_for_run(
        run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED
    ).records
    events = [record.event_log_entry.dagster_event for record in planned]
    keys = [event.asset_key for event in events if event is not None]
    return ", ".join(sorted({key.path[0] for key in keys if key})) or run.job_name


def _first_line(data: dg.StepFailureData) -> str:
    if data.user_failure_data is not None:
        return str(data.user_failure_data.description or "").partition("\n")[0]
    said = "" if data.error is None else words_of(first_of(data.error))
    return said.partition("\n")[0]


def _last_lines(
    instance: dg.DagsterInstance, run: dg.DagsterRun, folder: Path | None
) -> Sequence[str]:
    """Of the job's log if a job failed, else of the run's events."""
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
