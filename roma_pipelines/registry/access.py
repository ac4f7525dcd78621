"""An MLflow server that asks who one is: name and password on their way to it, and a look beforehand.

MLflow's own clients read ``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` (or
``MLFLOW_TRACKING_TOKEN``) of their process, and so do the jobs, which are handed these variables:
nothing of it stands in a specification, a script, an argument or a log. Imports no MLflow.
"""

from __future__ import annotations

import base64
import http.client
import os
import urllib.error
import urllib.request

from roma_core.credentials import without_credentials
from roma_pipelines.registry.store import MlflowSettings, StoreError, is_server

USERNAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
TOKEN = "MLFLOW_TRACKING_TOKEN"
_QUESTION = "/api/2.0/mlflow/experiments/search?max_results=1"
_TIMEOUT_S = 10.0


def take_credentials(settings: MlflowSettings) -> None:
    """Put a configured name and password where MLflow looks for them.

    Raises:
        StoreError: a server is configured, and there is one without the other.
    """
    if settings.username is not None:
        os.environ[USERNAME] = settings.username
    if settings.password is not None:
        os.environ[PASSWORD] = settings.password.get_secret_value()
    has = [name for name in (USERNAME, PASSWORD) if os.environ.get(name)]
    if len(has) == 1 and _servers(settings) and not os.environ.get(TOKEN):
        (missing,) = {USERNAME, PASSWORD} - set(has)
        raise StoreError(
            f"MLflow needs a name and a password: {has[0]} is set, {missing} is not; "
            f"ROMA_MLFLOW_USERNAME and ROMA_MLFLOW_PASSWORD set both"
        )


def _servers(settings: MlflowSettings) -> list[str]:
    uris = (settings.tracking_uri, settings.registry_uri)
    return [uri.rstrip("/") for uri in uris if uri is not None and is_server(uri)]


_welcome: set[tuple[str, str]] = set()  # (server, header) that were asked and let us in


def check_access(settings: MlflowSettings) -> None:
    """Ask the configured servers whether they take us, until one has; nothing else is asked.

    A server that is away is no error here: jobs go on without it and tell it later.

    Raises:
        StoreError: one refuses; the text says as whom we came, and never with which password.
    """
    take_credentials(settings)
    for uri in _servers(settings):
        if (uri, _header()) not in _welcome and _takes_us(uri, os.environ.get(USERNAME, "")):
            _welcome.add((uri, _header()))


def _takes_us(uri: str, who: str) -> bool:
    """False if the server did not answer."""
    shown, header = without_credentials(uri), _header()
    if shown != uri:  # the address has them; MLflow takes them from there
        return True
    try:
        request = urllib.request.Request(
            uri + _QUESTION, headers={"Authorization": header} if header else {}
        )
        urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return False
        as_whom = f"the user {who!r}" if who else "a token" if header else "somebody without a name"
        said = " ".join(error.read(300).decode(errors="replace").split())
        raise StoreError(
            f"the MLflow server {shown} refuses {as_whom} ({error.code}: {said}); set "
            f"ROMA_MLFLOW_USERNAME and ROMA_MLFLOW_PASSWORD, or {USERNAME} and {PASSWORD}"
        ) from None
    except (http.client.InvalidURL, ValueError):  # the text of either may hold what it is about
        raise StoreError(
            f"the MLflow server {shown} cannot be asked: expected http(s)://host:port, and a name, "
            f"password and token of one line each without a line break"
        ) from None
    except (OSError, http.client.HTTPException):
        return False
    return True


def _header() -> str:
    """What MLflow's clients would send."""
    if os.environ.get(USERNAME) and os.environ.get(PASSWORD):
        pair = f"{os.environ[USERNAME]}:{os.environ[PASSWORD]}"
        return "Basic " + base64.standard_b64encode(pair.encode()).decode()
    token = os.environ.get(TOKEN)
    return f"Bearer {token}" if token else ""
