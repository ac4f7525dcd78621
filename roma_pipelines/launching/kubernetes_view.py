"""What a cluster's jobs are doing, as one process sees it: one list, then one watch, per kind.

However many jobs a process supervises, the API server hears of it three times: for Jobs and pods
that carry this project's label, and for warnings of the namespace. Each watch goes on from the
last version it saw; where the server has forgotten that one (410), the kind is listed again.
Objects that vanish are kept a while: how a pod ended is often known only from its last words.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from roma_pipelines.launching.kubernetes_api import Connection, Denied
from roma_pipelines.launching.kubernetes_manifests import CONTROLLER_LABEL, MANAGED_BY
from roma_pipelines.launching.launcher import NoAnswer, Refused

Object = dict[str, Any]

_IDLE_S = 120.0  # nobody looked for so long: stop watching
_SILENT_S = 60.0  # a watch that brings nothing is opened anew; half-open connections look like that
_WATCH_S = 240  # the server is asked to end it then
_SETTLED_S = 20.0  # a watch that lived so long was no failed try
_PAGE = 500
_SLOWEST_S = 15.0
_KEPT_S = 3600.0
_FIRST_ANSWER_S = 10.0


class Mirror:
    """All objects of one kind, kept up to date by a thread.

    Attributes:
        error: why there is no news at the moment; empty while there is.
        synced: whether there ever was an answer.
    """

    def __init__(
        self, connection: Connection, path: str, query: dict[str, str], group: Callable[..., str]
    ) -> None:
        """
        Args:
            group: of an object, by which it is asked for.
        """
        self.connection, self.path, self.query, self.group = connection, path, query, group
        self.error, self.synced = "", threading.Event()
        self._groups: dict[str, dict[str, Object]] = {}  # group -> uid -> object
        self._left: dict[str, dict[str, tuple[float, Object]]] = {}
        self._lock = threading.Lock()
        self._version = ""
        self._looked_at = time.monotonic()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Somebody looks: watch, if nobody does."""
        with self._lock:
            self._looked_at = time.monotonic()
            if self._thread is None or not self._thread.is_alive():
                name = f"watch {self.path}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def present(self, group: str) -> list[Object]:
        """Objects of the group that exist."""
        with self._lock:
            return list(self._groups.get(group, {}).values())

    def all_present(self) -> list[Object]:
        """All objects that exist."""
        with self._lock:
            return [there for members in self._groups.values() for there in members.values()]

    def departed(self, group: str) -> list[Object]:
        """Objects of the group that existed, as they were last seen."""
        with self._lock:
            return [there for _, there in self._left.get(group, {}).values()]

    def _run(self) -> None:
        wait_s = 0.0
        while time.monotonic() - self._looked_at < _IDLE_S:
            began = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self.error = ""
                self.synced.set()
                self._watch()
                wait_s = 0.0
            except Denied as no:
                if no.code == 410:
                    self._version = ""
                    continue
                self.error = str(no)
            except (NoAnswer, Refused) as away:
                # one cut stream is no news; only a server that cannot be reached again is
                if time.monotonic() - began > _SETTLED_S:
                    wait_s = 0.0
                elif wait_s or not self.synced.is_set():
                    self.error = str(away)
            wait_s = min(max(0.2, 2 * wait_s), _SLOWEST_S)
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # many processes lost it at once
        with self._lock:
            self._version = ""  # what happens now is not seen
            self.synced.clear()

    def _list(self) -> None:
        found: list[Object] = []
        query = {**self.query, "limit": _PAGE}
        while True:
            answer = self.connection.request("GET", self.path, query=query)
            found += answer.get("items") or []
            if not (token := answer["metadata"].get("continue")):
                break
            query["continue"] = token
        uids = {item["metadata"]["uid"] for item in found}
        with self._lock:
            gone = [o for g in self._groups.values() for uid, o in g.items() if uid not in uids]
        for there in gone:
            self._apply("DELETED", there)
        for there in found:
            self._apply("MODIFIED", there)
        self._version = answer["metadata"]["resourceVersion"]

    def _watch(self) -> None:
        query = {
            **self.query,
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": _WATCH_S,
        }
        try:
            for line in self.connection.lines(self.path, query, _SILENT_S):
                event = json.loads(line)
                there = event["object"]
                if event["type"] == "ERROR":
                    raise Denied(int(there.get("code", 500)), [str(there.get("message", there))])
                self._version = there["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self._apply(event["type"], there)
                if time.monotonic() - self._looked_at > _IDLE_S:
                    return
        except ValueError as error:  # the last line of a stream that was cut
            raise NoAnswer(f"{self.path}: {error}") from error

    def _apply(self, kind: str, there: Object) -> None:
        there["metadata"].pop("managedFields", None)  # half of every object, of no use here
        uid, group = there["metadata"]["uid"], self.group(there)
        now = time.monotonic()
        with self._lock:
            if kind != "DELETED":
                self._groups.setdefault(group, {})[uid] = there
                return
            members = self._groups.get(group, {})
            members.pop(uid, None)
            if not members:
                self._groups.pop(group, None)
            self._left.setdefault(group, {})[uid] = (now, there)
            for name, left in list(self._left.items()):
                if all(now - at > _KEPT_S for at, _ in left.values()):
                    del self._left[name]


class ClusterView:
    """Jobs, their pods, and warnings about both, in one namespace."""

    def __init__(self, connection: Connection, namespace: str) -> None:
        ours = {"labelSelector": ",".join(f"{k}={v}" for k, v in MANAGED_BY.items())}
        core = f"/api/v1/namespaces/{namespace}"

        def uid(there: Object) -> str:
            return str(there["metadata"]["uid"])

        def controller(there: Object) -> str:
            return str(there["metadata"].get("labels", {}).get(CONTROLLER_LABEL, ""))

        def about(there: Object) -> str:
            return str(there["involvedObject"].get("uid", ""))

        jobs = f"/apis/batch/v1/namespaces/{namespace}/jobs"
        self.jobs = Mirror(connection, jobs, ours, uid)
        self.pods = Mirror(connection, f"{core}/pods", ours, controller)
        self.warnings = Mirror(
            connection, f"{core}/events", {"fieldSelector": "type=Warning"}, about
        )

    def look(self) -> str:
        """Make sure somebody watches; why there is no news, empty if there is."""
        mirrors = (self.jobs, self.pods, self.warnings)
        for mirror in mirrors:
            mirror.wake()
        for mirror in (self.jobs, self.pods):
            deadline = time.monotonic() + _FIRST_ANSWER_S
            while not mirror.synced.wait(0.05) and not mirror.error:
                if time.monotonic() > deadline:
                    return "the Kubernetes API server has not answered yet"
        return self.jobs.error or self.pods.error  # without warnings one can go on

    def warnings_about(self, objects: list[Object]) -> list[Object]:
        """Warning events of these objects, the oldest first."""
        found = [w for o in objects for w in self.warnings.present(o["metadata"]["uid"])]
        return sorted(found, key=when)


def when(event: Object) -> str:
    """Time of an event: schedulers fill one field, controllers and kubelets another."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((t for t in times if t), event["metadata"].get("creationTimestamp", ""))


_views: dict[tuple[Any, ...], ClusterView] = {}
_views_lock = threading.Lock()


def shared_view(connection: Connection, namespace: str) -> ClusterView:
    """The one view of this process on a namespace of a cluster."""
    key = (connection.kubeconfig, connection.context, namespace)
    with _views_lock:
        if key not in _views:
            _views[key] = ClusterView(connection, namespace)
        return _views[key]
