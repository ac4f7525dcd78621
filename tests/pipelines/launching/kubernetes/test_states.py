"""The launcher's state after every line that a real API server sent."""

import copy
import itertools

import pytest

from roma_pipelines.launching.kubernetes.states import Snapshot, state_of
from roma_pipelines.launching.spec import Phase
from tests.pipelines.launching.kubernetes.recordings import recorded


def snapshots(scenario):
    """A snapshot of the Job after each line of the recording."""
    job, pods, deleted, warnings = None, {}, set(), {}
    for line in recorded(scenario):
        uid = line.object["metadata"]["uid"]
        if line.kind == "jobs":
            job = line.object
        elif line.kind == "pods":
            pods[uid] = line.object
            deleted |= {uid} if line.type == "DELETED" else set()
        elif line.object["type"] == "Warning":
            warnings[uid] = line.object
        if job is not None:
            yield Snapshot(job, list(pods.values()), frozenset(deleted), list(warnings.values()))


def states(scenario):
    return [state_of(seen) for seen in snapshots(scenario)]


W, R = Phase.WAITING, Phase.RUNNING


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("ok", [W, R, Phase.ENDED_OK]),
        ("fail", [W, R, Phase.ENDED_BAD]),
        ("retry", [W, R, W, R, Phase.ENDED_BAD]),
        ("dl", [W, R, Phase.INTERRUPTED]),
        ("oom", [W, R, Phase.OUT_OF_MEMORY]),
        ("badcmd", [W, R, Phase.ENDED_BAD]),
        ("img", [W]),
        ("gpu", [W]),
        ("nosa", [W]),
    ],
)
def test_the_phases_of_a_recording(scenario, expected):
    seen = [phase for phase, _ in itertools.groupby(s.phase for s in states(scenario))]

    assert seen == expected


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("fail", ["BackoffLimitExceeded", "pod fail-1-trlzd on n1", "exit code 3"]),
        ("retry", ["BackoffLimitExceeded", "pod retry-1-", "exit code 3"]),
        ("dl", ["DeadlineExceeded", "active longer than specified deadline"]),
        ("oom", ["pod oom-0-25qvr", "OOMKilled", "exit code 137", "ask for more memory_gb"]),
        ("badcmd", ["StartError", "exit code 128", "executable file not found"]),
        ("img", ["ErrImagePull", "img-0-jb54q"]),
        ("gpu", ["Unschedulable", "Insufficient nvidia.com/gpu", "2 of 3 pods hold their nodes"]),
        ("nosa", ["no pod", 'serviceaccount "nope" not found']),
    ],
)
def test_the_last_state_has_the_reason(scenario, words):
    reason = states(scenario)[-1].reason

    assert [word for word in words if word not in reason] == [], reason


def test_an_end_reports_run_time_and_nodes():
    assert states("ok")[-1].usage["nodes"] == "n1, n2"
    assert 1 <= states("ok")[-1].usage["ran_s"] <= 7
    assert states("badcmd")[-1].usage == {}  # its container started in 1970


def test_a_job_is_not_over_while_a_pod_of_it_runs():
    """From FailureTarget to Failed another pod is still being ended."""
    for seen in snapshots("fail"):
        conditions = {c["type"] for c in seen.job["status"].get("conditions", [])}
        if "FailureTarget" in conditions and "Failed" not in conditions:
            assert state_of(seen).phase is Phase.RUNNING


def end_of(scenario, change):
    """The last snapshot, changed."""
    seen = list(snapshots(scenario))[-1]
    job, pods = copy.deepcopy(seen.job), copy.deepcopy(list(seen.pods))
    change(job, pods)
    return Snapshot(job, pods, seen.deleted, seen.warnings)


def disrupted(job, pods):
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    pods[0]["status"]["conditions"].append({**condition, "message": "preempted by vip"})


def matched_by_policy(job, pods):
    failed = job["status"]["conditions"][-1]
    failed["reason"] = "PodFailurePolicy"
    failed["message"] = (
        "Pod rec-fail/fail-0-4jw99 has condition DisruptionTarget matching FailJob rule at index 0"
    )
    pods.clear()


def evicted(job, pods):
    pods[1]["status"] |= {"reason": "Evicted", "message": "The node was low on memory."}
    del pods[1]["status"]["containerStatuses"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (disrupted, "PreemptionByScheduler: preempted by vip"),
        (matched_by_policy, "condition DisruptionTarget"),
        (evicted, "Evicted: The node was low on memory."),
    ],
)
def test_what_was_done_to_a_job_is_an_interruption(change, word):
    state = state_of(end_of("fail", change))

    assert state.phase is Phase.INTERRUPTED
    assert word in state.reason


def test_a_node_that_is_lost_does_not_hold_the_job_up_for_ever():
    """Its pod ends for ever, however long ago its grace period of 2 s was over."""
    ending = next(s for s in snapshots("fail") if s.job["status"].get("terminating") == 1)

    assert state_of(ending, ending_s=30).phase is Phase.RUNNING
    lost = state_of(ending, ending_s=90)
    assert lost.phase is Phase.INTERRUPTED
    assert "n2 lost: fail-0-4jw99 does not end" in lost.reason


def test_a_suspended_job_waits_however_far_it_was():
    def suspend(job, pods):
        job["spec"]["suspend"] = True
        job["status"] = {"conditions": [{"type": "Suspended", "status": "True"}]}
        pods.clear()

    state = state_of(end_of("ok", suspend))

    assert (state.phase, "no room" in state.reason) == (Phase.WAITING, True)


def test_a_pod_that_failed_for_another_is_not_the_reason():
    from roma_pipelines.launching.kubernetes.states import failed_first

    for scenario, name in (("fail", "fail-1-trlzd"), ("retry", "retry-1-x6vl9")):
        pod = failed_first(list(snapshots(scenario))[-1])
        assert pod["metadata"]["name"] == name
