"""A small Kubernetes API server on the loopback, for tests: HTTP as the real one speaks it.

It knows watches with resourceVersion, 410, label and field selectors, paging, dry runs, strict
fields, Status errors, deletion that orphans by default, tokens and a Role. ``asked`` counts requests by verb and resource. What happens
to Jobs is a controller's part.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.pipelines.launching.kubernetes.fake_checks import causes, unknown_fields
from tests.pipelines.launching.kubernetes.fake_store import KINDS, Object, Store

_PATH = re.compile(
    r"^/(?:api/(?P<core>v1)|apis/(?P<group>[^/]+/[^/]+))"
    r"(?:/namespaces/(?P<namespace>[^/]+))?/(?P<resource>[^/]+)(?:/(?P<name>[^/]+))?$"
)
_WAIT_S = 0.05


class Failure(Exception):
    """An error answer with its Status object."""

    def __init__(self, code: int, reason: str, message: str, why: list[Any] | None = None) -> None:
        details = {"causes": [{"reason": r, "field": f, "message": m} for r, f, m in why or []]}
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }


class FakeApi:
    """The server; ``url`` is where it listens.

    Attributes:
        asked: how often each (verb, resource) was asked for.
        away: while True connections are closed without an answer.
        swallow: (verb, resource) whose next request is done and then not answered.
        lose: (verb, resource) whose next request never arrives.
        token: what callers have to show; None: nothing.
        rules: of a Role that callers have; None: they may do everything.
        on_deleted: called with (resource, object, propagation policy) after a deletion began.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.asked: Counter[tuple[str, str]] = Counter()
        self.away = False
        self.swallow: set[tuple[str, str]] = set()
        self.lose: set[tuple[str, str]] = set()
        self.token: str | None = None
        self.rules: list[Object] | None = None
        self.on_deleted: Callable[[str, Object, str], None] = lambda *_: None
        self._generation = 0  # of open streams: they end when it grows
        self._ended = False
        handler = type("Handler", (_Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._ended = True
        self.cut_streams()
        self._server.shutdown()
        self._server.server_close()

    def cut_streams(self) -> None:
        """End all watches in the middle."""
        self._generation += 1
        with self.store.changed:
            self.store.changed.notify_all()

    def write_kubeconfig(self, path: Path) -> Path:
        """A kubeconfig that leads here, with the present token."""
        user = {"token": self.token} if self.token else {}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": user}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me"}}],
        }
        path.write_text(json.dumps(config))
        return path

    def may(self, verb: str, resource: str, group: str) -> bool:
        if self.rules is None:
            return True
        return any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in self.rules
        )

    # -- verbs -------------------------------------------------------------------------------

    def create(self, resource: str, namespace: str, body: Object, query: dict[str, str]) -> Object:
        kind, version = KINDS[resource]
        if query.get("fieldValidation") == "Strict" and (unknown := unknown_fields(body)):
            message = f'{kind} in version "{version}" cannot be handled as a {kind}: {unknown}'
            raise Failure(400, "BadRequest", message)
        there = copy.deepcopy(body)
        there["metadata"] = {**there["metadata"]}
        if resource != "namespaces":
            if self.store.get("namespaces", "", namespace) is None:
                raise Failure(404, "NotFound", f'namespaces "{namespace}" not found')
            if there["metadata"].setdefault("namespace", namespace) != namespace:
                raise Failure(400, "BadRequest", "the namespace of the object is another")
        if why := causes(resource, there):
            name = there["metadata"]["name"]
            message = f'{kind} "{name}" is invalid: {"; ".join(f"{f}: {m}" for _, f, m in why)}'
            raise Failure(422, "Invalid", message, why)
        if resource == "jobs":
            _fill_in_job(there)
        if query.get("dryRun") == "All":
            if self.store.get(resource, namespace, there["metadata"]["name"]):
                raise _exists(resource, there)
            return there
        try:
            made = self.store.add(resource, there)
        except KeyError:
            raise _exists(resource, there) from None
        if resource == "namespaces":  # made by a controller
            own = {"name": "default", "namespace": there["metadata"]["name"]}
            self.store.add("serviceaccounts", {"metadata": own})
        return made

    def delete(
        self, resource: str, namespace: str, name: str, body: Object, query: dict[str, str]
    ) -> Object:
        there = self.store.get(resource, namespace, name)
        if there is None:
            raise _not_found(resource, name)
        uid = (body.get("preconditions") or {}).get("uid")
        if uid and uid != there["metadata"]["uid"]:
            raise Failure(409, "Conflict", f"the uid in the precondition ({uid}) is not its own")
        # batch/v1 leaves a Job's pods behind unless asked otherwise
        policy = body.get("propagationPolicy") or query.get("propagationPolicy") or "Orphan"
        if resource != "pods":  # the kubelet has to end those first
            self.store.remove(resource, namespace, name)
        self.on_deleted(resource, there, policy)
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}

    def select(self, resource: str, namespace: str, query: dict[str, str]) -> list[Object]:
        return [o for o in self.store.all(resource, namespace) if _matches(o, query)]

    def watch(
        self, resource: str, namespace: str, query: dict[str, str]
    ) -> Iterator[Object | None]:
        """Events as they happen; None now and then, when there is none."""
        after = int(query.get("resourceVersion") or self.store.version)
        end = time.monotonic() + float(query.get("timeoutSeconds", 1800))
        mine, known = (
            self._generation,
            {o["metadata"]["uid"] for o in self.select(resource, namespace, query)},
        )
        if query.get("resourceVersion") and after < self.store.compacted:
            message = f"too old resource version: {after} ({self.store.compacted})"
            yield {"type": "ERROR", "object": Failure(410, "Expired", message).status}
            return
        while time.monotonic() < end and mine == self._generation and not self._ended:
            for change in self.store.changes(resource, namespace, after):
                after = change.version
                if _matches(change.object, query):
                    yield {"type": change.type, "object": change.object}
                elif change.object["metadata"]["uid"] in known:  # it matches no longer
                    yield {"type": "DELETED", "object": change.object}
            yield None
            with self.store.changed:
                if self.store.version == after or not self.store.changes(
                    resource, namespace, after
                ):
                    self.store.changed.wait(_WAIT_S)


