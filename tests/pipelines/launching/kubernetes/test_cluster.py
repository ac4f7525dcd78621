"""The backend against any Kubernetes: the same tests for a real cluster and for the fake one.

    ROMA_TEST_KUBECONFIG=~/.kube/config pytest -m cluster

takes the cluster of that file, makes a namespace there and removes it in the end. Without a file
(`pytest -m cluster`, and `make chaos`) the tests' own API server stands in. By default pods take the interpreter, its packages and this project
from the nodes, under the paths they have here. ROMA_TEST_PROFILE names a YAML file of what is
different (fields of KubernetesProfile: image, python, command_prefix, volumes, …); ROMA_TEST_STORAGE a
folder for jobs that pods see under the same path, in one of these volumes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import site
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

import roma_core
from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes import launcher as backend
from roma_pipelines.launching.kubernetes.client import ApiError, Client
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.manifests import MANAGED_BY, manifests
from roma_pipelines.launching.kubernetes.profile import KubernetesProfile
from roma_pipelines.launching.spec import JobFailed, JobSpec, Phase
from roma_pipelines.launching.supervisor import request_cancel, supervise
from tests.pipelines.launching.conftest import PRELUDE
from tests.pipelines.launching.kubernetes.fake_api import FakeApi
from tests.pipelines.launching.kubernetes.fake_cluster import FakeCluster
from tests.time_limits import wait_until, within

# settings of tests are taken away from every single one of them, so they are read here
KUBECONFIG = os.environ.get("ROMA_TEST_KUBECONFIG")
PROFILE = os.environ.get("ROMA_TEST_PROFILE")
STORAGE = os.environ.get("ROMA_TEST_STORAGE")

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
if not KUBECONFIG:  # a minute and a half, for what other tests hold too: not in every run
    pytestmark.append(pytest.mark.chaos)
CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.2}
ROOT = Path(roma_core.__file__).parents[1]


def ours() -> dict[str, object]:
    """What this interpreter needs of the nodes, as parts of a profile."""
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT.resolve()}
    needed |= {Path(p).resolve() for p in site.getsitepackages()}
    needed = {p for p in needed if not any(p != o and p.is_relative_to(o) for o in needed)}
    mounts = [{"mount": str(p), "host_path": str(p), "read_only": True} for p in sorted(needed)]
    return {
        "image": "localhost/python:3.11",
        "python": sys.executable,
        "volumes": [v for v in mounts if v["mount"] not in ("/usr", "/")],
        "environment": {"PYTHONPATH": str(ROOT)},
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(kubeconfig, what a profile needs to say beside ``ours``)."""
    if KUBECONFIG:
        yield Path(KUBECONFIG), yaml.safe_load(Path(PROFILE).read_text()) if PROFILE else {}
        return
    api = FakeApi()
    fake = FakeCluster(api, namespace="default")
    kubeconfig = api.write_kubeconfig(tmp_path_factory.mktemp("cluster") / "kubeconfig")
    yield kubeconfig, {"environment": {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}}
    fake.close()
    api.close()


@pytest.fixture(scope="module")
def namespace(cluster):
    client, name = Client(cluster[0]), f"roma-test-{secrets.token_hex(4)}"
    client.request("POST", "/api/v1/namespaces", body=_namespace(name))
    if KUBECONFIG:
        _until(lambda: client.request("GET", f"/api/v1/namespaces/{name}/serviceaccounts/default"))
    yield name
    client.request("DELETE", f"/api/v1/namespaces/{name}")


def _namespace(name):
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def _until(ask, seconds=20):
    end = time.monotonic() + within(seconds)
    while True:
        try:
            return ask()
        except ApiError:
            assert time.monotonic() < end
            time.sleep(0.5)


@pytest.fixture
def storage():
    """A folder that pods see; the fake ones see all of this computer."""
    root = Path(tempfile.mkdtemp(prefix="roma-test-", dir=STORAGE))
    root.chmod(0o755)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture
def profile(cluster, namespace, storage, free_port):
    kubeconfig, more = cluster
    values = {**ours(), "grace_s": 5, "port": free_port if not KUBECONFIG else 29500, **more}
    if not STORAGE:
        values["volumes"] = [
            *values["volumes"],
            {"mount": str(storage), "host_path": str(storage)},
        ]
    return KubernetesProfile(name="test", kubeconfig=kubeconfig, namespace=namespace, **values)


@pytest.fixture
def launcher(profile):
    return KubernetesLauncher(profile, fs_lag_s=10.0 if KUBECONFIG else 0.0)


@pytest.fixture
def key():
    return secrets.token_hex(10)


@pytest.fixture
def folder(storage, key):
    return JobFolder(storage / "jobs" / key)


