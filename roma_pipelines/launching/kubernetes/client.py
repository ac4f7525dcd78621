"""One namespace of a Kubernetes cluster: requests through the official client, and informers.

An ``Informer`` keeps all objects of a kind up to date; all launchers of a process share them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from roma_pipelines.launching.kubernetes.manifests import CONTROLLER_LABEL, MANAGED_BY, Manifest
from roma_pipelines.launching.launcher import Rejected, Unreachable

Object = dict[str, Any]

_RENEW_S = 25 * 60.0  # credentials and certificates are read again after so long
_CONNECT_S, _READ_S = 5.0, 30.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})
_FIRST_ANSWER_S = 10.0


class ApiError(RuntimeError):
    """The API server rejected a request: HTTP status, and every cause that it named."""

    def __init__(self, code: int, reasons: list[str]) -> None:
        self.code, self.reasons = code, reasons
        super().__init__("; ".join(reasons))


class Client:
    """A namespace, accessed with one account; threads may share it.

    It has informers of our Jobs (by uid), of their pods (by the Job's uid), and of Warning events
    (by the uid of the object they are about).
    """

    def __init__(
        self, kubeconfig: Path | None = None, context: str | None = None, namespace: str = "default"
    ) -> None:
        self.kubeconfig, self.context, self.namespace = kubeconfig, context, namespace
        self._api_client: Any = None
        self._made_at = 0.0
        self._lock = threading.Lock()

        ours, warning = {"labelSelector": selector(MANAGED_BY)}, {"fieldSelector": "type=Warning"}
        self.jobs = Informer(self, "jobs", ours, ("metadata", "uid"))
        self.pods = Informer(self, "pods", ours, ("metadata", "labels", CONTROLLER_LABEL))
        self.warnings = Informer(self, "events", warning, ("involvedObject", "uid"))

    def path(self, resource: str, name: str = "") -> str:
        """Path of a kind of object, such as ``pods``, or of one of them."""
        group = "apis/batch/v1" if resource == "jobs" else "api/v1"
        return f"/{group}/namespaces/{self.namespace}/{resource}" + (f"/{name}" if name else "")

    def request(
        self, method: str, path: str, *, query: Mapping[str, Any] | None = None, body: Any = None
    ) -> Object:
        """The answer to one request.

        Raises:
            ApiError: the server rejected it.
            Unreachable: whether it was done is not known.
            Rejected: no cluster is configured here.
        """
        with self._answer(method, path, query or {}, body, _READ_S) as response:
            document: Object = json.loads(response.data)
            return document

    def pods_of(self, labels: Mapping[str, str]) -> list[Object]:
        """The pods with these labels that exist now. Raises as ``request``."""
        query = {"labelSelector": selector(labels)}
        return list(self.request("GET", self.path("pods"), query=query)["items"])

    def create(self, manifest: Manifest, dry_run: bool = False) -> Object:
        """Create an object; unknown fields are errors. Raises as ``request``."""
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        path = self.path(f"{manifest['kind'].lower()}s")
        return self.request("POST", path, query=query, body=manifest)

    def lines(self, path: str, query: Mapping[str, Any], timeout_s: float) -> Iterator[bytes]:
        """Lines of an answer as they arrive; a stream without data for ``timeout_s`` counts as cut.

        Raises as ``request``, also after the first lines.
        """
        from urllib3.exceptions import HTTPError

        rest = b""
        with self._answer("GET", path, query, None, timeout_s) as response:
            try:
                for part in response.stream(amt=None, decode_content=False):
                    *whole, rest = (rest + part).split(b"\n")
                    yield from whole
            except (HTTPError, OSError) as error:
                raise Unreachable(f"{path}: {error}") from error
        yield from filter(None, [rest])

    def sync(self) -> str:
        """Keep the informers running; the reason if they have no current state, else empty."""
        for informer in (self.jobs, self.pods, self.warnings):
            informer.wake()
        for informer in (self.jobs, self.pods):
            deadline = time.monotonic() + _FIRST_ANSWER_S
            while not informer.synced.wait(0.05) and not informer.error:
                if time.monotonic() > deadline:
                    return "the Kubernetes API server has not answered yet"
        return self.jobs.error or self.pods.error  # a state is complete without warnings

    def warnings_about(self, objects: list[Object]) -> list[Object]:
        """Warning events of these objects, the oldest first."""

        def time_of(event: Object) -> str:
            # schedulers fill one field, controllers and kubelets others
            repeated = (event.get("series") or {}).get("lastObservedTime")
            once = event.get("lastTimestamp") or event.get("eventTime")
            return repeated or once or event["metadata"].get("creationTimestamp", "")

        found = [w for there in objects for w in self.warnings.present(there["metadata"]["uid"])]
        return sorted(found, key=time_of)

    def _answer(
        self, method: str, path: str, query: Mapping[str, Any], body: Any, read_s: float
    ) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        for first in (True, False):
            with self._lock:
                if self._api_client is None or time.monotonic() - self._made_at > _RENEW_S:
                    self._api_client, self._made_at = self._configured(), time.monotonic()
                api = self._api_client
            try:
                return api.call_api(
                    path,
                    method,
                    query_params=list(query.items()),
                    header_params=dict.fromkeys(("Accept", "Content-Type"), "application/json"),
                    body=body,
                    auth_settings=["BearerToken"],
                    _preload_content=False,
                    _return_http_data_only=True,
                    _request_timeout=(_CONNECT_S, read_s),
                )
            except ApiException as error:
                if not first or error.status not in (0, None, 401):
                    _raise(error)
            except (HTTPError, OSError) as error:
                replaced = "SSL" in type(error).__name__ + str(error)  # a new certificate
                if not (first and method == "GET" and replaced):
                    reason = f"the Kubernetes API server does not answer: {error}"
                    raise Unreachable(reason) from error
            with self._lock:
                self._api_client = None
        raise AssertionError("the second try returns or raises")

    def _configured(self) -> Any:
        from kubernetes import client, config
        from kubernetes.config.config_exception import ConfigException

        made = client.Configuration()
        try:
            named = self.kubeconfig or self.context or os.environ.get("KUBECONFIG")
            if not named and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=made)  # the pod's own account
            else:
                path = str(self.kubeconfig) if self.kubeconfig else None
                config.load_kube_config(path, self.context, client_configuration=made)
        except (ConfigException, OSError, ValueError) as error:
            reason = (
                f"no Kubernetes cluster is configured here ({str(error).strip()}); set "
                f"ROMA_KUBERNETES_KUBECONFIG or KUBECONFIG, and ROMA_KUBERNETES_CONTEXT if the file has "
                f"several"
            )
            raise Rejected([reason]) from error
        made.retries = False  # requests are retried here, not below
        return client.ApiClient(made)


_clients: dict[tuple[Any, ...], Client] = {}
_clients_lock = threading.Lock()


def shared_client(kubeconfig: Path | None, context: str | None, namespace: str) -> Client:
    """The one client of this process for a namespace, so that all its launchers share the watches."""
    key = (kubeconfig, context, namespace)
    with _clients_lock:
        return _clients.setdefault(key, Client(*key))


def selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _raise(error: Any) -> NoReturn:
    reasons = [f"HTTP {error.status} {error.reason}"]
    with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError):
        status = json.loads(error.body)
        reasons = [str(status["message"])] if status.get("message") else reasons
        causes = (status.get("details") or {}).get("causes") or []
        reasons = [f"{c.get('field', '?')}: {c['message']}" for c in causes] or reasons
    if error.status in _BUSY or not error.status:
        raise Unreachable(f"the Kubernetes API server: {'; '.join(reasons)}") from error
    raise ApiError(error.status, reasons) from error


# -- objects kept up to date ---------------------------------------------------------------------

_IDLE_S = 120.0  # an informer that was not read for so long stops
_SILENT_S = 60.0  # a watch without data for so long is opened again: it may be half open
_WATCH_S = 240  # the server ends a watch after so long
_STABLE_S = 20.0  # a watch that lasted so long was no failed try
_PAGE = 500
_MAX_WAIT_S = 15.0
_KEEP_DELETED_S = 3600.0


class Informer:
    """All objects of one kind that match a query, kept up to date by a thread.

    One list, then one watch that resumes at its last resourceVersion. After 410 (Gone) it lists
    again and keeps what vanished meanwhile among the deleted objects. (The official client's
    ``Watch`` builds a model of every event, which takes 20 times as long as its JSON, and without
    models it cannot read a 410.)
    """

    def __init__(
        self, client: Client, resource: str, query: dict[str, str], group: tuple[str, ...]
    ) -> None:
        """``group``: path in an object to the key by which it is looked up."""
        self.client, self.path, self.query = client, client.path(resource), query
        self.group = group
        self.error = ""  # why the state is not current; empty while it is
        self.synced = threading.Event()  # set once there was an answer
        self._present: dict[str, dict[str, Object]] = {}  # group -> uid -> object
        self._deleted: dict[str, dict[str, tuple[float, Object]]] = {}
        self._lock = threading.Lock()
        self._version = ""
        self._read_at = time.monotonic()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """Start the thread if it does not run, and keep it running for a while."""
        with self._lock:
            self._read_at = time.monotonic()
            if self._thread is None or not self._thread.is_alive():
                name = f"watch {self.path}"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def present(self, group: str) -> list[Object]:
        with self._lock:
            return list(self._present.get(group, {}).values())

    def deleted(self, group: str) -> list[Object]:
        """Deleted objects of the group, as they were last reported."""
        with self._lock:
            return [there for _, there in self._deleted.get(group, {}).values()]

    def _run(self) -> None:
        wait_s = 0.0
        while time.monotonic() - self._read_at < _IDLE_S:
            began = time.monotonic()
            try:
                if not self._version:
                    self._list()
                self.error = ""
                self.synced.set()
                self._watch()
                wait_s = 0.0
            except ApiError as error:
                if error.code == 410:
                    self._version = ""
                    continue
                self.error = str(error)
            except (Unreachable, Rejected) as error:
                # a cut stream is normal; only a server that cannot be reached again is an error
                if time.monotonic() - began > _STABLE_S:
                    wait_s = 0.0
                elif wait_s or not self.synced.is_set():
                    self.error = str(error)
            wait_s = min(max(0.2, 2 * wait_s), _MAX_WAIT_S)
            time.sleep(wait_s * random.uniform(0.5, 1.0))  # many processes retry at once
        with self._lock:
            self._version = ""  # changes are missed from now on
            self.synced.clear()

    def _list(self) -> None:
        found: list[Object] = []
        query = {**self.query, "limit": _PAGE}
        while True:
            answer = self.client.request("GET", self.path, query=query)
            found += answer.get("items") or []
            if not (token := answer["metadata"].get("continue")):
                break
            query["continue"] = token
        uids = {there["metadata"]["uid"] for there in found}
        with self._lock:
            known = {uid: o for members in self._present.values() for uid, o in members.items()}
        for uid in known.keys() - uids:
            self._apply("DELETED", known[uid])
        for there in found:
            self._apply("MODIFIED", there)
        self._version = answer["metadata"]["resourceVersion"]

    def _watch(self) -> None:
        query = {**self.query, "watch": "true", "allowWatchBookmarks": "true"}
        query |= {"resourceVersion": self._version, "timeoutSeconds": str(_WATCH_S)}
        try:
            for line in self.client.lines(self.path, query, _SILENT_S):
                event = json.loads(line)
                there = event["object"]
                if event["type"] == "ERROR":
                    raise ApiError(int(there.get("code", 500)), [str(there.get("message", there))])
                self._version = there["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self._apply(event["type"], there)
                if time.monotonic() - self._read_at > _IDLE_S:
                    return
        except ValueError as error:  # the last line of a cut stream
            raise Unreachable(f"{self.path}: {error}") from error

    def _apply(self, change: str, there: Object) -> None:
        there["metadata"].pop("managedFields", None)  # half of every object, not used here
        uid, key, now = there["metadata"]["uid"], there, time.monotonic()
        for name in self.group:
            key = key.get(name) or {}
        group = str(key or "")
        with self._lock:
            if change != "DELETED":
                self._present.setdefault(group, {})[uid] = there
                return
            self._present.get(group, {}).pop(uid, None)
            if not self._present.get(group):
                self._present.pop(group, None)
            self._deleted.setdefault(group, {})[uid] = (now, there)
            for name, gone in list(self._deleted.items()):
                if all(now - at > _KEEP_DELETED_S for at, _ in gone.values()):
                    del self._deleted[name]
