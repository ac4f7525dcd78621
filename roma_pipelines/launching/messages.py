"""What a job reports: ``messages.jsonl``, read as it is written.

The job appends one JSON object a line; it may be killed in the middle of one, and this reader in
the middle of reading. Nothing here decides success, so nothing here raises for what it finds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from roma_core.files import read_json


class MessageReader:
    """Reads on from where it stopped.

    Attributes:
        offset: bytes of the file that were read, whole lines only.
        skipped: how many lines were not JSON objects.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        self.path, self.offset, self.skipped = path, offset, 0

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
        return [message for line in complete.splitlines() if (message := self._parse(line))]

    def _parse(self, line: bytes) -> dict[str, Any] | None:
        if not line.strip():
            return None
        try:
            message = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            message = None
        if isinstance(message, dict):
            return message
        self.skipped += 1
        return None


def saved_offset(path: Path) -> int:
    """The offset a watcher before left; 0 if there is none to be had, which replays messages."""
    try:
        return int(read_json(path, schema_version=1)["offset"])
    except (FileNotFoundError, ValueError, KeyError):
        return 0


def save_offset(path: Path, offset: int) -> None:
    """Leave the offset for the next watcher. Not synced: losing it replays a few log lines."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps({"schema_version": 1, "offset": offset}))
    aside.replace(path)
