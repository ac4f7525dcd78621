"""What stands in a job's folder: its attempts, its last word, its checkpoints, the end of its log.

The target says how the processes ended; this is the other witness, for ``judge``.
"""

from __future__ import annotations

import re
from pathlib import Path

from roma_core.files import read_json
from roma_core.job import JobFolder, Result
from roma_pipelines.launching.job import AttemptRecord, JobSpec
from roma_pipelines.launching.judge import Said

_LOG_LINES = 50
_LOG_BYTES = 64 * 1024
_SAID = {"completed": Said.COMPLETED, "continue": Said.CONTINUE, "failed": Said.FAILED}
_TORCHRUN_REPORTS = re.compile(r"^E\d{4} .*torch/distributed/elastic/.*failed \(exitcode")
_RULE = re.compile(r"^={20,}\s*$")


def read_records(folder: JobFolder) -> list[AttemptRecord]:
    """All attempts on record, ascending."""
    paths = [folder.attempt_record(n) for n in folder.attempt_numbers()]
    return [AttemptRecord.model_validate(read_json(path, schema_version=1)) for path in paths]


def said_by(folder: JobFolder, spec: JobSpec, attempt: int | None) -> tuple[Said, str]:
    """What the job's files say of an attempt, and the reason they give or what is wrong with them."""
    try:
        result = folder.read_result()
    except ValueError as error:
        return Said.NOTHING, f"result.json cannot be read: {error}"
    if result is not None and not (wrong := _wrong(result, spec)):
        return Said.PROOF, ""
    why = f"result.json is not this job's: {wrong}" if result is not None else ""
    try:
        end = folder.attempt(attempt).read_exit() if attempt is not None else None
    except ValueError as error:
        return Said.NOTHING, f"exit.json cannot be read: {error}"
    if end is None:
        return Said.NOTHING, why
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
