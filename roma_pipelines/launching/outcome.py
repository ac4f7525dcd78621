"""The audit trail of a job, ``decisions.jsonl``: what was seen and what was done about it.

Appended to as it happens, by whoever watches; read by ``roma-pipeline jobs show`` and, as tables, by
the asset's page.

What the end of an attempt means: one table, no file and no clock.
What stands in a job's folder: its attempts, its last word, its checkpoints, the end of its log.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from roma_core.files import read_json
from roma_core.job import JobFolder, Result
from roma_pipelines.launching.spec import AttemptRecord, JobSpec, Phase, id_of


class ExitReport(StrEnum):
    """What the job's own files say of an ended attempt."""

    PROOF = "a valid result.json"  # of this job, and of as many processes as were asked for
    COMPLETED = "exit.json: completed"  # but no valid result
    CONTINUE = "exit.json: continue"
    FAILED = "exit.json: failed"
    NOTHING = "no exit.json"


class Verdict(StrEnum):
    COMPLETED = "completed"
    CONTINUE = "continue"
    CONTINUE_IF_ADVANCED = "continue if a checkpoint was added"
    FAILED = "failed"
    CANCELLED = "cancelled"


# fmt: off
TABLE: dict[Phase, dict[ExitReport, Verdict]] = {
    Phase.ENDED_OK: {
        ExitReport.PROOF: Verdict.COMPLETED,
        ExitReport.COMPLETED: Verdict.FAILED,               # a success nobody can prove
        ExitReport.CONTINUE: Verdict.CONTINUE,
        ExitReport.FAILED: Verdict.FAILED,
        ExitReport.NOTHING: Verdict.FAILED,                 # exit code 0 proves nothing
    },
    Phase.ENDED_BAD: {
        ExitReport.PROOF: Verdict.FAILED,                   # some process failed beside the one that wrote it
        ExitReport.COMPLETED: Verdict.FAILED,
        ExitReport.CONTINUE: Verdict.CONTINUE,              # torchrun returns 1 whatever its workers return
        ExitReport.FAILED: Verdict.FAILED,
        ExitReport.NOTHING: Verdict.CONTINUE_IF_ADVANCED,   # died without a word: memory, hardware, or a bug
    },
    Phase.INTERRUPTED: {
        ExitReport.PROOF: Verdict.CONTINUE,                 # the next attempt confirms it within a step
        ExitReport.COMPLETED: Verdict.CONTINUE,
        ExitReport.CONTINUE: Verdict.CONTINUE,
        ExitReport.FAILED: Verdict.FAILED,
        ExitReport.NOTHING: Verdict.CONTINUE,
    },
    Phase.GONE: {
        ExitReport.PROOF: Verdict.COMPLETED,                # the exit code died with its watcher
        ExitReport.COMPLETED: Verdict.FAILED,
        ExitReport.CONTINUE: Verdict.CONTINUE,
        ExitReport.FAILED: Verdict.FAILED,
        ExitReport.NOTHING: Verdict.CONTINUE,               # power cut, reboot, kill
    },
    Phase.OUT_OF_MEMORY: {
        ExitReport.PROOF: Verdict.FAILED,
        ExitReport.COMPLETED: Verdict.FAILED,
        ExitReport.CONTINUE: Verdict.CONTINUE,
        ExitReport.FAILED: Verdict.FAILED,
        ExitReport.NOTHING: Verdict.FAILED,                 # it would only happen again
    },
    Phase.HUNG: {
        ExitReport.PROOF: Verdict.CONTINUE,
        ExitReport.COMPLETED: Verdict.CONTINUE,
        ExitReport.CONTINUE: Verdict.CONTINUE_IF_ADVANCED,  # it could save when asked to end
        ExitReport.FAILED: Verdict.FAILED,
        ExitReport.NOTHING: Verdict.CONTINUE_IF_ADVANCED,
    },
    Phase.CANCELLED: dict.fromkeys(ExitReport, Verdict.CANCELLED),
}
# fmt: on


