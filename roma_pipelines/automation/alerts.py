"""Telling people: a line in ``alerts.jsonl``, and the command or webhook that the settings name.

Every alert has an id and is told once: whoever tells it again, after a restart or from another
process, finds the id and is silent. What cannot be delivered is logged and stays in the file.
"""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

from filelock import FileLock
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings
from roma_pipelines.storage import Storage

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