def _fill_in_job(job: Object) -> None:
    """What the server adds to a new Job."""
    metadata, template = job["metadata"], job["spec"]["template"]
    metadata["uid"] = str(uuid.uuid4())
    own = {
        "batch.kubernetes.io/controller-uid": metadata["uid"],
        "batch.kubernetes.io/job-name": metadata["name"],
        "controller-uid": metadata["uid"],
        "job-name": metadata["name"],
    }
    metadata["labels"] = {**(metadata.get("labels") or {}), **own}
    template["metadata"] = {**(template.get("metadata") or {})}
    template["metadata"]["labels"] = {**(template["metadata"].get("labels") or {}), **own}
    selector = {"matchLabels": {"batch.kubernetes.io/controller-uid": metadata["uid"]}}
    job["spec"] = {"suspend": False, "selector": selector, **job["spec"]}
    metadata["generation"], job["status"] = 1, {}


def _matches(there: Object, query: dict[str, str]) -> bool:
    labels = there["metadata"].get("labels") or {}
    for part in filter(None, query.get("labelSelector", "").split(",")):
        name, _, value = part.partition("=")
        if labels.get(name) != value.lstrip("="):
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        name, _, value = part.partition("=")
        found: Any = there
        for step in name.split("."):
            found = (found or {}).get(step)
        if str(found or "") != value.lstrip("="):
            return False
    return True


def _exists(resource: str, there: Object) -> Failure:
    name = there["metadata"]["name"]
    return Failure(409, "AlreadyExists", f'{resource} "{name}" already exists')


def _not_found(resource: str, name: str) -> Failure:
    return Failure(404, "NotFound", f'{resource} "{name}" not found')


