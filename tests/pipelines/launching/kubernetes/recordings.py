"""The recorded watch streams of a real cluster, in the order in which its server made them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[3] / "captured" / "kubernetes"
SCENARIOS = ("ok", "fail", "retry", "dl", "oom", "badcmd", "img", "gpu", "nosa")


@dataclass(frozen=True)
class Line:
    """One event of one of the three streams: ``jobs``, ``pods`` or ``events``."""

    kind: str
    type: str
    object: dict[str, Any]


def recorded(scenario: str) -> list[Line]:
    """All three streams of a scenario, merged by resourceVersion."""
    lines = [line for kind in ("jobs", "pods", "events") for line in _stream(scenario, kind)]
    return sorted(lines, key=lambda line: int(line.object["metadata"]["resourceVersion"]))


def _stream(scenario: str, kind: str) -> Iterator[Line]:
    for line in (FOLDER / scenario / f"{kind}.jsonl").read_text().splitlines():
        event = json.loads(line)
        yield Line(kind, event["type"], event["object"])
