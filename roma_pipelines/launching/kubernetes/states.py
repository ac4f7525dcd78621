"""What a Job, its pods and their warnings mean: one table of words and one pure function.

Nothing is concluded from counts: they lag, dip, and count pods that were killed for another's
failure. The Job's conditions say that it is over, once all its pods are; the pods say why.
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
JOB_REASONS: dict[str, Phase] = {
    "DeadlineExceeded": Phase.INTERRUPTED,
    "PodFailurePolicy": Phase.ENDED_BAD, "BackoffLimitExceeded": Phase.ENDED_BAD,
    "FailedIndexes": Phase.ENDED_BAD, "MaxFailedIndexesExceeded": Phase.ENDED_BAD,
    "FailJobRequested": Phase.ENDED_BAD, "SuccessPolicy": Phase.ENDED_BAD,
}
"""Reasons of a Job's condition Failed; one that is not here is a failure whose pods are asked."""

POD_REASONS: dict[str, Phase] = {
    "Evicted": Phase.INTERRUPTED, "Preempting": Phase.INTERRUPTED, "NodeLost": Phase.INTERRUPTED,
    "NodeShutdown": Phase.INTERRUPTED, "Terminated": Phase.INTERRUPTED, "Shutdown": Phase.INTERRUPTED,
    "UnexpectedAdmissionError": Phase.INTERRUPTED, "OutOfcpu": Phase.INTERRUPTED,
    "OutOfmemory": Phase.INTERRUPTED, "OutOfpods": Phase.INTERRUPTED,
    "DeadlineExceeded": Phase.INTERRUPTED,
    "OOMKilled": Phase.OUT_OF_MEMORY,
}
"""Reasons of a failed pod or its container that say more than its exit code."""
# fmt: on

_DISRUPTED = "condition DisruptionTarget"  # in the message of a matched podFailurePolicy
_LOST_AFTER_S = 60.0  # a pod that is still ending so long after its grace period has lost its node
_MESSAGE = 2000


@dataclass(frozen=True)
class Snapshot:
    """An attempt as it was seen.

    Attributes:
        pods: those that exist and those that did, as last seen.
        departed: uids of the latter.
        warnings: events about the Job and its pods, the oldest first.
    """

    job: Object
    pods: Sequence[Object] = ()
    departed: frozenset[str] = frozenset()
    warnings: Sequence[Object] = ()


def state_of(seen: Snapshot, ending_s: float = 0.0) -> JobState:
    """How the attempt stands.

    Args:
        ending_s: how long ago it was first seen to be ending, by this computer's clock.
    """
    status, spec = seen.job.get("status") or {}, seen.job["spec"]
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    if "Complete" in conditions:
        return JobState(Phase.ENDED_OK, usage=_usage(seen, conditions["Complete"]))
    if failed := conditions.get("Failed"):
        return _failure(seen, failed)
    if target := conditions.get("FailureTarget"):
        if lost := _lost(seen, ending_s):
            reason = f"{_said(target)}; {lost}"
            return JobState(Phase.INTERRUPTED, reason, _usage(seen, target))
        return JobState(Phase.RUNNING, f"ending: {_said(target)}")
    if spec.get("suspend") or "Suspended" in conditions:
        return JobState(Phase.WAITING, "suspended: its queue has no room for it yet")
    return _progress(seen, int(spec.get("parallelism", 1)))


def _progress(seen: Snapshot, wanted: int) -> JobState:
    """Of a Job that is not over: it runs if all its pods have begun."""
    there = _present(seen)
    begun = [pod for pod in there if _begun(pod)]
    if len(begun) >= wanted:
        return JobState(Phase.RUNNING, f"{_count(len(begun))} on {', '.join(_nodes(begun))}")
    waiting = [why for pod in there if not _begun(pod) and (why := _waits_for(pod, seen.warnings))]
    if len(there) < wanted:
        job_uid = seen.job["metadata"]["uid"]
        about_job = [w for w in seen.warnings if w["involvedObject"].get("uid") == job_uid]
        said = (
            about_job[-1]["message"] if about_job else f"{len(there)} of {wanted} are made so far"
        )
        waiting.insert(0, f"no pod: {said}" if about_job else said)
    reason = "; ".join(dict.fromkeys(waiting))
    if begun:
        reason += f" (meanwhile {len(begun)} of {wanted} pods hold their nodes)"
    return JobState(Phase.WAITING, reason or "its pods are starting")


def holds_or_cannot_start(seen: Snapshot) -> bool:
    """Whether a waiting attempt should not wait long: it holds nodes, or will not begin by itself.

    Pods that all wait for a free node are in a queue, which may be long.
    """
    there = _present(seen)
    return not there or any(pod["spec"].get("nodeName") for pod in there)


def failed_first(seen: Snapshot) -> Object | None:
    """The pod whose failure failed the Job; those that were killed for it come after."""

    def order(pod: Object) -> tuple[bool, str]:
        end = _terminated(pod) or {}
        return "deletionTimestamp" in pod["metadata"], str(end.get("finishedAt", ""))

    failed = [pod for pod in seen.pods if (pod.get("status") or {}).get("phase") == "Failed"]
    return min(failed, key=order, default=None)


def index_of(pod: Object) -> int:
    """Its completion index, which is its node's rank."""
    return int((pod["metadata"].get("labels") or {}).get(INDEX_LABEL, 0))


def has_started(pod: Object) -> bool:
    """Whether its container runs or ran, so that it has a log."""
    state = _container(pod).get("state") or {}
    return "running" in state or ("terminated" in state and _seconds(_terminated(pod)) is not None)


def is_over(pod: Object) -> bool:
    """Whether its container will write no more."""
    return "terminated" in (_container(pod).get("state") or {})


