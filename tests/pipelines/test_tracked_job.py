"""The MLflow run of a job is made beside it: what an MLflow that is away means for the job."""

import pytest

from roma_core.job import JobFolder
from roma_pipelines.registry import runs
from roma_pipelines.registry.runs import JobRun, RunRecord, is_pending, read_record
from roma_pipelines.registry.store import MlflowSettings
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import page_links


@pytest.fixture
def storage(tmp_path):
    return Storage.open(tmp_path)


@pytest.fixture
def folder(storage):
    folder = JobFolder(storage.jobs / ("ab" * 10))
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def run(storage, folder, warnings):
    record = RunRecord(experiment="roma/waves", name="a run", tags={}, params={})
    return JobRun(storage, folder, record, MlflowSettings(), warnings.append)


def test_what_cannot_be_sent_is_recorded_and_said(run, folder, warnings, monkeypatch):
    def connect(settings, root):
        raise ConnectionError("no server answers")

    monkeypatch.setattr(runs, "connect", connect)
    run.update(lambda record: record)

    assert read_record(folder) == run.record
    assert is_pending(folder)
    (warning,) = warnings
    assert warning.startswith("MLflow: no server answers; the job continues.")
    assert "`roma-pipeline jobs sync`" in warning


def test_a_record_that_cannot_be_written_ends_no_job(run, warnings, monkeypatch):
    def write_record(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "write_record", write_record)
    run.update(lambda record: record)
    run.end()

    assert [warning.partition(";")[0] for warning in warnings] == [
        "MLflow: [Errno 28] No space left on device"
    ] * 2


@pytest.mark.parametrize(
    ("uri", "target", "told"),
    [
        (None, "local", True),
        (None, "slurm", False),  # one SQLite file, which two computers must not share
        ("https://mlflow.example.org", "slurm", True),
    ],
)
def test_who_is_told_of_the_run(run, folder, uri, target, told):
    run.settings = run.settings.model_copy(update={"tracking_uri": uri})

    variables = run.environment(target)

    assert bool(variables) == told
    if told:
        assert variables["ROMA_JOB_MLFLOW_RUN"] == str(folder.mlflow_run)
        assert variables["MLFLOW_TRACKING_URI"].startswith(uri or "sqlite:////")


RUN = {"experiment_id": "1", "run_id": "r"}
EMBEDDED = "sqlite:////x/mlflow.db"


def links(has_report=True, run=RUN, uri=EMBEDDED):
    return {name: link.value for name, link in page_links("k", has_report, run, uri).items()}


def test_an_asset_links_to_the_pages_that_exist(monkeypatch):
    assert links() == {}
    assert links(uri="http://me:secret@mlflow.example:5000/") == {
        "open_mlflow_run": "http://mlflow.example:5000/#/experiments/1/runs/r"
    }

    monkeypatch.setenv("ROMA_PAGE_OVERVIEW_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("ROMA_PAGE_MLFLOW_URL", "http://127.0.0.1:5000")

    assert links()["open_report"] == "http://127.0.0.1:8000/jobs/k/report"
    assert "127.0.0.1:5000/#/experiments/1/runs/r" in links()["open_mlflow_run"]
    assert set(links(has_report=False, run={})) == {"open_log"}  # MLflow has not received it
