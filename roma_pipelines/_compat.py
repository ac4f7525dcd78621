"""Private parts of Dagster that have no public equivalent; ``tests/pipelines/test_compat.py`` holds
each of them to the installed version.
"""

from __future__ import annotations

import threading

import dagster as dg
from dagster._core.instance.ref import InstanceRef
from dagster._serdes import serialize_value
from dagster._utils.error import SerializableErrorInfo

__all__ = ["SerializableErrorInfo", "shared_instance"]

_lock = threading.Lock()
_open: dict[str, dg.DagsterInstance] = {}  # at most one: a code server has one instance


def shared_instance(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext,
) -> dg.DagsterInstance:
    """The context's Dagster instance, opened once per process rather than once per tick.

    ``context.instance`` alone would open a new one in every tick, with its database connections.
    """
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
