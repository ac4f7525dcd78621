"""The state of an attempt from its Job, pods and warning events: a table and pure functions.

Nothing is concluded from the Job's counters: they lag, dip, and count pods that were killed because
another one failed. The Job's conditions show that it ended, once all its pods did; the pods show why.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from roma_pipelines.launching.kubernetes.manifests import CONTAINER, INDEX_LABEL
from roma_pipelines.launching.spec import JobState, Phase

Object = dict[str, Any]

# fmt: off
POD_REASONS: dict[str, Phase] = {
    "Evicted": Phase.INTERRUPTED, "Preempting": Phase.INTERRUPTED, "NodeLost": Phase.INTERRUPTED,
    "NodeShutdown": Phase.INTERRUPTED, "Terminated": Phase.INTERRUPTED, "Shutdown": Phase.INTERRUPTED,
    "UnexpectedAdmissionError": Phase.INTERRUPTED, "OutOfcpu": Phase.INTERRUPTED,
    "OutOfmemory": Phase.INTERRUPTED, "OutOfpods": Phase.INTERRUPTED,
    "DeadlineExceeded": Phase.INTERRUPTED,
    "ContainerStatusUnknown": Phase.INTERRUPTED,  # its node was away, and came back
    "OOMKilled": Phase.OUT_OF_MEMORY,
}
"""Reasons of a failed pod, or of its container, that are more specific than its exit code."""
# fmt: on

_DISRUPTED = "condition DisruptionTarget"  # in the message of a matched podFailurePolicy
_LOST_AFTER_S = 60.0  # a pod still terminating so long after its grace period has lost its node
_MESSAGE_LENGTH = 500


@dataclass(frozen=True)
class Snapshot:
    """What is known of an attempt at one moment."""

    job: Object
    pods: Sequence[Object] = ()
    deleted: Sequence[Object] = ()  # pods as they were last reported
    warnings: Sequence[Object] = ()  # about the Job and its pods, the oldest first


def state_of(snapshot: Snapshot, ending_s: float = 0.0) -> JobState:
    """The attempt's state, ``ending_s`` seconds after ``is_ending`` was first true of its Job."""
    spec, conditions = snapshot.job["spec"], _conditions(snapshot.job)
    if "Complete" in conditions:
        return JobState(Phase.ENDED_OK, usage=_usage(snapshot, conditions["Complete"]))
    if failed := conditions.get("Failed"):
        first = conditions.get("FailureTarget", failed)
        return _failure(snapshot, failed, _epoch(first.get("lastTransitionTime")) or 0.0)
    if target := conditions.get("FailureTarget"):
        left = [pod for pod in snapshot.pods if _terminated(pod) is None]
        graces = [pod["metadata"].get("deletionGracePeriodSeconds") for pod in left]
        if left and all(g is not None and ending_s >= g + _LOST_AFTER_S for g in graces):
            lost = f"{', '.join(_nodes(left))} lost: {left[0]['metadata']['name']} does not end"
            reason = f"{_report(target)}; {lost}"
            return JobState(Phase.INTERRUPTED, reason, _usage(snapshot, target))
        return JobState(Phase.RUNNING, f"ending: {_report(target)}")
    if spec.get("suspend") or "Suspended" in conditions:
        return JobState(Phase.WAITING, "suspended: its queue has no room for it yet")
    return _progress(snapshot, int(spec.get("parallelism", 1)))


def is_ending(job: Object) -> bool:
    """Whether a Job will fail as soon as its last pod has ended."""
    conditions = _conditions(job)
    return "FailureTarget" in conditions and "Failed" not in conditions


def failed_first(snapshot: Snapshot) -> Object | None:
    """The pod whose failure failed the Job; pods that were killed for it come after.

    A pod that its node lost or evicted comes before those that failed: they may have failed for it.
    """

    def order(pod: Object) -> tuple[bool, bool, str]:
        interrupted = _pod_failure(pod)[0] is Phase.INTERRUPTED
        end = _terminated(pod) or {}
        return _is_deleted(pod), not interrupted, str(end.get("finishedAt", ""))

    pods = [*snapshot.pods, *snapshot.deleted]
    failed = [pod for pod in pods if (pod.get("status") or {}).get("phase") == "Failed"]
    return min(failed, key=order, default=None)


