"""What watching jobs of a Kubernetes cluster costs, and a plan: ``python -m tests.benchmarks.kubernetes``.

The API server is the tests' own, in a process apart, with as many running Jobs as are asked for (a
pod each) and ten changes of them a second. The watching process looks at every job twice a second,
as supervisors do. Printed are requests by kind, CPU of the watching process alone, and the time from
a Job's end at the server to its being seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.manifests import manifests
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.spec import JobHandle, JobSpec, Phase
from tests.pipelines.launching.kubernetes.fake_api import FakeApi
from tests.pipelines.launching.kubernetes.fake_store import Object, now


def spec_of(n: int, **fields: object) -> JobSpec:
    return JobSpec(key=f"{n:012x}00000000", command=("-m", "x"), config_digest="", **fields)  # type: ignore[arg-type]


def serve(jobs: int, folder: Path) -> None:
    """The server: says where it is, ends jobs at random, says what it was asked at the end."""
    api = FakeApi()
    api.store.add("namespaces", {"metadata": {"name": "roma"}})
    profile = KubernetesProfile(
        name="bench", kubeconfig=api.write_kubeconfig(folder / "kubeconfig")
    )
    made = [_running(api, profile, n) for n in range(jobs)]
    print(json.dumps(made), flush=True)
    for line in sys.stdin:
        if line.startswith("end"):
            name = line.split()[1]
            api.store.change("jobs", "roma", name, _complete)
        elif line.startswith("touch"):
            name = line.split()[1]
            api.store.change("pods", "roma", name, lambda o: o["status"].update(seen=now()))
        else:
            print(json.dumps([[*what, n] for what, n in sorted(api.asked.items())]), flush=True)
            return


def _complete(job: Object) -> None:
    complete = {"type": "Complete", "status": "True", "lastTransitionTime": now()}
    job["status"].update(conditions=[complete])


def _running(api: FakeApi, profile: KubernetesProfile, n: int) -> list[str]:
    job = api.create("jobs", "roma", manifests(spec_of(n), profile, "/x", 1)[0], {})
    api.store.change(
        "jobs", "roma", job["metadata"]["name"], lambda o: o["status"].update(active=1)
    )
    state = {"running": {"startedAt": now()}}
    labels = {**job["spec"]["template"]["metadata"]["labels"]}
    labels["batch.kubernetes.io/job-completion-index"] = "7"  # no log to be followed
    api.store.add(
        "pods",
        {
            "metadata": {"name": f"pod-{n}", "namespace": "roma", "labels": labels},
            "spec": {**job["spec"]["template"]["spec"], "nodeName": f"n{n % 40}"},
            "status": {"phase": "Running", "containerStatuses": [{"name": "main", "state": state}]},
        },
    )
    return [job["metadata"]["name"], job["metadata"]["uid"]]


def watch(jobs: int, seconds: float, folder: Path) -> None:
    argv = [sys.executable, "-m", "tests.benchmarks.kubernetes", "--serve", str(folder)]
    server = subprocess.Popen(
        [*argv, "--jobs", str(jobs)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None and server.stdout is not None
    made = json.loads(server.stdout.readline())
    profile = KubernetesProfile(name="bench", kubeconfig=folder / "kubeconfig")
    launcher = KubernetesLauncher(profile)
    handles = []
    for n, (name, uid) in enumerate(made):
        job = JobFolder(folder / "jobs" / name)
        job.path.mkdir(parents=True)
        job.spec.write_text(spec_of(n).model_dump_json())
        external = {"name": name, "namespace": "roma", "uid": uid, "profile": "bench"}
        handles.append(JobHandle(launcher.plan(spec_of(n), job), external))
    assert all(launcher.watch(handle).phase is Phase.RUNNING for handle in handles)

    looks, used, start, delays = 0, time.process_time(), time.monotonic(), []
    while time.monotonic() - start < seconds:
        turn = time.monotonic()
        for _ in range(5):  # ten changes a second
            print(f"touch pod-{looks % jobs}", file=server.stdin, flush=True)
        for handle in handles:
            launcher.watch(handle)
        looks += len(handles)
        time.sleep(max(0.0, turn + 0.5 - time.monotonic()))
    used, ran = time.process_time() - used, time.monotonic() - start
    for handle in handles[:5]:
        print(f"end {handle.external['name']}", file=server.stdin, flush=True)
        told = time.monotonic()
        while not launcher.watch(handle).ended:
            time.sleep(0.001)
        delays.append(time.monotonic() - told)
    asked = server.communicate("asked\n")[0]
    reads = [f"{verb} {what}: {n}" for verb, what, n in json.loads(asked) if verb != "create"]
    print(f"{jobs} jobs, {looks} looks in {ran:.0f} s: requests {', '.join(reads)}")
    print(f"  {100 * used / ran:.1f} % of a core, {1e6 * used / looks:.0f} us a look")
    print(f"  an end is seen {1000 * statistics.median(delays):.0f} ms after it (median of 5)")


def plan() -> None:
    launcher = KubernetesLauncher(KubernetesProfile.load("h100"))
    spec = spec_of(0, nodes=16, processes_per_node=8, gpus_per_node=8)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        launcher.plan(spec)
        times.append(time.perf_counter() - start)
    print(f"a plan of 16 nodes renders in {1000 * statistics.median(times):.1f} ms (median of 20)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.jobs, options.serve)
        return
    plan()
    with tempfile.TemporaryDirectory() as folder:
        watch(options.jobs, options.seconds, Path(folder))


if __name__ == "__main__":
    main()
