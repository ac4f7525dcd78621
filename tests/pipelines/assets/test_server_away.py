"""A whole experiment whose MLflow server goes and comes: trainings do not need it, registration waits."""

from urllib.parse import urlsplit

import dagster as dg
import pytest

from roma_core.job import JobFolder
from roma_pipelines import tracked_job
from roma_pipelines.assets import evaluation_report
from roma_pipelines.automation.alerts import message_of, root_cause
from roma_pipelines.registry import runs as runs_module
from roma_pipelines.registry import versions
from roma_pipelines.registry.gate import GATE_TAG
from roma_pipelines.registry.runs import is_pending, send_pending
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage, prepare_instance
from tests.pipelines import tiny
from tests.pipelines.mlflow_gate import Gate
from tests.pipelines.registry.conftest import mlflow_server

__all__ = ["mlflow_server"]
pytestmark = pytest.mark.chaos


@pytest.fixture
def gate(mlflow_server):
    gate = Gate(urlsplit(mlflow_server).port)
    yield gate
    gate.close()


@pytest.fixture
def storage(gate, tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "roma"))
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", gate.address)
    monkeypatch.setattr(tracked_job, "_SERVER_RETRY_S", 0.1)
    storage = Storage.open()
    prepare_instance(storage)
    return storage


@pytest.fixture
def before(monkeypatch):
    """Does something before the calls of a function that have these numbers."""

    def before(owner, name, numbers, act):
        real, calls = getattr(owner, name), []

        def call(*arguments, **options):
            calls.append(name)
            if len(calls) in numbers:
                act()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    return before


def test_an_experiment_whose_server_goes_and_comes(gate, storage, before, tmp_path, monkeypatch):
    def dies():
        gate.become("dead")

    def comes_back():
        gate.become("open")

    before(runs_module, "find_or_create_run", [1], dies)  # both trainings are without it
    # asked by every try of a step: the second of the evaluation, second and third of the registration
    before(tracked_job, "answers", [2, 4, 5], comes_back)
    before(evaluation_report, "decide", [1], dies)
    before(versions, "create_version", [1], dies)
    job = tiny.definitions(tiny.attributes(tmp_path)).resolve_implicit_global_asset_job_def()
    registered = [dg.AssetKey(["waves", "registered_classifier"])]

    with dg.DagsterInstance.get() as instance:
        result = job.execute_in_process(instance=instance, raise_on_error=False)
        assert result.success
        logs = [e.user_message for e in instance.all_logs(result.run_id) if e.level == 30]

        gate.become("dead")
        monkeypatch.setattr(tracked_job, "_SERVER_RETRIES", 1)
        without = job.execute_in_process(
            instance=instance, asset_selection=registered, raise_on_error=False
        )
        gate.become("open")
        again = job.execute_in_process(instance=instance, asset_selection=registered)

    waited = [e.step_key for e in result.all_events if e.is_step_up_for_retry]
    assert waited == ["waves__evaluation_report", *["waves__registered_classifier"] * 2]
    assert sum("the job continues. What MLflow lacks" in line for line in logs) == 5
    (failure,) = [e.step_failure_data for e in without.all_events if e.is_step_failure]
    sentence = message_of(root_cause(failure.error))
    assert sentence.startswith(
        f"the MLflow server {gate.address} does not answer (no answer), and "
    )
    assert "\n" not in sentence and sentence == failure.user_failure_data.description

    client = connect(MlflowSettings(), storage.mlflow)
    experiment = client.get_experiment_by_name("roma/waves")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
    assert [run.info.run_name.split()[0] for run in runs] == list(tiny.ASSET_NAMES[1:4])
    assert {run.info.status for run in runs} == {"FINISHED"}
    _, finetuning, evaluation = runs
    assert evaluation.data.tags[GATE_TAG] == "passed"
    assert evaluation.data.metrics["test/accuracy"] > 0.5
    files = {file.path for file in client.list_artifacts(evaluation.info.run_id)}
    assert {"report.html", "gate.json", "plots", "config.json", "result.json"} <= files
    (version,) = client.search_model_versions("name = 'waves'")
    assert version.run_id == finetuning.info.run_id
    assert client.get_model_version_by_alias("waves", "champion").version == version.version
    (made,) = again.asset_materializations_for_node("waves__registered_classifier")
    assert made.metadata["version"].value == version.version
    assert send_pending(storage) == ([], [])
    assert not any(map(is_pending, map(JobFolder, storage.jobs.iterdir())))
