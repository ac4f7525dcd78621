"""The launcher's operations against an API server over HTTP."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import yaml

from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes import manifests as kubernetes_manifests
from roma_pipelines.launching.kubernetes.client import ApiError
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.manifests import manifests
from roma_pipelines.launching.launcher import Rejected, Unreachable
from roma_pipelines.launching.spec import JobFailed, JobHandle, Phase
from roma_pipelines.launching.supervisor import request_cancel, supervise

CONFIG = {"base_lr": 0.001}
FAST = {"poll_every_s": 0.05}


def test_a_job_runs_to_its_end(launcher, cluster, folder, make_spec, starts):
    outcome = supervise(launcher, folder, make_spec("print('hello')\nsucceed()"), CONFIG, **FAST)

    assert (outcome.status, starts()) == ("completed", [1])
    assert folder.attempt(1).log.read_text() == "hello\n"
    assert outcome.attempts[0].end.nodes == "n1"
    assert outcome.attempts[0].external["name"] == "roma-0123456789ab-1"


def test_a_failure_has_the_end_of_the_log(launcher, cluster, folder, make_spec):
    with pytest.raises(JobFailed, match="exit code 3") as caught:
        supervise(launcher, folder, make_spec("print('why')\nsys.exit(3)"), CONFIG, **FAST)

    assert "why" in str(caught.value)
    assert caught.value.outcome.status == "failed"


# -- what it asks of the API server --------------------------------------------------------------


def test_many_jobs_are_one_watch_and_no_list_per_poll(profile, cluster, api, tmp_path, make_spec):
    """Three lists and three watches for a process, however many jobs it polls and how often."""
    launcher = KubernetesLauncher(profile, fs_lag_s=0.0)
    handles = []
    for n in range(12):
        spec = make_spec("time.sleep(60)").model_copy(update={"key": f"{n:020x}"})
        folder = JobFolder(tmp_path / "jobs" / spec.key)
        folder.path.mkdir(parents=True)
        folder.spec.write_text(spec.model_copy(update={"key": spec.key}).model_dump_json())
        manifest = manifests(spec, profile.model_copy(update={"image": "none"}), folder.path, 1)[0]
        made = launcher.client.create(
            {**manifest, "metadata": {**manifest["metadata"], "name": f"job-{n}"}}
        )
        external = {"name": f"job-{n}", "uid": made["metadata"]["uid"]}
        handles.append(JobHandle(launcher.plan(spec, folder), external))
    other = KubernetesLauncher(profile, fs_lag_s=0.0)  # of another asset in this process

    for _ in range(100):
        states = [one.watch(handle) for handle in handles for one in (launcher, other)]

    assert {state.phase for state in states} == {Phase.WAITING}
    reads = {what: n for what, n in api.asked.items() if what[0] in ("get", "list", "watch")}
    print(f"2,400 looks at 12 jobs: {sum(reads.values())} requests, {reads}")
    assert reads == {(v, k): 1 for v in ("list", "watch") for k in ("jobs", "pods", "events")}
    for handle in handles:
        api.delete("jobs", "roma", handle.external["name"], {"propagationPolicy": "Background"}, {})


def test_informers_that_are_not_read_stop_watching(profile, cluster, api, eventually, monkeypatch):
    monkeypatch.setattr("roma_pipelines.launching.kubernetes.client._IDLE_S", 0.3)
    launcher, before = KubernetesLauncher(profile), set(threading.enumerate())

    def watches():
        return [t for t in set(threading.enumerate()) - before if t.name.startswith("watch ")]

    assert launcher.client.sync() == ""
    assert watches()
    api.store.add("events", {"metadata": {"name": "e", "namespace": "roma"}, "involvedObject": {}})
    time.sleep(0.5)
    api.cut_streams()

    eventually(lambda: not watches())
    assert launcher.client.sync() == ""  # and begins again


# -- preflight -----------------------------------------------------------------------------------


def reasons_of(profile, folder, spec):
    launcher = KubernetesLauncher(profile)
    return launcher.preflight(launcher.plan(spec, folder))


def test_a_job_that_could_run_is_not_refused(profile, cluster, api, folder, make_spec):
    assert reasons_of(profile, folder, make_spec(nodes=2, runner="torchrun")) == []
    assert api.store.all("jobs") == []  # a dry run creates nothing


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"namespace": "elsewhere"}, "there is no namespace elsewhere"),
        ({"volumes": ()}, "is in no writable volume of the profile fake (there: none)"),
        ({"kubeconfig": Path("/nowhere")}, "no Kubernetes cluster is configured here"),
    ],
)
def test_what_is_refused_before_it_queues(profile, cluster, folder, make_spec, change, word):
    (reason,) = reasons_of(profile.model_copy(update=change), folder, make_spec())

    assert word in reason


def test_every_reason_is_given_at_once(profile, cluster, api, folder, make_spec, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    api.rules = []
    spec = make_spec(env_names=("WANDB_API_KEY",), nodes=2, runner="torchrun")
    reasons = reasons_of(profile.model_copy(update={"volumes": ()}), folder, spec)

    assert len(reasons) == 4  # the folder, the secret, the Job, the Service
    assert "secret" not in " ".join(reasons).replace("a secret", "").replace("secrets", "")


def test_problems_found_by_the_server_are_reported(
    profile, cluster, folder, make_spec, monkeypatch
):
    """Rules that are in no schema: the server names each field."""
    real = kubernetes_manifests.manifests

    def broken(*arguments):
        job, *others = real(*arguments)
        job["spec"]["template"]["spec"]["restartPolicy"] = "Always"
        job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"][0]["name"] = "gone"
        return [job, *others]

    monkeypatch.setattr("roma_pipelines.launching.kubernetes.launcher.manifests", broken)
    reasons = reasons_of(profile, folder, make_spec())

    assert any("restartPolicy" in reason for reason in reasons)
    assert any("volumeMounts" in reason for reason in reasons)


def test_an_unknown_field_is_no_warning(profile, cluster, make_spec):
    job = manifests(make_spec(), profile, "/x", 1)[0]
    job["spec"]["bakcoffLimit"] = 3

    with pytest.raises(ApiError, match="bakcoffLimit"):
        KubernetesLauncher(profile).client.create(job, dry_run=True)


def test_a_server_that_is_away_is_no_refusal(profile, cluster, api, folder, make_spec):
    api.away = True

    with pytest.raises(Unreachable):
        reasons_of(profile, folder, make_spec())


def test_a_service_that_is_refused_takes_its_job_along(
    launcher, cluster, api, folder, make_spec, monkeypatch
):
    """A right that was lost between the dry run and the submission."""
    api.rules = [r for r in role()["rules"] if "services" not in r["resources"]]
    monkeypatch.setattr(launcher, "preflight", lambda plan: [])

    with pytest.raises(Rejected, match="cannot create resource"):
        supervise(launcher, folder, make_spec(nodes=2, runner="torchrun"), CONFIG, **FAST)

    assert api.store.all("jobs") == []
    assert not (folder.path / "starts").exists()


# -- secrets -------------------------------------------------------------------------------------


def test_secrets_come_from_secrets_and_are_in_no_manifest(
    profile, cluster, api, folder, make_spec, monkeypatch
):
    cluster.secrets["keys"] = {"WANDB_API_KEY": "from the cluster"}
    monkeypatch.setenv("WANDB_API_KEY", "from here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    launcher = KubernetesLauncher(profile.model_copy(update={"secrets": ("keys",)}), fs_lag_s=0)
    spec = make_spec(
        "print(os.environ['WANDB_API_KEY'], os.environ['WANDB_MODE'], os.environ['GIVEN'])\nsucceed()",
        env_names=("WANDB_API_KEY", "WANDB_MODE"),
    )

    supervise(launcher, folder, spec, CONFIG, environment={"GIVEN": "$(HOME) $$"}, **FAST)

    assert folder.attempt(1).log.read_text() == "from the cluster offline $(HOME) $$\n"
    (job,) = api.store.all("jobs")
    assert "from here" not in str(job) + folder.attempt(1).script.read_text()


@pytest.mark.parametrize(
    ("name", "value"),
    [("MLFLOW_TRACKING_URI", "https://me:pass@mlflow.example.org"), ("API_TOKEN", "me:pass")],
)
def test_a_secret_in_the_environment_is_refused(launcher, cluster, folder, make_spec, name, value):
    given = {name: value}

    with pytest.raises(Rejected, match=f"{name} holds a password or is named so") as caught:
        supervise(launcher, folder, make_spec(), CONFIG, environment=given, **FAST)

    assert "me:pass" not in str(caught.value)


def test_a_secret_that_is_missing_is_named(launcher, cluster, folder, make_spec):
    launcher.profile = launcher.profile.model_copy(
        update={"secrets": ("nowhere",), "start_timeout_s": 0.5}
    )

    with pytest.raises(JobFailed, match='secret "nowhere" not found'):
        supervise(launcher, folder, make_spec(), CONFIG, **FAST)


# -- starting ------------------------------------------------------------------------------------


def test_pods_that_find_no_node_may_wait_longer_than_half_a_gang(
    launcher, cluster, folder, make_spec, eventually
):
    """All of them in the queue: its own limit. Some on nodes: those are held for nothing."""
    launcher.profile = launcher.profile.model_copy(
        update={"start_timeout_s": 0.3, "queue_timeout_s": 60.0, "one_pod_per_node": False}
    )
    queued = make_spec(gpus_per_node=9)
    half = queued.model_copy(update={"nodes": 3, "gpus_per_node": 8, "runner": "torchrun"})
    seen = []

    def give_up(state):
        seen.append(state)
        if len(seen) > 30:
            request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(launcher, folder, queued, CONFIG, on_poll=give_up, **FAST)
    assert "Insufficient nvidia.com/gpu" in seen[-2].reason
    shutil.rmtree(folder.path)
    with pytest.raises(JobFailed, match=r"did not start within 0.3 s.*2 of 3 pods hold") as caught:
        supervise(launcher, folder, half, CONFIG, **FAST)
    assert caught.value.outcome.status == "failed"
    eventually(lambda: cluster.pods() == [])


def test_a_program_that_is_not_there_is_named(profile, cluster, folder, make_spec):
    launcher = KubernetesLauncher(profile.model_copy(update={"python": "/no/python"}), 0.0)

    with pytest.raises(JobFailed, match=r"StartError.*/no/python"):
        supervise(launcher, folder, make_spec(), CONFIG, **FAST)


def test_a_job_folder_that_pods_do_not_see_is_said(
    profile, cluster, folder, make_spec, monkeypatch
):
    """The volume is mounted and shows something else: the pod's own words are the reason."""
    monkeypatch.setenv("PYTHONPATH", "")
    launcher = KubernetesLauncher(
        profile.model_copy(update={"command_prefix": ("env", "-C", "/", "sh", "-c", HIDDEN, "sh")}),
        0.0,
    )

    with pytest.raises(JobFailed, match="is not visible in this pod"):
        supervise(launcher, folder, make_spec(), CONFIG, **FAST)


