"""The objects of the fake cluster, and everything that ever happened to them.

Every change gets the next resourceVersion. A watch asks for the changes after a version; those
before ``compacted`` are forgotten, as they are by a real server after some minutes.
"""

from __future__ import annotations

import copy
import datetime
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
KINDS = {
    "jobs": ("Job", "batch/v1"),
    "pods": ("Pod", "v1"),
    "services": ("Service", "v1"),
    "events": ("Event", "v1"),
    "serviceaccounts": ("ServiceAccount", "v1"),
    "secrets": ("Secret", "v1"),
    "namespaces": ("Namespace", "v1"),
}


@dataclass(frozen=True)
class Change:
    version: int
    resource: str
    type: str  # ADDED, MODIFIED or DELETED
    object: Object


def now(seconds_later: float = 0.0) -> str:
    """The time as Kubernetes writes it: whole seconds, UTC."""
    later = datetime.timedelta(seconds=seconds_later)
    return (datetime.datetime.now(datetime.UTC) + later).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """All objects by resource, namespace and name.

    Attributes:
        changed: notified at every change, and to be held while looking at several objects.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.version = 1000
        self.compacted = 0
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._history: list[Change] = []

    def get(self, resource: str, namespace: str, name: str) -> Object | None:
        with self.changed:
            return copy.deepcopy(self._objects.get((resource, namespace, name)))

    def all(self, resource: str, namespace: str | None = None) -> list[Object]:
        with self.changed:
            found = [
                o
                for (r, n, _), o in self._objects.items()
                if r == resource and namespace in (None, n)
            ]
            return copy.deepcopy(found)

    def add(self, resource: str, there: Object) -> Object:
        """Create an object; the server's own metadata are filled in.

        Raises:
            KeyError: there is one by that name.
        """
        metadata = there["metadata"]
        place = (resource, metadata.get("namespace", ""), metadata["name"])
        with self.changed:
            if place in self._objects:
                raise KeyError(metadata["name"])
            kind, version = KINDS[resource]
            metadata.setdefault("uid", str(uuid.uuid4()))
            metadata.setdefault("creationTimestamp", now())
            there = {"kind": kind, "apiVersion": version, **there}
            return self._record("ADDED", resource, place, there)

    def change(
        self, resource: str, namespace: str, name: str, edit: Callable[[Object], object]
    ) -> Object | None:
        """Apply ``edit`` to a copy and store it; None if the object is gone."""
        with self.changed:
            place = (resource, namespace, name)
            if place not in self._objects:
                return None
            there = copy.deepcopy(self._objects[place])
            edit(there)
            return self._record("MODIFIED", resource, place, there)

    def remove(self, resource: str, namespace: str, name: str) -> Object | None:
        with self.changed:
            place = (resource, namespace, name)
            there = self._objects.get(place)
            return None if there is None else self._record("DELETED", resource, place, there)

    def changes(self, resource: str, namespace: str, after: int) -> list[Change]:
        with self.changed:
            return [
                change
                for change in self._history
                if change.version > after
                and change.resource == resource
                and change.object["metadata"].get("namespace", "") == namespace
            ]

    def compact(self) -> None:
        """Forget what happened so far."""
        with self.changed:
            self.compacted = self.version
            self._history.clear()

    def _record(self, kind: str, resource: str, place: Any, there: Object) -> Object:
        self.version += 1
        there = copy.deepcopy(there)
        there["metadata"]["resourceVersion"] = str(self.version)
        if kind == "DELETED":
            del self._objects[place]
        else:
            self._objects[place] = there
        self._history.append(Change(self.version, resource, kind, there))
        self.changed.notify_all()
        return copy.deepcopy(there)
