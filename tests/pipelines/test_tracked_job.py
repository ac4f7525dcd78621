"""The MLflow run of a job is made beside it: what an MLflow that is away means for the job."""

import logging
from types import SimpleNamespace

import dagster as dg
import pytest

from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_pipelines import tracked_job
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import _MlflowRun, job_links, mlflow_link


@pytest.fixture
def storage(tmp_path):
    return Storage.open(tmp_path)


@pytest.fixture
def folder(storage):
    folder = JobFolder(storage.jobs / ("ab" * 10))
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def shown(storage, folder):
    key = dg.AssetKey(["waves", "pretrained_encoder"])
    context = SimpleNamespace(asset_key=key, run_id="0" * 36, log=logging.getLogger("asset"))
    return _MlflowRun(context, storage, folder, "waves", {}, {})


@pytest.fixture
def away(monkeypatch):
    def connect(settings, root):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(tracked_job, "connect", connect)


def test_without_mlflow_no_training_begins(shown, away):
    with pytest.raises(ConnectionError, match="nobody answers"):
        shown.begin()


def test_a_training_that_is_taken_up_again_does_not_need_it_yet(shown, away, folder, caplog):
    write_json(folder.mlflow_run, {"schema_version": 1, "run_id": "a"})

    shown.begin()

    assert (
        f"nobody answers; the job continues; its metrics are kept in {folder.metrics}"
        in caplog.text
    )
    with pytest.raises(ConnectionError):  # at the outcome it does
        shown.end("FINISHED")


@pytest.mark.parametrize(
    ("uri", "target", "told"),
    [
        (None, "local", True),
        (None, "slurm", False),  # one SQLite file, which two computers must not share
        ("https://mlflow.example.org", "slurm", True),
    ],
)
def test_who_is_told_of_the_run(shown, folder, monkeypatch, uri, target, told):
    shown.settings = shown.settings.model_copy(update={"tracking_uri": uri})

    variables = shown.environment(target)

    assert bool(variables) == told
    if told:
        assert variables["ROMA_JOB_MLFLOW_RUN"] == str(folder.mlflow_run)
        assert variables["MLFLOW_TRACKING_URI"].startswith(uri or "sqlite:////")


def test_an_asset_links_to_the_pages_that_exist(monkeypatch):
    assert job_links("k", has_report=True) == {}
    assert mlflow_link("1", "r", "sqlite:////x/mlflow.db") == {}
    server = mlflow_link("1", "r", "http://me:secret@mlflow.example:5000/")["open_mlflow_run"].value
    assert server == "http://mlflow.example:5000/#/experiments/1/runs/r"

    monkeypatch.setenv("ROMA_PAGE_OVERVIEW_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("ROMA_PAGE_MLFLOW_URL", "http://127.0.0.1:5000")

    assert (
        job_links("k", has_report=True)["open_report"].value
        == "http://127.0.0.1:8000/jobs/k/report"
    )
    assert set(job_links("k", has_report=False)) == {"open_log"}
    assert "127.0.0.1:5000/#/experiments/1/runs/r" in str(
        mlflow_link("1", "r", "sqlite:////x/mlflow.db")["open_mlflow_run"].value
    )