@pytest.fixture
def make(storage, key):
    """The spec of a job that runs the given lines after PRELUDE."""

    def make(body="succeed()", **fields):
        script = storage / "job.py"
        script.write_text(PRELUDE + body + "\n")
        values = {"runner": "plain", "command": (str(script),), **fields}
        return JobSpec(key=key, config_digest=digest_of(CONFIG), **values)

    return make


@pytest.fixture
def left(launcher, key):
    """Jobs and pods of this test that are there."""

    def left():
        query = {"labelSelector": f"roma-pipeline/job-key={key}"}
        space = launcher.profile.namespace
        jobs = launcher.client.request(
            "GET", f"/apis/batch/v1/namespaces/{space}/jobs", query=query
        )
        pods = launcher.client.request("GET", f"/api/v1/namespaces/{space}/pods", query=query)
        return [o["metadata"]["name"] for o in [*jobs["items"], *pods["items"]]]

    return left


def changed(launcher, **fields):
    launcher.profile = launcher.profile.model_copy(update=fields)
    return launcher


def test_two_pods_of_two_processes_train_together(launcher, folder, make):
    body = (
        "import torch, torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "rank = dist.get_rank(); torch.manual_seed(rank)\n"
        "net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))\n"
        "step = torch.optim.SGD(net.parameters(), 0.1)\n"
        "for i in range(5):\n"
        "    step.zero_grad(); net(torch.randn(8, 4)).square().mean().backward(); step.step()\n"
        "mine = torch.cat([p.detach().flatten() for p in net.parameters()])\n"
        "all_ = [torch.empty_like(mine) for _ in range(dist.get_world_size())]\n"
        "dist.all_gather(all_, mine)\n"
        "assert all(torch.equal(mine, other) for other in all_)\n"
        "print('rank', rank, 'of', dist.get_world_size(), flush=True)\n"
        "if rank == 0: succeed(world_size=dist.get_world_size())\n"
        "dist.destroy_process_group()"
    )
    spec = make(body, runner="torchrun", nodes=2, processes_per_node=2)

    outcome = supervise(launcher, folder, spec, CONFIG, **FAST)

    assert outcome.status == "completed"
    assert len(outcome.attempts[0].end.nodes.split(", ")) == 2
    assert "rank 0 of 4" in folder.attempt(1).log.read_text()


def test_the_log_is_there_while_it_is_written(launcher, folder, make):
    seen = []

    def on_poll(state):
        log = folder.attempt(1).log
        if not seen and log.exists() and "now" in log.read_text():
            seen.append(state.phase)
            (folder.path / "go").touch()

    spec = make("print('now', flush=True)\nwait_for('go', 60)\nsucceed()")
    supervise(launcher, folder, spec, CONFIG, on_poll=on_poll, **FAST)

    assert seen == [Phase.RUNNING]


def test_a_failure_ends_all_pods_and_has_its_reason(launcher, folder, make):
    body = (
        "if os.environ['RANK'] == '1': print('no luck', flush=True); sys.exit(9)\n"
        "print('rank 0 waits', flush=True); wait_for('never', 100)"
    )

    with pytest.raises(JobFailed, match="no luck") as caught:
        supervise(launcher, folder, make(body, runner="torchrun", nodes=2), CONFIG, **FAST)

    assert caught.value.outcome.status == "failed"
    assert "exit code 1" in str(caught.value)


def test_a_deadline_lets_the_job_save_and_continues_it(launcher, folder, make, monkeypatch):
    def hurried(spec, *arguments):
        job, *others = manifests(spec, *arguments)
        first = arguments[2] == 1
        limit_s = 25 if KUBECONFIG else 8
        job["spec"]["activeDeadlineSeconds"] = limit_s if first else 300
        return [job, *others]

    monkeypatch.setattr(backend, "manifests", hurried)
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "if n < 2:\n    save(3); wait_for('attempts/1/stop', 100)\n"
        "    save(7); leave('continue', 'stop file'); sys.exit(75)\nsucceed()"
    )
    outcome = supervise(launcher, folder, make(body), CONFIG, **FAST)

    first, second = outcome.attempts
    assert (first.end.status, first.end.checkpoint, second.end.status) == (
        "continue",
        7,
        "completed",
    )
    assert "DeadlineExceeded" in first.end.reason


def test_a_pod_that_is_taken_away_continues_the_job(launcher, folder, make):
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "if n < 2:\n    save(3); wait_for('attempts/1/stop', 100)\n"
        "    save(7); leave('continue', 'stop file'); sys.exit(1)\nsucceed()"
    )
    taken = []

    def take(state):
        if state.phase is Phase.RUNNING and folder.checkpoints.exists() and not taken:
            taken.append(folder.attempt_numbers()[-1])
            pods = f"/api/v1/namespaces/{launcher.profile.namespace}/pods"
            query = {"labelSelector": ",".join(f"{k}={v}" for k, v in MANAGED_BY.items())}
            for pod in launcher.client.request("GET", pods, query=query)["items"]:
                if pod["metadata"]["labels"]["roma-pipeline/job-key"] == folder.path.name:
                    launcher.client.request("DELETE", f"{pods}/{pod['metadata']['name']}")

    outcome = supervise(launcher, folder, make(body), CONFIG, on_poll=take, **FAST)

    assert [attempt.end.status for attempt in outcome.attempts] == ["continue", "completed"]
    assert outcome.attempts[0].end.checkpoint == 7


