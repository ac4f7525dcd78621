"""The fake cluster against the recordings of a real one: the same steps in the same order.

Where they differ, the fake is wrong. Compared are conditions of the Job, phases and container
states of its pods, and what is left of them; not times, counters, or who wrote first.
"""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.manifests import manifests
from tests.pipelines.launching.kubernetes.recordings import recorded
from tests.time_limits import within

SUITE = Path(__file__).with_name("test_cluster.py")
ROOT = Path(__file__).parents[4]
PROGRAMS = {
    "ok": ("sleep 0.2", {}),
    # a container's first process ignores TERM unless it handles it; these are no such processes
    "fail": ("[ $JOB_COMPLETION_INDEX = 1 ] && exit 3; trap '' TERM; sleep 60", {}),
    "dl": ("trap 'exit 0' TERM; sleep 60 & wait", {"activeDeadlineSeconds": 4}),
    "oom": ("head -c 300000000 /dev/zero | tail", {}),
    "badcmd": (None, {}),
    "img": ("true", {}),
    "gpu": ("sleep 60", {}),
    "nosa": ("true", {}),
}
SIZES = {"ok": 2, "fail": 2, "gpu": 3}


def steps(changes):
    """(conditions of the Job in order, {index: states of its pod in order}, reasons of warnings)."""
    conditions, pods, warnings = [], {}, []
    for kind, change, there in changes:
        if kind == "jobs":
            conditions.append([c["type"] for c in there["status"].get("conditions", [])])
        elif kind == "pods":
            index = there["metadata"]["name"].split("-")[-2]
            pods.setdefault(index, []).append(_state(change, there))
        elif there["type"] == "Warning":
            warnings.append(there["reason"])
    flat = [step for step, _ in itertools.groupby(conditions)]
    return flat, {i: [s for s, _ in itertools.groupby(p)] for i, p in pods.items()}, set(warnings)


def _state(change, pod):
    phase = pod["status"]["phase"]
    statuses = pod["status"].get("containerStatuses") or [{"state": {}}]
    ((state, more),) = (statuses[0]["state"] or {"": {}}).items() or [("", {})]
    return change.replace("ADDED", "MODIFIED"), phase, state, more.get("exitCode")


def test_the_cluster_suite_runs_against_the_cluster_of_a_kubeconfig(profile, cluster, tmp_path):
    """As against a real one: ROMA_TEST_KUBECONFIG names it, ROMA_TEST_PROFILE what is different."""
    more = tmp_path / "profile.yaml"
    more.write_text(f"environment: {{ PYTHONPATH: {ROOT} }}\n")
    names = "second_submission or server_checks or program_that_is_not_there"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "cluster", "-k", names, str(SUITE)),
            *("-p", "no:cacheprovider", "--basetemp", str(tmp_path / "inner")),
        ],
        env=os.environ
        | {"ROMA_TEST_KUBECONFIG": str(profile.kubeconfig), "ROMA_TEST_PROFILE": str(more)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert "\n3 passed" in done.stdout, done.stdout[-3000:]


@pytest.fixture
def played(cluster, api, profile, make_spec, tmp_path):
    """Runs a scenario's program in the fake cluster; everything that changed."""

    def play(scenario):
        script, more = PROGRAMS[scenario]
        nodes = SIZES.get(scenario, 1)
        spec = make_spec(
            nodes=nodes, runner="torchrun", gpus_per_node=8 if scenario == "gpu" else 0
        )
        changes = {"image": "none:1"} if scenario == "img" else {}
        changes |= {"service_account": "nope"} if scenario == "nosa" else {}
        changes |= {"grace_s": 1, "one_pod_per_node": False}
        job, *_ = manifests(spec, profile.model_copy(update=changes), tmp_path, 1)
        del job["spec"]["podFailurePolicy"]  # the recorded ones had none
        job["spec"] |= more
        (container,) = job["spec"]["template"]["spec"]["containers"]
        container["command"] = ["sh", "-c", script] if script else ["no-such-program"]
        container["resources"].setdefault("limits", {})
        if scenario == "oom":
            container["resources"]["limits"]["memory"] = "50M"
        KubernetesLauncher(profile).client.create(job)
        end = time.monotonic() + (2.0 if scenario in ("img", "gpu", "nosa") else within(5))
        while time.monotonic() < end:
            (there,) = api.store.all("jobs")
            if {"Complete", "Failed"} & {c["type"] for c in there["status"].get("conditions", [])}:
                break
            time.sleep(0.05)
        before, name = api.store.version, there["metadata"]["name"]
        api.delete("jobs", "roma", name, {"propagationPolicy": "Background"}, {})
        return [
            (change.resource, change.type, change.object)
            for kind in ("jobs", "pods", "events")
            for change in api.store.changes(kind, "roma", 0)
            if change.version <= before
        ]

    return play


@pytest.mark.parametrize("scenario", PROGRAMS)
def test_a_scenario_goes_as_it_was_recorded(played, scenario):
    real_conditions, real_pods, real_warnings = steps(
        (line.kind, line.type, line.object) for line in recorded(scenario)
    )
    conditions, pods, warnings = steps(played(scenario))

    assert conditions == real_conditions
    assert ended(pods) == ended(real_pods)
    assert waited(pods) == waited(real_pods)
    assert real_warnings - {"BackoffLimitExceeded", "DeadlineExceeded", "Failed"} <= warnings


def ended(pods):
    return {i: [s for s in states if s[2] == "terminated"] for i, states in pods.items()}


def waited(pods):
    """What pods waited for last; which of several alike waits is chance."""
    pending = [[s for s in states if s[1] == "Pending"] for states in pods.values()]
    return sorted(states[-1][2] for states in pending if states)