def index_of(pod: Object) -> int:
    """The pod's completion index, which is its node rank."""
    return int((pod["metadata"].get("labels") or {}).get(INDEX_LABEL, 0))


def is_finished(pod: Object) -> bool:
    """Whether the pod's phase is final; its container may have terminated a second before."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


# -- before the end ------------------------------------------------------------------------------


def _progress(snapshot: Snapshot, wanted: int) -> JobState:
    """State of a Job that has not ended: it runs once all its pods have started."""

    def has_started(pod: Object) -> bool:
        state = _container(pod).get("state") or {}
        return is_finished(pod) or "running" in state or _seconds(_terminated(pod)) is not None

    there = newest(snapshot.pods)
    begun = list(filter(has_started, there))
    if len(begun) >= wanted:
        plural = "" if len(begun) == 1 else "s"
        return JobState(Phase.RUNNING, f"{len(begun)} pod{plural} on {', '.join(_nodes(begun))}")
    waiting = [_waits_for(pod, snapshot.warnings) for pod in there if pod not in begun]
    if len(there) < wanted:
        about_job = _about(snapshot.job, snapshot.warnings)
        why = f"{len(there)} of {wanted} pods are created so far"
        if about_job:  # every try names another pod, which never was
            why = "no pod: " + re.sub(r'(pods? "[^"]+)-\w{5}"', r'\1"', about_job[-1]["message"])
        waiting.insert(0, why)
    reason = "; ".join(dict.fromkeys(why for why in waiting if why))
    if begun:
        reason += f" (meanwhile {len(begun)} of {wanted} pods hold their nodes)"
    return JobState(Phase.WAITING, reason or "its pods are starting")


def _waits_for(pod: Object, warnings: Sequence[Object]) -> str:
    name = pod["metadata"]["name"]
    waiting = (_container(pod).get("state") or {}).get("waiting") or {}
    if (reason := waiting.get("reason")) and reason not in ("ContainerCreating", "PodInitializing"):
        return f"{name}: {reason}: {waiting.get('message', '')}".rstrip(": ")
    if condition := _conditions(pod, "False").get("PodScheduled"):
        return f"{name}: {condition.get('reason')}: {condition.get('message', '')}".rstrip(": ")
    about = _about(pod, warnings)
    return f"{name}: {about[-1]['reason']}: {about[-1]['message']}" if about else ""


def _about(subject: Object, warnings: Sequence[Object]) -> list[Object]:
    uid = subject["metadata"]["uid"]
    return [warning for warning in warnings if warning["involvedObject"].get("uid") == uid]


# -- why it failed -------------------------------------------------------------------------------


def _failure(snapshot: Snapshot, failed: Object, began: float) -> JobState:
    """State of a failed Job, whose failure ``began`` at that time of the cluster."""
    phase, reasons = Phase.INTERRUPTED, [_report(failed)]
    if failed.get("reason") != "DeadlineExceeded":  # for any other one the pods show the cause
        phase = Phase.ENDED_BAD
        pods = newest([*snapshot.pods, *snapshot.deleted])
        disrupted = [c for pod in pods if (c := _conditions(pod).get("DisruptionTarget"))]
        pod = failed_first(snapshot)
        if disrupted or _DISRUPTED in failed.get("message", ""):
            phase = Phase.INTERRUPTED
            reasons += [f"{c.get('reason', '')}: {c.get('message', '')}" for c in disrupted[:1]]
        elif (taken := _taken_away(pods, began)) is not None:
            phase = Phase.INTERRUPTED
            reasons.append(f"pod {taken['metadata']['name']} was deleted")
        elif pod is not None:
            phase, why = _pod_failure(pod)
            reasons.append(why)
    return JobState(phase, "; ".join(reasons), _usage(snapshot, failed))


def _taken_away(pods: Sequence[Object], began: float) -> Object | None:
    """A pod that was deleted while it ran, and not by the Job's controller for another's failure."""
    alone = any(is_finished(pod) and not _is_deleted(pod) for pod in pods)
    for pod in filter(_is_deleted, pods):
        grace_s = pod["metadata"].get("deletionGracePeriodSeconds") or 0
        deleted = (_epoch(pod["metadata"]["deletionTimestamp"]) or 0.0) - grace_s
        end = _epoch((_terminated(pod) or {}).get("finishedAt"))
        if (deleted < began or not alone) and (end is None or deleted <= end):
            return pod
    return None


def _pod_failure(pod: Object) -> tuple[Phase, str]:
    status, end = pod.get("status") or {}, _terminated(pod) or {}
    where = f" on {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else ""
    words = [w for w in (status.get("reason"), end.get("reason")) if w]
    phase = next((POD_REASONS[w] for w in words if w in POD_REASONS), Phase.ENDED_BAD)
    why = f"pod {pod['metadata']['name']}{where}: {', '.join(words) or 'failed'}"
    if "exitCode" in end:
        why += f", exit code {end['exitCode']}"
    if phase is Phase.OUT_OF_MEMORY:
        why += "; out of memory: ask for more memory_gb"
    message = _last_words(end.get("message") or status.get("message") or "")
    return phase, f"{why}: {message}" if message else why


def _last_words(message: str) -> str:
    """The last line of a traceback, or of another text; the whole is in the attempt's log."""
    raised = re.findall(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*", message, re.MULTILINE)
    own = [line for line in raised if "ChildFailedError" not in line]  # torchrun reports after it
    words = own or [line for line in message.splitlines() if re.search(r"\w", line)]
    return words[-1].strip()[:_MESSAGE_LENGTH] if words else ""


def _report(condition: Object) -> str:
    message = condition.get("message", "")
    return f"Kubernetes reports {condition.get('reason', '')}" + (f": {message}" if message else "")


def _usage(snapshot: Snapshot, ended: Object) -> dict[str, Any]:
    """Seconds from the first container's start to the end, and the nodes' names."""
    pods = [*snapshot.pods, *snapshot.deleted]
    states = [_container(pod).get("state") or {} for pod in pods]
    starts = [_seconds(state.get("running") or state.get("terminated")) for state in states]
    start = min((s for s in starts if s is not None), default=None)
    end = _epoch(ended.get("lastTransitionTime"))
    if start is None or end is None:
        return {}
    nodes = _nodes([pod for pod in pods if pod["spec"].get("nodeName")])
    return {"ran_s": max(0.0, end - start), "nodes": ", ".join(nodes)}


# -- parts of objects ----------------------------------------------------------------------------


def newest(pods: Sequence[Object]) -> list[Object]:
    """Of every index the pod that was made last; earlier ones were replaced."""
    made = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    return list({index_of(pod): pod for pod in made}.values())


def _is_deleted(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _container(pod: Object) -> Object:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return next((s for s in statuses if s["name"] == CONTAINER), {})


def _terminated(pod: Object) -> Object | None:
    return (_container(pod).get("state") or {}).get("terminated")


def _conditions(there: Object, status: str = "True") -> dict[str, Object]:
    found = (there.get("status") or {}).get("conditions") or []
    return {c["type"]: c for c in found if c["status"] == status}


def _nodes(pods: Sequence[Object]) -> list[str]:
    return sorted({pod["spec"].get("nodeName", "no node") for pod in pods})


def _seconds(state: Object | None) -> float | None:
    """When a container started; None if it never did (its time is then 1970)."""
    return _epoch((state or {}).get("startedAt")) or None


def _epoch(text: str | None) -> float | None:
    return datetime.datetime.fromisoformat(text).timestamp() if text else None
