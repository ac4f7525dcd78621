"""Processes that want the lock of the model ``rivals``, each with a task: ``TASK:VERSION``."""

import contextlib
import time

from roma_core.serving.registry_client import connect
from roma_pipelines.registry import store
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.promotion import PromotionRefused, promote
from roma_pipelines.registry.versions import COMPARED_TAG
from roma_pipelines.storage import StorageError
from tests import forked
from tests.time_limits import within


def add_rivals(client):
    """Three versions of a model, each compared with no champion."""
    client.create_registered_model("rivals")
    for _ in range(3):
        tags = {GATE_TAG: "passed", COMPARED_TAG: "none"}
        client.create_model_version("rivals", "s3://nowhere/model", None, tags)


def locks(client):
    return [m.name for m in client.search_registered_models() if ".lock" in m.name]


class Contender:
    """A process with a task."""

    def __init__(self, uri, task, lease_s, call_s):
        self.connection, theirs = forked.Pipe()
        self.process = forked.start(_contend, theirs, uri, task, lease_s, call_s)
        theirs.close()

    def _receive(self):
        assert self.connection.poll(within(60)), "it says nothing"
        return self.connection.recv()

    def holds(self):
        """Wait until it has the lock."""
        assert self._receive() == "held"

    def go_on(self):
        self.connection.send("go on")

    def result(self):
        """What it did; the task is over."""
        while not isinstance(said := self._receive(), dict):
            pass
        return said

    def wait(self):
        """The exit code."""
        self.process.join(within(60))
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill(self):
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def contender(uri, task, lease_s=60.0, call_s=10.0):
    """A process with a task; yields it, and kills it at the end."""
    contender = Contender(uri, task, lease_s, call_s)
    try:
        yield contender
    finally:
        contender.kill()


def _contend(connection, uri, task, lease_s, call_s):
    """``promote`` a version; ``enter`` the lock and leave it; or ``wait`` in it, then move an alias."""
    store._LEASE_S, store._CALL_S = lease_s, call_s
    store._WAIT_S = 20 * store._LEASE_S
    task, version = task.split(":")
    client = connect(uri)
    result = {"task": task, "version": version}
    try:
        if task == "promote":
            actor = f"tester {version}"
            promote(client, "rivals", version, reason="better", actor=actor, evidence={})
        else:
            with store.model_lock(client, "rivals") as lock:
                entered = time.monotonic()  # of the computer, so equal in all processes
                connection.send("held")
                if task == "wait":
                    connection.recv()
                    lock.set_alias("rivals", "champion", version)
                else:
                    time.sleep(0.3)
                result["held"] = [entered, time.monotonic()]
    except (PromotionRefused, store.RegistryBusy, StorageError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    connection.send(result)
