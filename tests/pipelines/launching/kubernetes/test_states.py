"""The launcher's state after every line that a real API server sent."""

import copy
import datetime
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
            there = [pod for uid, pod in pods.items() if uid not in deleted]
            gone = [pod for uid, pod in pods.items() if uid in deleted]
            yield Snapshot(job, there, gone, list(warnings.values()))


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


TRACEBACK = """Traceback (most recent call last):
  File "train.py", line 3, in <module>
    step()
RuntimeError: [pair.cc:553] Connection closed by peer
E1129 09:17:02.1 88 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: 1)
Traceback (most recent call last):
  File "run.py", line 995, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train.py FAILED
============================================================
"""


def test_of_a_traceback_the_reason_has_the_last_line():
    seen = copy.deepcopy(list(snapshots("fail"))[-1])
    for pod in [*seen.pods, *seen.deleted]:
        for status in pod["status"]["containerStatuses"]:
            status["state"]["terminated"]["message"] = TRACEBACK

    reason = state_of(seen).reason

    assert reason.endswith("exit code 3: RuntimeError: [pair.cc:553] Connection closed by peer")
    assert "\n" not in reason


def test_the_name_of_a_pod_that_could_not_be_made_is_no_reason():
    seen = copy.deepcopy(list(snapshots("nosa"))[-1])
    reasons = set()
    for name in ("nosa-0-x7k2p", "nosa-0-b9q4z"):
        for warning in seen.warnings:
            warning["message"] = f'Error creating: pods "{name}" is forbidden: violates PodSecurity'
        reasons.add(state_of(seen).reason)

    assert reasons == {'no pod: Error creating: pods "nosa-0" is forbidden: violates PodSecurity'}


def deleted_before(seen, seconds):
    """As if index 0 of ``fail`` had been deleted so long before its Job began to fail."""
    seen = copy.deepcopy(seen)
    (began,) = [
        datetime.datetime.fromisoformat(c["lastTransitionTime"])
        for c in seen.job["status"]["conditions"]
        if c["type"] == "FailureTarget"
    ]
    for pod in [*seen.pods, *seen.deleted]:
        if (grace_s := pod["metadata"].get("deletionGracePeriodSeconds")) is not None:
            at = began + datetime.timedelta(seconds=grace_s - seconds)
            pod["metadata"]["deletionTimestamp"] = at.isoformat()
    return seen


@pytest.mark.parametrize(
    ("seconds", "phase"),
    [(5, Phase.INTERRUPTED), (0, Phase.ENDED_BAD), (-2, Phase.ENDED_BAD)],
)
def test_a_pod_that_was_deleted_before_another_failed_is_an_interruption(seconds, phase):
    """The Job's controller deletes pods only after one has failed."""
    state = state_of(deleted_before(list(snapshots("fail"))[-1], seconds))

    assert state.phase is phase
    assert ("was deleted" in state.reason) == (phase is Phase.INTERRUPTED)


@pytest.mark.parametrize("word", ["ContainerStatusUnknown", "NodeShutdown", "Evicted"])
def test_a_node_that_was_away_explains_the_failure_of_another_pod(word):
    """Its kubelet reports the pod when it is back, long after the survivor failed."""
    seen = copy.deepcopy(list(snapshots("fail"))[-1])
    for pod in [*seen.pods, *seen.deleted]:
        if pod["metadata"].pop("deletionTimestamp", None):
            pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] = word

    assert state_of(seen).phase is Phase.INTERRUPTED


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
    job, pods = copy.deepcopy(seen.job), copy.deepcopy([*seen.pods, *seen.deleted])
    gone = {pod["metadata"]["uid"] for pod in seen.deleted}
    change(job, pods)
    there, deleted = (
        [p for p in pods if (p["metadata"]["uid"] in gone) is is_gone] for is_gone in (False, True)
    )
    return Snapshot(job, there, deleted, seen.warnings)


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
    pods[0]["status"] |= {"reason": "Evicted", "message": "The node was low on memory."}
    del pods[0]["status"]["containerStatuses"]


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