def judge(
    state: Phase,
    said: ExitReport,
    checkpoint: int | None,
    before: list[AttemptRecord],
    max_attempts: int,
    began: bool = True,
) -> tuple[Literal["completed", "continue", "failed", "cancelled"], str]:
    """How an ended attempt counts, and why.

    Args:
        state: one of the phases that are ends.
        checkpoint: step of the newest checkpoint now, None without any.
        before: records of the attempts before this one, ascending.
        max_attempts: how many attempts in a row may end with "continue" or this one.
        began: whether its program ever started; one that only waited could add no checkpoint.
    """
    verdict = TABLE[state][said]
    seen = f"{state}, {said}"
    if verdict not in (Verdict.CONTINUE, Verdict.CONTINUE_IF_ADVANCED):
        return verdict.value, seen  # type: ignore[return-value]

    streak = 0
    for record in reversed(before):
        if record.end is None or record.end.how != "continue":
            break
        streak += 1
    last = before[-1].end.checkpoint if before and before[-1].end else None
    advanced = checkpoint is not None and (last is None or checkpoint > last)
    if streak + 1 >= max_attempts:
        return "failed", f"{seen}; {streak + 1} attempts in a row are the limit"
    if advanced or (verdict is Verdict.CONTINUE and (streak == 0 or not began)):
        return "continue", f"{seen}; newest checkpoint: step {checkpoint}"
    return "failed", f"{seen}; no checkpoint was added since the attempt before (step {checkpoint})"


_LOG_LINES = 50
_LOG_BYTES = 64 * 1024
_SAID = {
    "completed": ExitReport.COMPLETED,
    "continue": ExitReport.CONTINUE,
    "failed": ExitReport.FAILED,
}
_TORCHRUN_REPORTS = re.compile(r"^E\d{4} .*torch/distributed/elastic/.*failed \(exitcode")
_RULE = re.compile(r"^={20,}\s*$")


def read_records(folder: JobFolder) -> list[AttemptRecord]:
    """All attempts on record, ascending."""
    paths = [folder.attempt_record(n) for n in folder.attempt_numbers()]
    return [AttemptRecord.model_validate(read_json(path, schema_version=1)) for path in paths]


def said_by(folder: JobFolder, spec: JobSpec, attempt: int | None) -> tuple[ExitReport, str]:
    """What the job's files say of an attempt, and the reason they give or what is wrong with them."""
    try:
        result = folder.read_result()
    except ValueError as error:
        return ExitReport.NOTHING, f"result.json cannot be read: {error}"
    if result is not None and not (wrong := _wrong(result, spec)):
        return ExitReport.PROOF, ""
    why = f"result.json is not this job's: {wrong}" if result is not None else ""
    try:
        end = folder.attempt(attempt).read_exit() if attempt is not None else None
    except ValueError as error:
        return ExitReport.NOTHING, f"exit.json cannot be read: {error}"
    if end is None:
        return ExitReport.NOTHING, why
    return _SAID[end.status], end.reason or why


def _wrong(result: Result, spec: JobSpec) -> str:
    if result.job_key != spec.key:
        return f"it names job {result.job_key}, expected {spec.key}"
    if result.world_size != spec.world_size:
        return (
            f"{result.world_size} processes made it, expected {spec.world_size}; "
            f"they did not find one another"
        )
    return ""


def newest_checkpoint(folder: JobFolder) -> int | None:
    """Step of the newest committed checkpoint, by folder name; None without any."""
    try:
        paths = list(folder.checkpoints.iterdir())
    except FileNotFoundError:
        return None
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in paths)
    return max((int(name[1]) for name in names if name), default=None)


def log_tail(path: Path) -> str:
    """The last lines of a log that are the job's own; empty if there is none.

    torchrun ends a failed job's log by forty lines about itself, which would be all there is.
    """
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_BYTES))
        text = file.read().decode(errors="replace")
    return "\n".join(_without_torchrun(text.splitlines())[-_LOG_LINES:])


def _without_torchrun(lines: list[str]) -> list[str]:
    kept: list[str] = []
    i = 0
    while i < len(lines):
        if _TORCHRUN_REPORTS.match(lines[i]):
            rules = [k for k in range(i, len(lines)) if _RULE.match(lines[k])]
            if len(rules) > 1:  # its report stands between two of them
                i = rules[1] + 1
                continue
        kept.append(lines[i])
        i += 1
    return kept


_ROWS = 40  # of a table: a page is no archive, the file is
_WORDS = 240  # characters of a cell


@dataclass(frozen=True)
class Event:
    """One line of the trail; ``attempt`` is None where it is about the whole job."""

    time: float  # seconds since the epoch
    attempt: int | None
    seen: str
    done: str

    def __str__(self) -> str:
        about = f"attempt {self.attempt}: " if self.attempt else ""
        return f"{about}{self.seen}: {self.done}"


def append_decision(folder: JobFolder, decision: Event) -> None:
    """Add one to the trail."""
    line = json.dumps({"schema_version": 1, **vars(decision)}, ensure_ascii=False)
    with folder.decisions.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_decisions(folder: JobFolder) -> list[Event]:
    """All of them in order; a line that a crash cut short is left out."""
    if not folder.decisions.exists():
        return []
    found = []
    for line in folder.decisions.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            found.append(Event(entry["time"], entry["attempt"], entry["seen"], entry["done"]))
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
