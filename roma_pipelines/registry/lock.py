"""One promotion at a time: a lock per registered model, also between computers.

The embedded store has a file lock. A server is shared by computers that no file lock reaches, and
MLflow offers no compare-and-set but one: of two processes that create a registered model of the same
name, one is refused. The lock therefore is an empty registered model ``NAME.lock``, there while
somebody moves aliases of NAME, which takes a second.

A holder that died is recognised by its token, which stays the same for longer than anybody holds
the lock. It is broken by a rename to a name made of that token: of those who try, one succeeds, and
a lock that was taken in the meantime is never renamed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from roma_pipelines.registry.store import embedded_root, one_at_a_time

if TYPE_CHECKING:
    from mlflow import MlflowClient

_HOLDER_TAG = "roma.holder"
LOCK_SUFFIX = ".lock"
_DEAD_AFTER_S = 60.0
_PAUSE_S = 0.1
_log = logging.getLogger(__name__)


class RegistryBusy(RuntimeError):
    """Somebody else moves aliases of this model, and does not come to an end."""


@contextlib.contextmanager
def model_lock(
    client: MlflowClient,
    name: str,
    *,
    dead_after_s: float = _DEAD_AFTER_S,
    patience_s: float = 2 * _DEAD_AFTER_S,
) -> Iterator[None]:
    """Hold the lock of a registered model.

    Args:
        dead_after_s: a holder seen for longer than this is taken for dead.
        patience_s: how long to wait for the lock.

    Raises:
        RegistryBusy: the lock was not free in time.
    """
    if embedded_root(client.tracking_uri) is not None:
        with one_at_a_time(client):
            yield
        return
    lock, token = name + LOCK_SUFFIX, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    broken = _acquire(client, lock, token, dead_after_s, patience_s)
    try:
        yield
    finally:
        if _holder(client, lock) == token:
            client.delete_registered_model(lock)
        for name_of_dead in broken:
            with contextlib.suppress(Exception):  # it is rubbish; another run may have removed it
                client.delete_registered_model(name_of_dead)


def _acquire(
    client: MlflowClient, lock: str, token: str, dead_after_s: float, patience_s: float
) -> list[str]:
    """Wait for the lock; the names of locks that were broken on the way."""
    from mlflow.exceptions import MlflowException

    broken: list[str] = []
    seen, since, start = None, time.monotonic(), time.monotonic()
    while True:
        try:
            client.create_registered_model(
                lock, tags={_HOLDER_TAG: token}, description="Held while aliases are moved."
            )
            return broken
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        holder, now = _holder(client, lock), time.monotonic()
        if holder != seen:
            seen, since = holder, now
        elif holder is not None and now - since > dead_after_s:
            _log.warning("%s was left by %s, which is taken for dead", lock, holder)
            with contextlib.suppress(MlflowException):  # another one was quicker
                client.rename_registered_model(lock, f"{lock}.of.{holder}")
                broken.append(f"{lock}.of.{holder}")
        if now - start > patience_s:
            raise RegistryBusy(
                f"{lock} is held by {holder} for {now - since:.0f} s; if that process is no more, "
                f"delete the registered model {lock!r} and try again"
            )
        time.sleep(_PAUSE_S)


def _holder(client: MlflowClient, lock: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(lock).tags.get(_HOLDER_TAG)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
