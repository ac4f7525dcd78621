"""Manifests: golden texts, the schemas of the oldest and the newest Kubernetes, and what is refused."""

import copy
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from roma_core.job import JobFolder
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.kubernetes.manifests import manifests, with_variables
from roma_pipelines.launching.kubernetes.profile import (
    KubernetesProfile,
    KubernetesSettings,
    Volume,
)
from roma_pipelines.launching.spec import JobSpec
from tests.time_limits import within

GOLDEN = Path(__file__).parents[3] / "golden" / "launching"
OLDEST, NEWEST = "1.31", "1.37"

PRETRAINING = JobSpec(
    key="c0ffee00c0ffee00c0ff",
    command=("-m", "roma_core.cli", "pretrain", "--job", "$(a 'strange' folder)"),
    config_digest="0" * 64,
    processes_per_node=2,
    threads_per_process=1,
    env_names=("WANDB_API_KEY", "MLFLOW_TRACKING_URI"),
)
GANG = PRETRAINING.model_copy(update={"nodes": 2, "gpus_per_node": 2, "memory_gb": 120.5})
H100 = KubernetesProfile.load("h100", KubernetesSettings())
GENERIC = KubernetesProfile.load("generic", KubernetesSettings())
BARE = KubernetesProfile(
    name="bare",
    volumes=(
        Volume(mount="/data", nfs="files.example.org:/export/roma"),
        Volume(mount="/opt/python", host_path="/opt/python", read_only=True),
    ),
    command_prefix=("nice", "-n", "5"),
    one_pod_per_node=False,
)
PLAIN = PRETRAINING.model_copy(update={"runner": "plain", "processes_per_node": 1})


@pytest.mark.parametrize(
    ("name", "profile", "spec"),
    [
        ("kubernetes_gang", H100, GANG),
        ("kubernetes_one_node", GENERIC, PRETRAINING),
    ],
)
def test_the_plan_is_the_reviewed_one(name, profile, spec):
    assert KubernetesLauncher(profile).plan(spec).text == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize("version", [OLDEST, "1.36", NEWEST])
@pytest.mark.parametrize("profile", [H100, GENERIC, BARE], ids=lambda profile: profile.name)
@pytest.mark.parametrize("spec", [GANG, PRETRAINING, PLAIN], ids=["gang", "one node", "plain"])
def test_manifests_fit_the_schemas_strictly(version, profile, spec):
    job, *others = manifests(spec, profile, "/data/roma/jobs/x", 3)
    for manifest in (with_variables(job, {"MLFLOW_RUN_ID": "1"}), *others):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_text_is_the_manifests():
    text = KubernetesLauncher(H100).plan(GANG, JobFolder("/data/roma/jobs/x"), 3).text

    assert list(yaml.safe_load_all(text)) == manifests(GANG, H100, "/data/roma/jobs/x", 3)


def test_a_plan_takes_less_than_ten_milliseconds():
    launcher = KubernetesLauncher(H100)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        launcher.plan(GANG)
        times.append(time.perf_counter() - start)
    assert min(times) < within(0.010)


def test_nothing_of_a_command_is_expanded():
    (container,) = manifests(GANG, H100, "/x", 1)[0]["spec"]["template"]["spec"]["containers"]

    # halved by Kubernetes, and once more by torchrun
    assert container["command"][-1] == "$$$$(a 'strange' folder)"
    assert "--node-rank=$(JOB_COMPLETION_INDEX)" in container["command"]


def test_host_names_have_room():
    """63 characters, the index and the longest attempt's number included."""
    spec = PRETRAINING.model_copy(update={"key": "f" * 64, "nodes": 1000})
    job, service = manifests(spec, GENERIC, "/x", 999)

    assert len(f"{job['metadata']['name']}-999") <= 63
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert all(len(v) <= 63 for v in job["metadata"]["labels"].values())


def test_a_profile_may_ask_for_less_than_a_cpu_for_each_thread():
    profile = GENERIC.model_copy(update={"cpus_per_process": 0.25})
    (job,) = manifests(PRETRAINING, profile, "/x", 1)

    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == "500m"


def test_two_attempts_differ_in_nothing_but_their_number():
    first, second = (
        KubernetesLauncher(H100).plan(GANG, attempt=n).text.splitlines() for n in (1, 2)
    )

    changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert all(a.replace("1", "2") == b.replace("1", "2") for a, b in changed)


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ("namespace: Not A Name", "namespace"),
        ("image: 'x; rm -rf /'", "image"),
        ("volumes: [{ mount: /data }]", "exactly one of claim, host_path and nfs"),
        ("volumes: [{ mount: /data, claim: a, nfs: 'b:/c' }]", "it has claim, nfs"),
        ("gpu_nodeselector: {}", "gpu_nodeselector"),
        ("[]", "setting: value"),
        ("port: 80", "port"),
    ],
)
def test_a_wrong_profile_names_file_and_field(tmp_path, document, word):
    (tmp_path / "mine.yaml").write_text(document)

    with pytest.raises(ValueError, match=r"mine\.yaml") as caught:
        KubernetesProfile.load("mine", KubernetesSettings(profiles=tmp_path))

    assert word in str(caught.value)


def test_an_unknown_profile_names_those_there_are():
    with pytest.raises(ValueError, match="there are generic, h100"):
        KubernetesProfile.load("nowhere", KubernetesSettings())


def test_settings_lie_over_the_profile(monkeypatch):
    monkeypatch.setenv("ROMA_KUBERNETES_NAMESPACE", "mine")
    monkeypatch.setenv("ROMA_KUBERNETES_IMAGE", "registry.example.org/roma@sha256:0123")

    profile = KubernetesProfile.load("h100")

    assert (profile.namespace, profile.image) == ("mine", "registry.example.org/roma@sha256:0123")
    assert profile.queue == "gpu"


def test_a_plain_job_is_one_process():
    spec = copy.copy(PLAIN).model_copy(update={"nodes": 2})

    with pytest.raises(ValueError, match='runner="plain" runs one process'):
        KubernetesLauncher(GENERIC).plan(spec)