def test_out_of_memory_is_reported(launcher, folder, make):
    body = (
        "hoard = bytearray(400_000_000)\nhoard[::4096] = b'x' * len(hoard[::4096])\ntime.sleep(60)"
    )
    changed(launcher, shared_memory_gb=0.01)

    with pytest.raises(JobFailed, match="out of memory: ask for more memory_gb"):
        supervise(launcher, folder, make(body, memory_gb=0.1), CONFIG, **FAST)


@pytest.mark.parametrize(
    ("change", "fields", "word"),
    [
        ({"image": "localhost/nowhere:1"}, {}, "nowhere"),
        ({"service_account": "nope"}, {}, 'serviceaccount "nope" not found'),
        ({"queue_timeout_s": 3.0}, {"gpus_per_node": 99}, "Insufficient nvidia.com/gpu"),
        ({"secrets": ("nowhere",)}, {}, 'secret "nowhere" not found'),
    ],
    ids=["image", "account", "gpu", "secret"],
)
def test_what_can_never_start_fails_after_the_timeout(
    launcher, folder, make, left, change, fields, word
):
    changed(launcher, **{"start_timeout_s": 15.0 if KUBECONFIG else 1.0, **change})

    with pytest.raises(JobFailed, match="did not start within") as caught:
        supervise(launcher, folder, make(**fields), CONFIG, **FAST)

    assert word in str(caught.value)
    _gone(left)


def test_a_program_that_is_not_there_is_named(launcher, folder, make):
    with pytest.raises(JobFailed, match="StartError"):
        supervise(changed(launcher, python="/no/python"), folder, make(), CONFIG, **FAST)


def test_cancelling_removes_the_job_and_its_pods(launcher, folder, make, left):
    def cancel(state):
        if folder.checkpoints.exists():
            request_cancel(folder, "me")

    spec = make("save(1); wait_for('never', 100)", runner="torchrun", nodes=2)
    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(
            launcher,
            folder,
            spec.model_copy(update={"command": spec.command}),
            CONFIG,
            on_poll=cancel,
            **FAST,
        )
    _gone(left)


def test_a_job_whose_pods_were_orphaned_can_still_be_cancelled(launcher, folder, make, left):
    def act(state):
        name = f"roma-{folder.path.name[:12]}-1"
        path = f"/apis/batch/v1/namespaces/{launcher.profile.namespace}/jobs/{name}"
        if folder.checkpoints.exists() and "are left" not in state.reason:
            try:
                launcher.client.request("DELETE", path)  # its default orphans the pods
            except ApiError as gone:
                assert gone.code == 404
        if "are left" in state.reason:
            request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(
            launcher, folder, make("save(1); wait_for('never', 100)"), CONFIG, on_poll=act, **FAST
        )
    _gone(left)


def test_a_second_submission_adopts(launcher, folder, make):
    spec = make("wait_for('go', 100)\nsucceed()")
    folder.path.mkdir(parents=True)
    (folder.path / "attempts").mkdir()
    folder.spec.write_text(spec.model_dump_json())
    folder.config.write_text('{"base_lr": 0.001}')

    plan = launcher.plan(spec, folder)
    first = launcher.submit(plan, {})
    again = KubernetesLauncher(launcher.profile).submit(plan, {})

    assert first == again
    go = (folder.path / "go").touch  # not before it is watched: a result alone makes no attempt
    outcome = supervise(launcher, folder, spec, CONFIG, on_poll=lambda state: go(), **FAST)
    assert (outcome.status, len(outcome.attempts)) == ("completed", 1)
    assert (folder.path / "starts").read_text().split() == ["1"]


def test_the_server_checks_what_no_schema_has(launcher, folder, make, left):
    assert launcher.preflight(launcher.plan(make(nodes=2, runner="torchrun"), folder)) == []
    assert left() == []
    for change in (
        lambda job: job["spec"].update(bakcoffLimit=1),
        lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Always"),
        lambda job: job["spec"]["template"]["spec"]["volumes"].clear(),
        lambda job: job["metadata"].update(name="x" * 62),
    ):
        job = manifests(make(nodes=20, runner="torchrun"), launcher.profile, "/x", 1)[0]
        change(job)
        with pytest.raises(ApiError):
            launcher.client.create(job, dry_run=True)
    elsewhere = changed(launcher, namespace="not-there")
    (reason,) = elsewhere.preflight(elsewhere.plan(make(), folder))
    assert "not-there" in reason


def _gone(left):
    wait_until(lambda: not left(), 20, "the end of Job and pods")
