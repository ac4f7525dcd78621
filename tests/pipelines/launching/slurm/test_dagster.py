"""An experiment on a real SLURM of two nodes, through Dagster: files to a registered model.

The file is the one that runs on this computer; only the target's name differs.
"""

import re
from pathlib import Path

import dagster as dg
import pytest

from roma_core.files import read_json
from roma_core.trainer.metrics import read_records
from tests.pipelines import tiny

pytestmark = pytest.mark.slow
SIZE = {"nodes": 2, "processes_per_node": 2, "gpus_per_node": 1, "memory_gb": 4}
PROFILE = """
poll_s: 0.3
slowest_poll_s: 1
time_limit_min: 10
environment: { GLOO_SOCKET_IFNAME: lo }
price_per_gpu_hour: 3600
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    return tmp_path_factory.mktemp("house")


@pytest.fixture(scope="module")
def made(shared_cluster, house):
    """The run, and the instance that knows it."""
    folder = house
    (folder / "mini.yaml").write_text(PROFILE)
    (folder / "dagster").mkdir()
    variables = {
        "ROMA_STORAGE_ROOT": str(folder / "roma"),
        "ROMA_ENV_FILE": "/dev/null",
        "ROMA_SLURM_PROFILES": str(folder),
        "ROMA_SLURM_PROFILE": "mini",
        **shared_cluster.variables,
    }
    sections = tiny.attributes(folder, resources={"target": "slurm", **SIZE})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
        with dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance:
            result = job.execute_in_process(instance=instance, raise_on_error=False)
            yield result, instance
    shared_cluster.settle()
    assert tiny.living_jobs(folder) == []


@pytest.fixture(scope="module")
def refused(made, house):
    """The same experiment, asking for more than any node has."""
    sizes = {**SIZE, "gpus_per_node": 9, "memory_gb": 900}
    sections = tiny.attributes(house, resources={"target": "slurm", **sizes})
    job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
    encoder = dg.AssetKey(["waves", "pretrained_encoder"])
    return job.execute_in_process(instance=made[1], asset_selection=[encoder], raise_on_error=False)


def facts_of(result, noun):
    (event,) = result.asset_materializations_for_node(f"waves__{noun}")
    return {name: value.value for name, value in event.metadata.items()}


def test_files_become_a_registered_model(made):
    result, _ = made

    errors = [e.step_failure_data.error.message for e in result.all_events if e.is_step_failure]
    assert result.success, errors
    assert facts_of(result, "registered_classifier")["aliases"] == "champion, candidate"


@pytest.mark.parametrize("noun", ["pretrained_encoder", "finetuned_classifier"])
def test_four_processes_on_two_nodes_trained_together(made, noun):
    facts = facts_of(made[0], noun)

    assert (facts["processes"], facts["attempts"], facts["nodes"]) == ("4", 1, "n[1-2]")
    assert "4 process(es)" in Path(facts["log"]).read_text()
    assert 0 < facts["efficiency"] <= 1
    assert facts["gpu_hours"] == pytest.approx(facts["ran_s"] * 2 / 3600, abs=1e-4)
    assert re.fullmatch(r"\d+\.\d\d EUR", facts["cost"])


def test_every_job_was_one_of_the_clusters(made, shared_cluster):
    jobs = {name: (job, state) for job, name, state in shared_cluster.jobs()}

    for noun in tiny.ASSET_NAMES[1:4]:
        folder = Path(facts_of(made[0], noun)["job_folder"])
        record = read_json(folder / "attempts" / "1.json")
        name = f"roma-{folder.name[:12]}-1"
        assert jobs[name] == (record["external"]["job_id"], "COMPLETED")


@pytest.mark.parametrize("noun", ["pretrained_encoder", "finetuned_classifier"])
def test_the_whole_curve_comes_home_to_a_store_that_no_node_touches(made, noun):
    """The embedded store: no node is told of it, and nothing is missing or doubled all the same."""
    from roma_pipelines.registry.store import MlflowSettings, connect

    facts = facts_of(made[0], noun)
    folder = Path(facts["job_folder"])
    client = connect(MlflowSettings(), folder.parents[1] / "mlflow")
    written = {}
    for _, record in read_records(folder / "metrics.jsonl"):
        for name, value in record["metrics"].items():
            written.setdefault(name, []).append((record["step"], pytest.approx(value)))

    assert "mlflow.db" not in (folder / "attempts" / "1" / "script").read_text()
    assert {"train/loss", "train/lr"} <= set(written)
    for name, points in written.items():
        history = client.get_metric_history(facts["mlflow_run_id"], name)
        assert [(point.step, point.value) for point in history] == points, name
    assert client.get_run(facts["mlflow_run_id"]).info.status == "FINISHED"


def test_attempts_and_events_are_tables_on_the_asset(made):
    facts = facts_of(made[0], "pretrained_encoder")

    head, rule, row = facts["attempts_made"].splitlines()
    assert head.startswith("| attempt | target | submitted | ran | nodes | end | reason |")
    assert rule == "|" + " --- |" * 7
    assert "slurm (job\\_id " in row and "completed" in row and "n\\[1-2\\]" in row
    events = facts["events"].splitlines()
    assert events[0] == "| time | attempt | observed | action |"
    assert any("submitted as" in line for line in events)
    assert events[-1].endswith("| completed |")


def test_progress_was_observed_while_it_trained(made):
    key = dg.AssetKey(["waves", "pretrained_encoder"])
    records = made[1].fetch_observations(key, limit=50).records
    seen = [record.asset_observation.metadata for record in records]

    assert any("train/loss" in metadata for metadata in seen)


def test_what_no_node_has_is_refused_on_the_asset_with_every_reason(refused, house):
    from roma_pipelines.registry.store import MlflowSettings, connect

    (failure,) = [e for e in refused.all_events if e.is_step_failure]
    message = failure.step_failure_data.error.message
    assert "9 GPUs a node are asked for" in message
    assert "900 GB a node are asked for" in message
    client = connect(MlflowSettings(), house / "roma" / "mlflow")
    experiment = client.get_experiment_by_name("roma/waves")
    runs = client.search_runs([experiment.experiment_id])
    (run,) = [r for r in runs if r.data.tags["roma.dagster_run_id"] == refused.run_id]
    assert run.info.status == "FAILED"
