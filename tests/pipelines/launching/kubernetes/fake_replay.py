"""A Job controller that plays a recording: what a real cluster did, done to the Job at hand."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
import uuid
from typing import Any

from tests.pipelines.launching.kubernetes.fake_api import FakeApi
from tests.pipelines.launching.kubernetes.fake_store import Object
from tests.pipelines.launching.kubernetes.recordings import Line, recorded

_STEP_S = 0.02


class Replay:
    """Plays the scenarios, one for each Job that is created, a line every ``step_s``."""

    def __init__(self, api: FakeApi, *scenarios: str, step_s: float = _STEP_S) -> None:
        self.api, self.step_s = api, step_s
        self.scenarios = list(scenarios)
        self.over = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ended = True
        self._thread.join()

    def _run(self) -> None:
        seen: set[str] = set()
        while not self._ended:
            for job in self.api.store.all("jobs"):
                if job["metadata"]["uid"] not in seen and self.scenarios:
                    seen.add(job["metadata"]["uid"])
                    self._play(job, self.scenarios.pop(0))
                    self.over.set()
            time.sleep(self.step_s)

    def _play(self, job: Object, scenario: str) -> None:
        names = _Names(scenario, job)
        for line in recorded(scenario)[1:]:  # the first is the Job's creation
            if self._ended:
                return
            time.sleep(self.step_s)
            self._apply(line, names, job)

    def _apply(self, line: Line, names: _Names, job: Object) -> None:
        store, there = self.api.store, names.translated(line.object)
        namespace, name = there["metadata"]["namespace"], there["metadata"]["name"]
        if line.kind == "jobs":  # the spec stays what was asked for
            store.change("jobs", namespace, name, lambda o: o.update(status=there["status"]))
            return
        if line.kind == "pods":
            labels = job["spec"]["template"]["metadata"]["labels"]
            there["metadata"]["labels"] = {**there["metadata"]["labels"], **labels}
        if line.type == "ADDED":
            store.add(line.kind, there)
        elif line.type == "MODIFIED":
            store.change(line.kind, namespace, name, lambda o: (o.clear(), o.update(there)))
        else:
            store.remove(line.kind, namespace, name)


class _Names:
    """From the names and ids of a recording to those of the Job that it is played for."""

    def __init__(self, scenario: str, job: Object) -> None:
        self.job, self.scenario = job, scenario
        self.uids: dict[str, str] = {}
        self.pattern = re.compile(rf"(?<![\w/.-]){scenario}-(?=\d)")
        first = recorded(scenario)[0].object
        self.uids[first["metadata"]["uid"]] = job["metadata"]["uid"]

    def translated(self, there: Object) -> Object:
        there = copy.deepcopy(there)
        there["metadata"].pop("managedFields", None)
        uid = there["metadata"]["uid"]
        self.uids.setdefault(uid, str(uuid.uuid4()))
        translated: Object = json.loads(json.dumps(self._value(there)))
        return translated

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: self._value(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._value(v) for v in value]
        if not isinstance(value, str):
            return value
        metadata = self.job["metadata"]
        if value in self.uids:
            return self.uids[value]
        if value == self.scenario or value.startswith(f"{self.scenario}."):
            return metadata["name"] + value[len(self.scenario) :]
        value = value.replace(f"rec-{self.scenario}", metadata["namespace"])
        return self.pattern.sub(f"{metadata['name']}-", value)
