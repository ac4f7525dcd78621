"""Requests to one Kubernetes API server, through the official client.

Answers stay the JSON they are. There are two ways to fail: nobody can say (``NoAnswer``: network,
server trouble, credentials that are being rotated), and the server said no (``Denied``). The client
is made anew from its configuration every so often, and when a certificate or token is refused: it
reads those once, and clusters rotate them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from roma_pipelines.launching.launcher import NoAnswer, Refused

_RENEW_S = 25 * 60.0
_CONNECT_S, _READ_S = 5.0, 30.0
_BUSY = frozenset({408, 429, 500, 502, 503, 504})


class Denied(RuntimeError):
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
                raise NoAnswer(f"{path}: {error}") from error
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
                raise NoAnswer(f"the Kubernetes API server does not answer: {error}") from error
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
            raise Refused(
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
        raise NoAnswer(f"the Kubernetes API server: {'; '.join(reasons)}") from error
    raise Denied(error.status, reasons) from error
