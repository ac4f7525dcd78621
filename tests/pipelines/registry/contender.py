"""Processes that want the lock of the model ``rivals``: URI LEASE_S CALL_S TASK:VERSION."""

import contextlib
import json
import subprocess
import sys
import time

from roma_core.serving.registry_client import connect
from roma_pipelines.registry import store
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.promotion import PromotionRefused, promote
from roma_pipelines.registry.versions import COMPARED_TAG
from roma_pipelines.storage import StorageError
from tests.time_limits import within


def add_rivals(client):
    """Three versions of a model, each compared with no champion."""
    client.create_registered_model("rivals")
    for _ in range(3):
        tags = {GATE_TAG: "passed", COMPARED_TAG: "none"}
        client.create_model_version("rivals", "s3://nowhere/model", None, tags)


def locks(client):
    return [m.name for m in client.search_registered_models() if ".lock" in m.name]


@contextlib.contextmanager
def contender(uri, task, lease_s=60.0, call_s=10.0):
    """A process with a task; yields it, and kills it at the end."""
    command = [sys.executable, "-m", "tests.pipelines.registry.contender"]
    process = subprocess.Popen(
        [*command, uri, str(lease_s), str(call_s), task],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def held(process):
    assert process.stdout.readline() == "held\n"


def said(process):
    return json.loads(process.communicate(timeout=within(60))[0].splitlines()[-1])


def main(uri, lease_s, call_s, task):
    """``promote`` a version; ``enter`` the lock and leave it; or move an alias after a line of input."""
    store._LEASE_S, store._CALL_S = float(lease_s), float(call_s)
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
                print("held", flush=True)
                if task == "wait":
                    sys.stdin.readline()
                    lock.set_alias("rivals", "champion", version)
                else:
                    time.sleep(0.3)
                result["held"] = [entered, time.monotonic()]
    except (PromotionRefused, store.RegistryBusy, StorageError) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
