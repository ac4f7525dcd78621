"""An experiment in the pods of a cluster, through Dagster: files to a registered model.

The API server is the tests' own and the pods are processes of this computer; the trainings in them
are real, two pods of two processes each. The experiment's file is the one that runs on this
computer; only the target's name differs.
"""

import socket
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

import roma_core
from roma_core.files import read_json
from tests.pipelines import tiny
from tests.pipelines.launching.kubernetes.fake_api import FakeApi
from tests.pipelines.launching.kubernetes.fake_cluster import FakeCluster

pytestmark = pytest.mark.slow
SIZE = {"nodes": 2, "processes_per_node": 2, "gpus_per_node": 1, "memory_gb": 4}


def profile(folder, api):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "kubeconfig": str(api.write_kubeconfig(folder / "kubeconfig")),
        "image": "localhost/python:3.11",
        "python": sys.executable,
        "volumes": [{"mount": str(folder), "host_path": str(folder)}],
        "environment": {
            "PYTHONPATH": str(Path(roma_core.__file__).parents[1]),
            "GLOO_SOCKET_IFNAME": "lo",
        },
        "port": port,
        "grace_s": 5,
        "price_per_gpu_hour": 3600,
    }


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return tmp_path_factory.mktemp("house")


@pytest.fixture(scope="module")
def api():
    api = FakeApi()
    cluster = FakeCluster(api)
    yield api
    cluster.close()
    api.close()


@pytest.fixture(scope="module")
def made(api, house):
    """The run, and the instance that knows it."""
    (house / "fake.yaml").write_text(yaml.safe_dump(profile(house, api)))
    (house / "dagster").mkdir()
    variables = {
        "ROMA_STORAGE_ROOT": str(house / "roma"),
        "ROMA_ENV_FILE": "/dev/null",
        "ROMA_KUBERNETES_PROFILES": str(house),
        "ROMA_KUBERNETES_PROFILE": "fake",
    }
    sections = tiny.attributes(house, resources={"target": "kubernetes", **SIZE})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
        with dg.DagsterInstance.local_temp(str(house / "dagster")) as instance:
            result = job.execute_in_process(instance=instance, raise_on_error=False)
            yield result, instance
    assert tiny.living_jobs(house) == []


def facts_of(result, noun):
    (event,) = result.asset_materializations_for_node(f"waves__{noun}")
    return {name: value.value for name, value in event.metadata.items()}


def test_files_become_a_registered_model(made):
    result, _ = made

    errors = [e.step_failure_data.error.message for e in result.all_events if e.is_step_failure]
    assert result.success, errors
    assert facts_of(result, "registered_classifier")["aliases"] == "champion, candidate"


@pytest.mark.parametrize("noun", ["pretrained_encoder", "finetuned_classifier"])
def test_four_processes_in_two_pods_trained_together(made, noun):
    facts = facts_of(made[0], noun)

    assert (facts["processes"], facts["attempts"], facts["nodes"]) == ("4", 1, "n1, n2")
    assert "4 process(es)" in Path(facts["log"]).read_text()
    assert facts["gpu_hours"] == pytest.approx(facts["ran_s"] * 2 / 3600, abs=1e-3)


def test_every_job_was_one_of_the_clusters(made, api):
    there = {job["metadata"]["name"]: job for job in api.store.all("jobs", "roma")}

    for noun in tiny.ASSET_NAMES[1:4]:
        folder = Path(facts_of(made[0], noun)["job_folder"])
        record = read_json(folder / "attempts" / "1.json")
        job = there[f"roma-{folder.name[:12]}-1"]
        assert job["metadata"]["uid"] == record["external"]["uid"]
        assert job["status"]["conditions"][-1]["type"] == "Complete"


def test_progress_was_observed_while_it_trained(made):
    key = dg.AssetKey(["waves", "pretrained_encoder"])
    records = made[1].fetch_observations(key, limit=50).records

    assert any("train/loss" in record.asset_observation.metadata for record in records)
