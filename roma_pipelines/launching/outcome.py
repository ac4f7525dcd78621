"""How an attempt ended: the job's evidence, the outcome policy, and the log of events.

The evidence is what stands in the job folder: attempt records, ``exit.json``, ``result.json``,
checkpoints, the log. The policy is one table, without files and clock. The events,
``events.jsonl``, say what was observed and what was done about it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

from roma_core.files import read_json, write_json
from roma_core.job import Attempt, JobFolder, committed
from roma_pipelines.launching.spec import AttemptRecord, JobSpec, JobState, Phase, Status, id_of


class ExitReport(StrEnum):
    """What the job's own files report about an ended attempt."""

    PROOF = "a valid result.json"  # of this job, and of as many processes as were asked for
    COMPLETED = "exit.json: completed"  # but no valid result
    CONTINUE = "exit.json: continue"
    FAILED = "exit.json: failed"
    NOTHING = "no exit.json"


Verdict = Literal[Status, "continue if a checkpoint was added"]
_DONE: Final = "completed"
_NEXT: Final = "continue"
_FAIL: Final = "failed"
_IF_ADVANCED: Final = "continue if a checkpoint was added"
# fmt: off
_ROWS: dict[Phase, tuple[Verdict, ...]] = {
    # report:            proof  completed continue     failed nothing
    # exit code 0 proves nothing without a valid result
    Phase.ENDED_OK:      (_DONE, _FAIL, _NEXT,         _FAIL, _FAIL),
    # torchrun returns 1 for "continue" too; with a proof, another process than rank 0 failed; no
    # report is a crash: memory, hardware, or a bug
    Phase.ENDED_BAD:     (_FAIL, _FAIL, _NEXT,         _FAIL, _IF_ADVANCED),
    # with a proof, the next attempt confirms it within a step; processes that an interruption
    # leaves alive may report any failure, often before the target reports the interruption
    Phase.INTERRUPTED:   (_NEXT, _NEXT, _NEXT,         _IF_ADVANCED, _NEXT),
    # the exit code was lost with the parent process; no report: power cut, reboot, kill
    Phase.GONE:          (_DONE, _FAIL, _NEXT,         _FAIL, _NEXT),
    # the next attempt would run out of memory again
    Phase.OUT_OF_MEMORY: (_FAIL, _FAIL, _NEXT,         _FAIL, _FAIL),
    # a hung attempt that could save when asked to end may hang again
    Phase.HUNG:          (_NEXT, _NEXT, _IF_ADVANCED,  _FAIL, _IF_ADVANCED),
    Phase.CANCELLED:     ("cancelled",) * 5,
}
# fmt: on
POLICY = {phase: dict(zip(ExitReport, row, strict=True)) for phase, row in _ROWS.items()}
"""What the end of an attempt means: a verdict for every phase and report."""


def decide(
    phase: Phase,
    report: ExitReport,
    checkpoint: int | None,
    before: list[AttemptRecord],
    max_attempts: int,
) -> tuple[Status, str]:
    """Status of an ended attempt, and the reason.

    Args:
        checkpoint: step of the newest checkpoint now, None without any.
        before: records of the attempts before this one, ascending.
        max_attempts: how many attempts in a row may end without a new checkpoint.
    """
    verdict = POLICY[phase][report]
    seen = f"{phase}, {report}"
    if verdict != _NEXT and verdict != _IF_ADVANCED:
        return verdict, seen
    last, stalled = None, 1
    for end in (record.end for record in before if record.end is not None):
        idle = end.status == "continue" and end.checkpoint == last
        last, stalled = end.checkpoint, stalled + 1 if idle else 1
    if checkpoint is not None and (last is None or checkpoint > last):
        return "continue", f"{seen}; newest checkpoint: step {checkpoint}"
    if stalled >= max_attempts:
        return "failed", f"{seen}; {stalled} attempts in a row without a new checkpoint, the limit"
    if verdict == _NEXT:
        return "continue", f"{seen}; newest checkpoint: step {checkpoint}"
    return "failed", f"{seen}; no checkpoint was added since the attempt before (step {checkpoint})"


# -- evidence --------------------------------------------------------------------------------


def read_records(folder: JobFolder) -> list[AttemptRecord]:
    paths = map(folder.attempt_record, folder.attempt_numbers())
    return [AttemptRecord.model_validate(read_json(path, schema_version=1)) for path in paths]


def write_ending(files: Attempt, state: JobState) -> None:
    """Record why an attempt is about to be ended: whoever ends it may die before it has."""
    write_json(files.ending, {"schema_version": 1, "phase": state.phase, "reason": state.reason})


def read_ending(files: Attempt) -> JobState | None:
    if not files.ending.exists():
        return None
    document = read_json(files.ending, schema_version=1)
    return JobState(Phase(document["phase"]), document["reason"])


_LOST_PEER = re.compile(
    r"(RuntimeError|Dist\w*Error): .*("
    r"connection (was )?(closed|reset) by|broken pipe|pair closure|socket closed|timed out waiting|"
    r"got 0 bytes|wait timeout|remote process exit|watchdog caught collective)",
    re.IGNORECASE | re.DOTALL,
)
"""What gloo, NCCL and torch's store raise in the processes that outlive another one."""