class _Handler(BaseHTTPRequestHandler):
    """One HTTP request: authentication, the verb, and the answer."""

    api: FakeApi
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(self._get)

    def do_POST(self) -> None:
        self._serve(self._post)

    def do_DELETE(self) -> None:
        self._serve(self._delete)

    def _serve(self, act: Callable[[], None]) -> None:
        if self.api.away:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length) if length else b""
        self.body = json.loads(content) if content else {}
        try:
            self._authenticate()
            self._take_apart(parts.path)
            if self.asking in self.api.lose and self.query.get("dryRun") != "All":
                self.api.lose.discard(self.asking)
                self.close_connection = True
                return
            act()
        except Failure as no:
            self._json(no.status, no.code)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _authenticate(self) -> None:
        if self.api.token and self.headers.get("Authorization") != f"Bearer {self.api.token}":
            raise Failure(401, "Unauthorized", "Unauthorized")

    def _take_apart(self, path: str) -> None:
        found = _PATH.match(path)
        if found and found["resource"] == "namespaces" and found["name"]:
            found = None  # /api/v1/namespaces/NAME
        if found is None and (own := re.match(r"^/api/v1/namespaces(?:/([^/]+))?$", path)):
            self.resource, self.namespace, self.name = "namespaces", "", own[1]
            group = ""
        elif found is None or found["resource"] not in KINDS:
            raise Failure(404, "NotFound", "the server could not find the requested resource")
        else:
            self.resource, self.namespace = found["resource"], found["namespace"] or ""
            self.name = found["name"]
            group = (found["group"] or "").partition("/")[0]
        verb = {"POST": "create", "DELETE": "delete"}.get(self.command) or (
            "get" if self.name else "watch" if self.query.get("watch") == "true" else "list"
        )
        what = self.resource
        self.asking = (verb, what)
        self.api.asked[self.asking] += 1
        if not self.api.may(verb, what, group):
            where = f'in API group "{group}" in the namespace "{self.namespace}"'
            message = f'{what} is forbidden: User "me" cannot {verb} resource "{what}" {where}'
            raise Failure(403, "Forbidden", message)

    def _get(self) -> None:
        api = self.api
        if self.name:
            there = api.store.get(self.resource, self.namespace, self.name)
            if there is None:
                raise _not_found(self.resource, self.name)
            self._json(there)
        elif self.query.get("watch") == "true":
            events = api.watch(self.resource, self.namespace, self.query)
            lines = (json.dumps(event) + "\n" if event else None for event in events)
            self._stream(lines, "application/json")
        else:
            self._list()

    def _list(self) -> None:
        with self.api.store.changed:
            found = self.api.select(self.resource, self.namespace, self.query)
            version = str(self.api.store.version)
        start = int(self.query.get("continue") or 0)
        limit = int(self.query.get("limit") or len(found) or 1)
        metadata = {"resourceVersion": version}
        if start + limit < len(found):
            metadata["continue"] = str(start + limit)
        kind, group = KINDS[self.resource]
        items = found[start : start + limit]
        self._json(
            {"kind": f"{kind}List", "apiVersion": group, "metadata": metadata, "items": items}
        )

    def _post(self) -> None:
        made = self.api.create(self.resource, self.namespace, self.body, self.query)
        self._answer(made, 201)

    def _delete(self) -> None:
        if self.resource == "namespaces":
            for kind in KINDS:
                for there in self.api.store.all(kind, self.name):
                    name = there["metadata"]["name"]
                    with contextlib.suppress(Failure):
                        self.api.delete(
                            kind, self.name, name, {"propagationPolicy": "Background"}, {}
                        )
        self._answer(
            self.api.delete(self.resource, self.namespace, self.name, self.body, self.query), 200
        )

    def _answer(self, document: Object, code: int) -> None:
        dry = self.query.get("dryRun") == "All"
        if self.asking in self.api.swallow and not dry:
            self.api.swallow.discard(self.asking)
            self.close_connection = True
            return
        self._json(document, code)

    def _json(self, document: Object, code: int = 200) -> None:
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, parts: Iterator[str | None], kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        for part in parts:
            if part:
                content = part.encode()
                self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
                self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