HIDDEN = (
    'set -e; interpreter=$1; shift 3; shift; exec "$interpreter" -c '
    "'import roma_core.pod as p, sys; p.FS_LAG_S = 0; "
    'sys.exit(p.main(["/nowhere", *sys.argv[1:]]))\' "$@"'
)


# -- rights --------------------------------------------------------------------------------------


ROLE = Path(__file__).parents[4] / "deploy" / "kubernetes" / "base" / "launcher-role.yaml"


def role():
    return next(d for d in yaml.safe_load_all(ROLE.read_text()) if d["kind"] == "Role")


def test_the_role_is_what_a_launcher_uses_no_more_and_no_less(
    launcher, cluster, api, folder, make_spec
):
    api.rules = role()["rules"]
    granted = {(v, r) for rule in api.rules for r in rule["resources"] for v in rule["verbs"]}
    assert not any("*" in part for pair in granted for part in pair)
    body = (
        "if os.environ['RANK'] == '1' and n == 1: print('one'); sys.exit(4)\n"
        "if os.environ['RANK'] == '0': wait_for('never' if n == 1 else 'spec.json', 30); succeed(world_size=2)"
    )
    spec = make_spec(body, runner="torchrun", nodes=2)

    with pytest.raises(JobFailed, match="one"):  # it fails, and its logs are read
        supervise(launcher, folder, spec, CONFIG, **FAST)
    launcher.find(launcher.plan(spec, folder, 7))  # an attempt without a claim
    shutil.rmtree(folder.path)
    api.delete("jobs", "roma", "roma-0123456789ab-1", {"propagationPolicy": "Background"}, {})

    def orphan(state):  # a deletion that leaves the pods, then a cancel
        if state.phase is Phase.RUNNING and api.store.get("jobs", "roma", "roma-0123456789ab-1"):
            api.delete("jobs", "roma", "roma-0123456789ab-1", {}, {})
        if "pods are left" in state.reason:
            request_cancel(folder, "me")

    with pytest.raises(JobFailed, match="cancelled by me"):
        supervise(
            launcher, folder, make_spec("wait_for('never', 60)"), CONFIG, on_poll=orphan, **FAST
        )

    used = {what for what in api.asked if api.asked[what]}
    assert used == granted
