"""Who watches a job now, ``watcher.json``: written by the watcher, believed while it lives."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from roma_core.attempt import is_running, process_start
from roma_core.files import write_json
from roma_core.job import JobFolder

WATCHER_SILENT_S = 60.0
"""A watcher on another computer that has not said for so long that it is alive is dead."""

POD_SILENT_S = 300.0
"""The same where steps are pods: one that dies is noticed, waited for and started again meanwhile."""

_BEAT_S = 5.0


class Watcher:
    """This process, as the watcher of a job."""

    def __init__(self, folder: JobFolder, about: Mapping[str, Any]) -> None:
        """
        Args:
            about: who this is: ``asset_key``, ``dagster_run_id``.
        """
        self.folder, self.about = folder, dict(about)
        self._state, self._beat_at = "", -float("inf")

    def beat(self, state: str | None = None) -> None:
        """Say that it is alive, and how things stand where that is known: at once if it changed."""
        if state is not None and state != self._state:
            self._state, self._beat_at = state, -float("inf")
        if time.monotonic() - self._beat_at < _BEAT_S:
            return
        self._beat_at = time.monotonic()
        me = {"pid": os.getpid(), "start": process_start(os.getpid()), "beat": time.time()}
        me |= {"host": socket.gethostname(), "state": self._state}
        write_json(self.folder.watcher, {"schema_version": 1, **self.about, **me})


def is_watched(watcher: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this ``watcher.json`` still lives."""
    if not watcher:
        return False
    if watcher.get("host", socket.gethostname()) == socket.gethostname():
        return is_running(watcher["pid"], watcher["start"])
    from roma_pipelines.executor import DagsterSettings  # it imports dagster: a second

    in_pods = DagsterSettings().executor == "k8s_job"
    silent_s = POD_SILENT_S if in_pods else WATCHER_SILENT_S
    return time.time() - float(watcher["beat"]) < silent_s
