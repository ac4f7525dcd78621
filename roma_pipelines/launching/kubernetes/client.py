"""The log of a pod, brought into the job folder while it is written.

Pods that are ended for another's failure are deleted with their logs, so the first pod's is followed
live. A stream may be cut at any time (the kubelet does so after some hours, a certificate may be
replaced): it is opened again from the time of the last line, and lines that come twice are known by
their times.

Requests to one Kubernetes API server, through the official client.
What a cluster's jobs are doing, as one process sees it: one list, then one watch, per kind.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from roma_pipelines.launching.kubernetes.manifests import CONTAINER, CONTROLLER_LABEL, MANAGED_BY
from roma_pipelines.launching.launcher import Rejected, Unreachable

_RENEW_S = 25 * 60.0
_CONNECT_S, _READ_S = 5.0, 30.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


class ApiError(RuntimeError):
    """The API server answered no.

    Attributes:
        code: HTTP status.
        reasons: all that it found wrong.
    """

    def __init__(self, code: int, reasons: list[str]) -> None:
        self.code, self.reasons = code, reasons
        super().__init__("; ".join(reasons))


class Connection:
    """One API server as one account; threads may share it."""

    def __init__(self, kubeconfig: Path | None = None, context: str | None = None) -> None:
        self.kubeconfig, self.context = kubeconfig, context
        self._client: Any = None
        self._made_at = 0.0
        self._lock = threading.Lock()

    def request(
        self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            Denied: the server said no.
            NoAnswer: it may or may not have been done.
            Refused: there is no configuration to reach a cluster with.
        """
        with self._answer(method, path, query or {}, body, _READ_S) as response:
            document: dict[str, Any] = json.loads(response.data)
            return document

    def lines(self, path: str, query: Mapping[str, Any], silent_s: float) -> Iterator[bytes]:
        """Lines of an answer as they arrive, until the server ends it.

        Args:
            silent_s: a stream that brings nothing for so long is taken for cut.

        Raises:
            Denied, NoAnswer, Refused: as of ``request``; also in the middle.
        """
        from urllib3.exceptions import HTTPError

        rest = b""
        with self._answer("GET", path, query, None, silent_s) as response:
            try:
                for part in response.stream(amt=None, decode_content=False):
                    *whole, rest = (rest + part).split(b"\n")
                    yield from whole
            except (HTTPError, OSError) as error:
                raise Unreachable(f"{path}: {error}") from error
        if rest:
            yield rest

    def _answer(
        self, method: str, path: str, query: Mapping[str, Any], body: Any, read_s: float
    ) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        for again in (True, False):
            try:
                return self._api().call_api(
                    path,
                    method,
                    query_params=list(query.items()),
                    header_params={
                        "Accept": "application/json",
                        "Content-Type": "application/json",
                    },
                    body=body,
                    auth_settings=["BearerToken"],
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(_CONNECT_S, read_s),
                )
            except ApiException as error:
                if again and error.status in (0, None, 401):
                    self._forget()
                    continue
                _raise(error)
            except (HTTPError, OSError) as error:
                if again and method == "GET" and "SSL" in type(error).__name__ + str(error):
                    self._forget()  # a certificate was replaced
                    continue
                raise Unreachable(f"the Kubernetes API server does not answer: {error}") from error
        raise AssertionError("the second try returns or raises")

    def _forget(self) -> None:
        with self._lock:
            self._client = None

    def _api(self) -> Any:
        with self._lock:
            if self._client is None or time.monotonic() - self._made_at > _RENEW_S:
                self._client, self._made_at = self._make(), time.monotonic()
            return self._client

    def _make(self) -> Any:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        made = client.Configuration()
        try:
            asked = self.kubeconfig or self.context or os.environ.get("KUBECONFIG")
            if not asked and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=made)  # a pod's own account
            else:
                path = str(self.kubeconfig) if self.kubeconfig else None
                config.load_kube_config(path, self.context, client_configuration=made)
        except (ConfigException, OSError, ValueError) as error:
            raise Rejected(
                [
                    f"no Kubernetes cluster is configured here ({str(error).strip()}); set "
                    f"ROMA_KUBERNETES_KUBECONFIG or KUBECONFIG, and ROMA_KUBERNETES_CONTEXT if the "
                    f"file has several"
                ]
            ) from error
        made.retries = False  # what is asked again is decided here, not below
        return client.ApiClient(made)


def _raise(error: Any) -> NoReturn:
    """An ApiException as one of the two kinds."""
    reasons = [f"HTTP {error.status} {error.reason}"]
    try:
        status = json.loads(error.body)
        if message := status.get("message"):
            reasons = [str(message)]
        causes = (status.get("details") or {}).get("causes") or []
        reasons = [f"{c.get('field', '?')}: {c['message']}" for c in causes] or reasons
    except (TypeError, ValueError, AttributeError, KeyError):
        pass
    if error.status in _BUSY or not error.status:
        raise Unreachable(f"the Kubernetes API server: {'; '.join(reasons)}") from error
    raise ApiError(error.status, reasons) from error


Object = dict[str, Any]

_IDLE_S = 120.0  # nobody looked for so long: stop watching
_SILENT_S = 60.0  # a watch that brings nothing is opened anew; half-open connections look like that
_WATCH_S = 240  # the server is asked to end it then
_SETTLED_S = 20.0  # a watch that lived so long was no failed try
_PAGE = 500
_SLOWEST_S = 15.0
_KEPT_S = 3600.0
_FIRST_ANSWER_S = 10.0


class Informer:
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
            except ApiError as no:
                if no.code == 410:
                    self._version = ""
                    continue
                self.error = str(no)
            except (Unreachable, Rejected) as away:
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
                    raise ApiError(int(there.get("code", 500)), [str(there.get("message", there))])
                self._version = there["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self._apply(event["type"], there)
                if time.monotonic() - self._looked_at > _IDLE_S:
                    return
        except ValueError as error:  # the last line of a stream that was cut
            raise Unreachable(f"{self.path}: {error}") from error

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
        self.jobs = Informer(connection, jobs, ours, uid)
        self.pods = Informer(connection, f"{core}/pods", ours, controller)
        self.warnings = Informer(
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


_kubernetes_logs_SILENT_S = 300.0
_AGAIN_S = 0.5

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
            except ApiError as no:
                if no.code in (404, 403) or (over and no.code != 401):
                    return  # the pod is gone, or its log is not to be had
                over, came = (
                    False,
                    False,
                )  # its container is only starting; or the token was replaced
            except Rejected:
                return
            except Unreachable:
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
            for line in self.connection.lines(self.path, query, _kubernetes_logs_SILENT_S):
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
    except (ApiError, Unreachable, Rejected):
        return ""