# -- why it failed -------------------------------------------------------------------------------


def _failure(seen: Snapshot, failed: Object) -> JobState:
    phase = JOB_REASONS.get(failed.get("reason", ""), Phase.ENDED_BAD)
    said = [_said(failed)]
    if phase is not Phase.INTERRUPTED:
        disrupted = [c for pod in seen.pods if (c := _disruption(pod))]
        pod = failed_first(seen)
        if disrupted or _DISRUPTED in failed.get("message", ""):
            phase = Phase.INTERRUPTED
            said += [f"{c.get('reason', '')}: {c.get('message', '')}" for c in disrupted[:1]]
        elif pod is not None:
            phase, why = _pod_failure(pod)
            said.append(why)
    return JobState(phase, "; ".join(part for part in said if part), _usage(seen, failed))


def _pod_failure(pod: Object) -> tuple[Phase, str]:
    status = pod.get("status") or {}
    end = _terminated(pod) or {}
    name = pod["metadata"]["name"]
    where = f" on {pod['spec']['nodeName']}" if pod["spec"].get("nodeName") else ""
    words = [w for w in (status.get("reason"), end.get("reason")) if w]
    phase = next((POD_REASONS[w] for w in words if w in POD_REASONS), Phase.ENDED_BAD)
    why = f"pod {name}{where}: {', '.join(words) or 'failed'}"
    if "exitCode" in end:
        why += f", exit code {end['exitCode']}"
    if phase is Phase.OUT_OF_MEMORY:
        why += "; out of memory: ask for more memory_gb"
    message = (end.get("message") or status.get("message") or "").strip()
    return phase, f"{why}: {message[-_MESSAGE:]}" if message else why


def _disruption(pod: Object) -> Object | None:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return next(
        (c for c in conditions if c["type"] == "DisruptionTarget" and c["status"] == "True"), None
    )


def is_ending(job: Object) -> bool:
    """Whether a Job is to fail as soon as its last pod is over."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return {"FailureTarget"} == {
        c["type"] for c in conditions if c["type"] in ("FailureTarget", "Failed")
    }


def _lost(seen: Snapshot, ending_s: float) -> str:
    """What can never end: pods that were told to long ago, on nodes that do not answer."""
    left = [pod for pod in seen.pods if pod["metadata"]["uid"] not in seen.departed]
    left = [pod for pod in left if not is_over(pod)]
    told = [pod["metadata"].get("deletionGracePeriodSeconds") for pod in left]
    if not left or any(grace_s is None or ending_s < grace_s + _LOST_AFTER_S for grace_s in told):
        return ""
    return f"{', '.join(_nodes(left))} lost: {left[0]['metadata']['name']} does not end"


def _present(seen: Snapshot) -> list[Object]:
    """The pods there are, the newest of each index: one may have been replaced."""
    there = [pod for pod in seen.pods if pod["metadata"]["uid"] not in seen.departed]
    there.sort(key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))
    return list({index_of(pod): pod for pod in there}.values())


# -- why it waits --------------------------------------------------------------------------------


def _begun(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed") or has_started(pod)


def _waits_for(pod: Object, warnings: Sequence[Object]) -> str:
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    waiting = (_container(pod).get("state") or {}).get("waiting") or {}
    if (reason := waiting.get("reason")) and reason not in ("ContainerCreating", "PodInitializing"):
        return f"{name}: {reason}: {waiting.get('message', '')}".rstrip(": ")
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return f"{name}: {condition.get('reason')}: {condition.get('message', '')}".rstrip(": ")
    about = [w for w in warnings if w["involvedObject"].get("uid") == pod["metadata"]["uid"]]
    if about:
        return f"{name}: {about[-1]['reason']}: {about[-1]['message']}"
    return ""


# -- the parts of objects ------------------------------------------------------------------------


def _container(pod: Object) -> Object:
    statuses = (pod.get("status") or {}).get("containerStatuses") or []
    return next((s for s in statuses if s["name"] == CONTAINER), {})


def _terminated(pod: Object) -> Object | None:
    return (_container(pod).get("state") or {}).get("terminated")


def _said(condition: Object) -> str:
    reason, message = condition.get("reason", ""), condition.get("message", "")
    return f"Kubernetes says {reason}: {message}" if message else f"Kubernetes says {reason}"


def _count(pods: int) -> str:
    return f"{pods} pod" if pods == 1 else f"{pods} pods"


def _nodes(pods: Sequence[Object]) -> list[str]:
    return sorted({pod["spec"].get("nodeName", "no node") for pod in pods})


def _usage(seen: Snapshot, ended: Object) -> dict[str, Any]:
    """Seconds from the first container's start to the end, and the nodes' names."""
    starts = [s for pod in seen.pods if (s := _seconds(_started(pod))) is not None]
    start = min(starts, default=None)
    end = _epoch(ended.get("lastTransitionTime"))
    if start is None or end is None:
        return {}
    nodes = sorted({pod["spec"]["nodeName"] for pod in seen.pods if pod["spec"].get("nodeName")})
    return {"ran_s": max(0.0, end - start), "nodes": ", ".join(nodes)}


def _started(pod: Object) -> Object | None:
    return (_container(pod).get("state") or {}).get("running") or _terminated(pod)


def _seconds(state: Object | None) -> float | None:
    """When a container started; None if it never did (then the time is 1970)."""
    start = _epoch((state or {}).get("startedAt"))
    return start if start else None


def _epoch(text: str | None) -> float | None:
    if not text:
        return None
    whole = re.sub(r"\.\d+", "", text).replace("Z", "+00:00")
    return datetime.datetime.fromisoformat(whole).timestamp()
