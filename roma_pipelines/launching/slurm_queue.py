"""What ``squeue`` says: its lines, and where in the line a job stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from roma_pipelines.launching.job import JobState, Phase
from roma_pipelines.launching.poll import Jobs, Places

_COLUMNS = ("state", "starts", "nodes", "reason", "partition", "user", "priority")
SQUEUE = ("squeue", "-h", "-t", "all", "-o", "%i|%T|%S|%N|%r|%P|%u|%Q|%Z|%j")
"""The question; with ``--me`` about one's own jobs. Folder and name come last: they may hold a bar."""

_NOT_IN_LINE = frozenset(  # reasons of jobs that no free node would start
    ["Dependency", "DependencyNeverSatisfied", "JobHeldUser", "JobHeldAdmin", "BeginTime"]
)


def rows_of(output: str) -> Jobs:
    """squeue's lines by job id."""
    found = {}
    for line in output.splitlines():
        job, *values, rest = line.split("|", 8)
        folder, _, name = rest.rpartition("|")
        found[job] = {**dict(zip(_COLUMNS, values, strict=True)), "folder": folder, "name": name}
    return found


def ours_of(rows: Jobs) -> Jobs:
    """Those this project submitted, without what changes all the time and so would look like news."""
    return {
        job: {column: value for column, value in row.items() if column != "priority"}
        for job, row in rows.items()
        if row["name"].startswith("roma-")
    }


def places_in_queue(rows: Jobs, wanted: Iterable[str]) -> Places:
    """(place, of how many) of the wanted jobs that wait, among those that wait for the same nodes.

    Jobs stand in line by priority; those that are held, or wait for a time or another job, do not.
    """
    waiting = [
        (job, frozenset(row["partition"].split(",")))
        for job, row in sorted(rows.items(), key=lambda item: -int(item[1]["priority"]))
        if row["state"] == "PENDING" and row["reason"] not in _NOT_IN_LINE
    ]
    lines: dict[str, dict[str, int]] = {}  # place by job, of all that share a partition of these
    places = {}
    for job in wanted:
        named = rows[job]["partition"]
        if named not in lines:
            ours = frozenset(named.split(","))
            line = [other for other, theirs in waiting if theirs & ours]
            lines[named] = {other: place for place, other in enumerate(line, start=1)}
        if job in lines[named]:
            places[job] = (lines[named][job], len(lines[named]))
    return places


def waiting(job: str, row: Mapping[str, str], place: tuple[int, int] | None) -> JobState:
    """Why a job waits, behind how many, and until when, as far as SLURM says."""
    said = f"job {job} waits: {row['reason']}"
    queue: dict[str, Any] = {}
    if place is not None:
        queue |= {"queue_position": place[0], "queue_length": place[1]}
        said += f", {place[0]} of {place[1]} in the queue"
    if row["starts"] not in ("", "N/A"):
        queue["expected_start"] = row["starts"]
        said += f", expected to start {row['starts']}"
    return JobState(Phase.WAITING, said, queue=queue)
