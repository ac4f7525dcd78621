"""Dagster runs in the foreground of a terminal: which process holds one, and what a killed one left.

No daemon looks after such a run. Its process says in the run's tags who it is; a run that is not
finished and whose process is gone was killed, and the next command goes on with its jobs as a retry
of it would.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

import dagster as dg

from roma_core.attempt import is_running, process_start

_NAME, _PROCESS, _HOST, _SETTINGS = (
    f"roma/foreground{part}" for part in ("", "_process", "_host", "_settings")
)


def tags_of(name: str, settings: str, retried: dg.DagsterRun | None = None) -> dict[str, str]:
    """Tags of a run that this process is about to begin.

    Args:
        name: of what it makes; one process at a time makes it.
        settings: digest of what it is made from.
        retried: the run whose jobs it goes on with.
    """
    process = f"{os.getpid()} {process_start(os.getpid())}"
    mine = {_NAME: name, _PROCESS: process, _HOST: socket.gethostname(), _SETTINGS: settings}
    if retried is None:
        return mine
    root = retried.tags.get("dagster/root_run_id", retried.run_id)
    marks = {"dagster/parent_run_id": retried.run_id, "dagster/root_run_id": root}
    return {**mine, **marks, "dagster/is_resume_retry": "true"}


def has_settings(run: dg.DagsterRun, settings: str) -> bool:
    """Whether a run was made from these settings."""
    return run.tags.get(_SETTINGS) == settings


def unfinished(
    instance: dg.DagsterInstance, name: str
) -> tuple[list[dg.DagsterRun], list[dg.DagsterRun]]:
    """Runs of this name and computer that are not finished: held by a living process, and killed.

    Both with the newest first.
    """
    here = {_NAME: name, _HOST: socket.gethostname()}
    runs = instance.get_runs(dg.RunsFilter(tags=here))
    open_ones = [run for run in runs if not run.is_finished]
    held = [run for run in open_ones if _is_held(run.tags)]
    return held, [run for run in open_ones if run not in held]


def process_of(run: dg.DagsterRun) -> int:
    """Id of the process that holds a run."""
    return int(run.tags[_PROCESS].split(" ", 1)[0])


def _is_held(tags: Mapping[str, str]) -> bool:
    pid, _, start = tags[_PROCESS].partition(" ")
    return is_running(int(pid), start)
