"""A lock per registered model, also between computers, so that one promotion runs at a time.

The embedded store has a file lock. A server is shared by computers that no file lock reaches, and
MLflow's only atomic operation is the creation of a registered model: of two processes that create
the same name, one fails. The lock is therefore an empty registered model ``NAME.lock``, which exists
while aliases of NAME are moved.

The holder writes a random token into it. A token that stays longer than a holder needs belongs to a
dead process; the lock is then broken by renaming it to a name made of that token. Of several
processes that try, one succeeds, and a lock that was newly acquired meanwhile is never renamed.
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

from roma_pipelines.registry.store import embedded_root, write_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCK_SUFFIX = ".lock"
_HOLDER_TAG = "roma.holder"
_DEAD_AFTER_S = 60.0
_POLL_INTERVAL_S = 0.1
_log = logging.getLogger(__name__)


class RegistryBusy(RuntimeError):
    """Another process holds the lock of this model for too long."""


@contextlib.contextmanager
def model_lock(
    client: MlflowClient,
    name: str,
    *,
    dead_after_s: float = _DEAD_AFTER_S,
    timeout_s: float = 2 * _DEAD_AFTER_S,
) -> Iterator[None]:
    """Hold the lock of a registered model.

    Args:
        dead_after_s: a holder that stays longer counts as dead.
        timeout_s: how long to wait for the lock.

    Raises:
        RegistryBusy: the lock was not free in time.
    """
    if embedded_root(client.tracking_uri) is not None:
        with write_lock(client):
            yield
        return
    lock, token = name + LOCK_SUFFIX, f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    broken = _acquire(client, lock, token, dead_after_s, timeout_s)
    try:
        yield
    finally:
        if _holder(client, lock) == token:
            client.delete_registered_model(lock)
        for broken_lock in broken:
            with contextlib.suppress(Exception):  # another process may have deleted it
                client.delete_registered_model(broken_lock)


def _acquire(
    client: MlflowClient, lock: str, token: str, dead_after_s: float, timeout_s: float
) -> list[str]:
    """Wait for the lock; return the new names of locks that were broken on the way."""
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
            _log.warning("breaking %s: its holder %s appears to be dead", lock, holder)
            with contextlib.suppress(MlflowException):  # another process was first
                client.rename_registered_model(lock, f"{lock}.of.{holder}")
                broken.append(f"{lock}.of.{holder}")
        if now - start > timeout_s:
            raise RegistryBusy(
                f"{lock} is held by {holder} for {now - since:.0f} s; if that process no longer "
                f"exists, delete the registered model {lock!r} and try again"
            )
        time.sleep(_POLL_INTERVAL_S)


def _holder(client: MlflowClient, lock: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(lock).tags.get(_HOLDER_TAG)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
