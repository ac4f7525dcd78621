"""The audit trail of a job, ``decisions.jsonl``: what was seen and what was done about it.

Appended to as it happens, by whoever watches; read by ``roma-pipeline jobs show`` and, as tables, by
the asset's page.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from roma_core.job import JobFolder
from roma_pipelines.launching.job import AttemptRecord, id_of

_ROWS = 40  # of a table: a page is no archive, the file is
_WORDS = 240  # characters of a cell


@dataclass(frozen=True)
class Decision:
    """One line of the trail; ``attempt`` is None where it is about the whole job."""

    time: float  # seconds since the epoch
    attempt: int | None
    seen: str
    done: str

    def __str__(self) -> str:
        about = f"attempt {self.attempt}: " if self.attempt else ""
        return f"{about}{self.seen}: {self.done}"


def append_decision(folder: JobFolder, decision: Decision) -> None:
    """Add one to the trail."""
    line = json.dumps({"schema_version": 1, **vars(decision)}, ensure_ascii=False)
    with folder.decisions.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_decisions(folder: JobFolder) -> list[Decision]:
    """All of them in order; a line that a crash cut short is left out."""
    if not folder.decisions.exists():
        return []
    found = []
    for line in folder.decisions.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            found.append(Decision(entry["time"], entry["attempt"], entry["seen"], entry["done"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def clock(seconds: float) -> str:
    """A time as people read it, local."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def attempts_table(records: Sequence[AttemptRecord]) -> str:
    """Markdown: one row per attempt."""
    rows = []
    for record in records:
        known = id_of(record.external)
        end = record.end
        ran = f"{end.ran_s:.0f} s" if end and end.ran_s is not None else ""
        where = f"{record.backend} ({known})" if known else record.backend
        rows.append(
            (
                str(record.attempt),
                where,
                clock(record.submitted_at or record.intended_at),
                ran,
                (end.nodes or "") if end else "",
                end.how if end else "not over",
                end.reason if end else "",
            )
        )
    return _table(("attempt", "target", "submitted", "ran", "nodes", "end", "why"), rows)


def decisions_table(folder: JobFolder) -> str:
    """Markdown: one row per decision, the last ones if there are many."""
    rows = [
        (clock(entry.time), str(entry.attempt or ""), entry.seen, entry.done)
        for entry in read_decisions(folder)
    ]
    return _table(("when", "attempt", "seen", "done"), rows, str(folder.decisions))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], whole: str = "") -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows[-_ROWS:]]
    if len(rows) > _ROWS:
        lines += ["", f"{len(rows) - _ROWS} earlier ones stand in {_cell(whole)}"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of a job or a scheduler, as no markdown or HTML."""
    words = " ".join(text.split())
    words = words if len(words) <= _WORDS else words[: _WORDS - 1] + "…"
    words = re.sub(r"([\\`*_\[\]|])", r"\\\1", words)
    return words.replace("<", "&lt;").replace(">", "&gt;")
