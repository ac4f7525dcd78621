"""Private parts of Dagster and Optuna without a public equivalent; tests in ``tests/pipelines/test_compat.py``."""

from __future__ import annotations

import functools
import subprocess
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

import dagster as dg
from dagster._serdes import serialize_value
from dagster._utils.error import SerializableErrorInfo

if TYPE_CHECKING:
    import optuna

__all__ = ["SerializableErrorInfo", "adopted_trial", "detach_log_watchers", "shared_instance"]

_lock = threading.Lock()
_open: dict[str, dg.DagsterInstance] = {}  # at most one: a code server has one instance


def shared_instance(
    context: dg.SensorEvaluationContext | dg.ScheduleEvaluationContext,
) -> dg.DagsterInstance:
    """The context's Dagster instance, opened once per process rather than once per tick."""
    if context._instance is None and (ref := context.instance_ref) is not None:
        key = serialize_value(ref)
        with _lock:
            if key not in _open:
                for other in _open.values():
                    other.dispose()
                _open.clear()
                _open[key] = dg.DagsterInstance.from_ref(ref)
            context._instance = _open[key]
    return context.instance


def detach_log_watchers() -> None:
    """Start the processes that copy the output of steps where Ctrl-C does not reach them.

    They would each print a traceback; Dagster ends them with the step.
    """
    from dagster._core.execution import compute_logs

    detached = functools.partial(subprocess.Popen, start_new_session=True)
    compute_logs.subprocess = SimpleNamespace(Popen=detached)  # type: ignore[assignment]


def adopted_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A running trial that another process asked for."""
    import optuna

    return optuna.Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)