def read_exit_report(
    folder: JobFolder, spec: JobSpec, attempt: int | None
) -> tuple[ExitReport, str]:
    """What the job's files report about an attempt, and the reason they give or what is wrong."""
    try:
        result = folder.read_result()
    except ValueError as error:
        return ExitReport.NOTHING, f"result.json cannot be read: {error}"
    why = ""
    if result is not None:
        if (result.job_key, result.world_size) == (spec.key, spec.world_size):
            return ExitReport.PROOF, ""
        why = f"it names job {result.job_key}, expected {spec.key}"
        if result.job_key == spec.key:
            made = f"{result.world_size} processes made it, expected {spec.world_size}"
            why = f"{made}; they did not find one another"
        why = f"result.json is not this job's: {why}"
    try:
        end = folder.attempt(attempt).read_exit() if attempt is not None else None
    except ValueError as error:
        return ExitReport.NOTHING, f"exit.json cannot be read: {error}"
    if end is None:
        return ExitReport.NOTHING, why
    if end.status == "failed" and _LOST_PEER.match(end.reason):  # the cause is not this process's
        return ExitReport.NOTHING, f"a process lost another one: {end.reason}"
    return ExitReport(f"exit.json: {end.status}"), end.reason or why


def newest_checkpoint(folder: JobFolder) -> int | None:
    """Step of the newest committed checkpoint, by folder name; None without any."""
    names = [path.name for path in committed(folder.checkpoints)]
    return int(names[-1].removeprefix("step-")) if names else None


_LOG_LINES = 50
_LOG_BYTES = 64 * 1024
_TORCHRUN_REPORT = re.compile(  # forty lines, the last of them a second rule
    r"^E\d{4} [^\n]*torch/distributed/elastic/[^\n]*failed \(exitcode(.*?^={20,}\s*?$){2}\n?",
    re.MULTILINE | re.DOTALL,
)


def log_tail(path: Path) -> str:
    """The last lines of a log, without torchrun's report about itself; empty without a log."""
    text = _TORCHRUN_REPORT.sub("", tail_of(path, _LOG_BYTES))
    return "\n".join(text.splitlines()[-_LOG_LINES:])


def tail_of(path: Path, n_bytes: int) -> str:
    """The last bytes of a file as text; empty if there is none."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - n_bytes))
        return file.read().decode(errors="replace")


# -- events ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A line of ``events.jsonl``; ``attempt`` is None where it concerns the whole job."""

    time: float  # seconds since the epoch
    attempt: int | None
    observed: str
    action: str

    def __str__(self) -> str:
        about = f"attempt {self.attempt}: " if self.attempt else ""
        return f"{about}{self.observed}: {self.action}"


def append_event(folder: JobFolder, event: Event) -> None:
    line = json.dumps({"schema_version": 1, **vars(event)}, ensure_ascii=False)
    with folder.events.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_events(folder: JobFolder) -> list[Event]:
    """All events in order; a line that a crash cut short is left out."""
    if not folder.events.exists():
        return []
    found = []
    for line in folder.events.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            found.append(Event(entry["time"], entry["attempt"], entry["observed"], entry["action"]))
        except (ValueError, KeyError, TypeError):
            continue
    return found


# -- tables for the asset's page -------------------------------------------------------------

_MAX_ROWS = 40
_MAX_CELL = 240  # characters


def local_time(seconds: float) -> str:
    """Seconds since the epoch as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def duration(seconds: float) -> str:
    """In the largest unit that it fills, such as ``3 h``."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def attempts_table(records: Sequence[AttemptRecord]) -> str:
    """Markdown: one row per attempt."""
    rows = []
    for record in records:
        known, end = id_of(record.external), record.end
        target = f"{record.backend} ({known})" if known else record.backend
        submitted = local_time(record.submitted_at or record.intended_at)
        row = ("", "", "not ended", "")
        if end is not None:
            ran = f"{end.ran_s:.0f} s" if end.ran_s is not None else ""
            row = (ran, end.nodes or "", end.status, end.reason)
        rows.append((str(record.attempt), target, submitted, *row))
    return _table(("attempt", "target", "submitted", "ran", "nodes", "end", "reason"), rows)


def events_table(folder: JobFolder) -> str:
    """Markdown: one row per event, the last ones if there are many."""
    rows = [
        (local_time(event.time), str(event.attempt or ""), event.observed, event.action)
        for event in read_events(folder)
    ]
    return _table(("time", "attempt", "observed", "action"), rows, str(folder.events))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], source: str = "") -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows[-_MAX_ROWS:]]
    if len(rows) > _MAX_ROWS:
        lines += ["", f"{len(rows) - _MAX_ROWS} earlier ones are in {_cell(source)}"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text of a job or a scheduler, with markdown and HTML escaped."""
    words = " ".join(text.split())
    words = words if len(words) <= _MAX_CELL else words[: _MAX_CELL - 1] + "…"
    words = re.sub(r"([\\`*_\[\]|])", r"\\\1", words)
    return words.replace("<", "&lt;").replace(">", "&gt;")
