"""The log of a pod, brought into the job folder while it is written.

Pods that are ended for another's failure are deleted with their logs, so the first pod's is followed
live. A stream may be cut at any time (the kubelet does so after some hours, a certificate may be
replaced): it is opened again from the time of the last line, and lines that come twice are known by
their times.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from roma_pipelines.launching.kubernetes_api import Connection, Denied
from roma_pipelines.launching.kubernetes_manifests import CONTAINER
from roma_pipelines.launching.launcher import NoAnswer, Refused

_SILENT_S = 300.0
_AGAIN_S = 0.5
_SLOWEST_S = 15.0
_MARK_EVERY_S = 1.0


class LogFollower:
    """Appends the log of one pod to a file, until the pod is over and all of it is there."""

    def __init__(
        self,
        connection: Connection,
        namespace: str,
        pod: str,
        log: Path,
        is_over: Callable[[], bool],
    ) -> None:
        """
        Args:
            is_over: whether the pod will write no more.
        """
        self.connection, self.pod, self.log, self.is_over = connection, pod, log, is_over
        self.path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
        self.mark = log.with_name(f".{log.name}.position")
        self._last, self._same = self._read_mark()  # time of the last line, and how many have it
        self._marked_at = 0.0
        self._left = False
        self._thread = threading.Thread(target=self._run, name=f"log of {pod}", daemon=True)
        self._thread.start()

    def finish(self, wait_s: float) -> None:
        """Wait so long for the rest of the log; what comes later is left.

        Its Job is over, but the watch on pods may hear of the pod's end later than the one on Jobs.
        """
        self._thread.join(wait_s)
        self._left = True

    def _run(self) -> None:
        wait_s = _AGAIN_S
        while not self._left:
            over = self.is_over()  # asked first: what is written after this is still read
            try:
                came = self._read(follow=not over)
            except Denied as no:
                if no.code in (404, 403) or (over and no.code != 401):
                    return  # the pod is gone, or its log is not to be had
                over, came = (
                    False,
                    False,
                )  # its container is only starting; or the token was replaced
            except Refused:
                return
            except NoAnswer:
                over, came = False, False
            if over and not came:  # the end of a stream alone may be a cut
                return
            if over:
                continue
            wait_s = _AGAIN_S if came else min(2 * wait_s, _SLOWEST_S)
            self._pause(wait_s)

    def _pause(self, seconds: float) -> None:
        """Wait, but hardly beyond the pod's end."""
        end = time.monotonic() + seconds
        while True:
            time.sleep(0.1)
            if time.monotonic() > end or self._left or self.is_over():
                return

    def _read(self, follow: bool) -> bool:
        """Read one stream to its end; whether it brought anything."""
        query = {"container": CONTAINER, "follow": str(follow).lower(), "timestamps": "true"}
        if self._last:
            query["sinceTime"] = self._last
        before, repeated, came = self._last, 0, False
        try:
            for line in self.connection.lines(self.path, query, _SILENT_S):
                if self._left:
                    return came
                stamp, _, text = line.decode(errors="replace").partition(" ")
                if before and stamp <= before:
                    repeated += stamp == before
                    if stamp < before or repeated <= self._same:
                        continue
                self._append(stamp, text)
                came = True
        finally:
            self._write_mark()
        return came

    def _append(self, stamp: str, text: str) -> None:
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
        self._same = self._same + 1 if stamp == self._last else 1
        self._last = stamp
        if time.monotonic() - self._marked_at > _MARK_EVERY_S:
            self._write_mark()

    def _read_mark(self) -> tuple[str, int]:
        """Where the watcher before stopped; of another pod it is the beginning."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            mark = json.loads(self.mark.read_text())
            return (mark["time"], mark["same"]) if mark["pod"] == self.pod else ("", 0)
        except (OSError, ValueError, KeyError, TypeError):
            return "", 0

    def _write_mark(self) -> None:
        """Not synced: losing it repeats the lines of a second."""
        self._marked_at = time.monotonic()
        mark = {"schema_version": 1, "pod": self.pod, "time": self._last, "same": self._same}
        aside = self.mark.with_name(f"{self.mark.name}.new")
        aside.write_text(json.dumps(mark))
        aside.replace(self.mark)


def end_of_log(connection: Connection, namespace: str, pod: str, lines: int) -> str:
    """The last lines of a pod's log; empty if it has none or nobody can say."""
    path = f"/api/v1/namespaces/{namespace}/pods/{pod}/log"
    query = {"container": CONTAINER, "tailLines": lines}
    try:
        return "\n".join(
            line.decode(errors="replace") for line in connection.lines(path, query, 30.0)
        )
    except (Denied, NoAnswer, Refused):
        return ""
