"""The Dagster instance of a tick, opened once in a process.

Dagster opens another one for every tick, and with it three stores that each read all their
migrations: that takes longer than everything a tick of ours does.
"""

from __future__ import annotations

import threading

import dagster as dg
from dagster._core.instance.ref import InstanceRef
from dagster._serdes import serialize_value

_lock = threading.Lock()
_open: dict[str, dg.DagsterInstance] = {}  # at most one: a code server has one instance


def instance_of(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext,
) -> dg.DagsterInstance:
    """The instance that the context names; the context has it, too, from now on."""
    if context._instance is None and context.instance_ref is not None:
        context._instance = _opened(context.instance_ref)
    return context.instance


def _opened(ref: InstanceRef) -> dg.DagsterInstance:
    key = serialize_value(ref)
    with _lock:
        if key not in _open:
            for other in _open.values():
                other.dispose()
            _open.clear()
            _open[key] = dg.DagsterInstance.from_ref(ref)
        return _open[key]
