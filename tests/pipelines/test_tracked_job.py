"""The MLflow run of a job is made beside it: what an MLflow that is away means for the job."""

import threading
import time
import types

import dagster as dg
import pytest
from click.testing import CliRunner
from filelock import FileLock

from roma_core.job import JobFolder
from roma_pipelines.cli import main
from roma_pipelines.launching.spec import JobSpec
from roma_pipelines.registry import runs, store
from roma_pipelines.registry.runs import (
    JobRun,
    RunRecord,
    is_pending,
    known_run,
    read_record,
    send_pending,
    write_record,
)
from roma_pipelines.registry.store import MlflowSettings
from roma_pipelines.storage import Storage
from roma_pipelines.tracked_job import page_links, registry


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

    monkeypatch.setattr(store, "connect", connect)
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


@pytest.fixture
def embedded(storage, store_template, monkeypatch):
    """The storage of the commands and steps, with its own store."""
    (storage.mlflow / "mlflow.db").write_bytes(store_template.read_bytes())
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(storage.root))
    return storage


def test_a_record_that_another_process_sends_is_waited_for(embedded, folder, run, monkeypatch):
    write_record(folder, run.record)
    monkeypatch.setattr(runs, "SHORT_S", 0.1)

    def send(seconds):
        """Another process that sends the record for so long."""
        held = threading.Event()

        def hold():
            with FileLock(folder.path / ".mlflow.lock"):
                held.set()
                time.sleep(seconds)

        threading.Thread(target=hold).start()
        held.wait()

    send(3.0)
    assert send_pending(embedded) == ([], [])  # the sensor passes over it

    @dg.asset
    def registered(context: dg.AssetExecutionContext):
        with registry(context, {"job_folder": str(folder.path), "mlflow_run_id": "x"}):
            assert known_run(folder)["run_id"]

    assert dg.materialize([registered]).success
    assert not is_pending(folder)

    write_record(folder, run.record.model_copy(update={"status": "FINISHED"}))
    send(1.0)
    done = CliRunner().invoke(main, ["jobs", "sync"])
    assert (done.exit_code, done.output) == (0, "MLflow received what it lacked of 1 jobs\n")


def test_two_processes_that_change_a_record_lose_nothing(folder, run, monkeypatch):
    run.warn = pytest.fail
    monkeypatch.setattr(runs, "is_pending", lambda _: False)
    write_record(folder, run.record)
    reading = threading.Event()

    def slow(record):
        reading.set()
        time.sleep(0.5)
        return record.model_copy(update={"results": {"test/accuracy": 0.9}})

    one = threading.Thread(target=run.update, args=[slow])
    one.start()
    reading.wait()
    run.update(lambda record: record.model_copy(update={"status": "FINISHED"}))
    one.join()

    record = read_record(folder)
    assert (record.status, record.results) == ("FINISHED", {"test/accuracy": 0.9})


def test_a_record_that_is_refused_is_tried_less_often_and_can_be_dropped(
    embedded, folder, run, monkeypatch
):
    asked = []

    def refuses(*_):
        asked.append(1)
        raise RuntimeError("the MLflow experiment was deleted")

    monkeypatch.setattr(runs, "log_run", refuses)
    write_record(folder, run.record)
    (line,) = send_pending(embedded)[1]
    assert line.endswith(
        f"deleted; `roma-pipeline jobs sync --drop {folder.path.name}` gives it up"
    )
    now = time.monotonic()
    for tick in range(1, 21):
        clock = types.SimpleNamespace(time=time.time, monotonic=lambda at=now + 30 * tick: at)
        monkeypatch.setattr(runs, "time", clock)
        send_pending(embedded)
    assert len(asked) == 4  # at once, and after 1, 3 and 7 minutes
    assert CliRunner().invoke(main, ["jobs", "sync"]).exit_code == 1  # asked for: at once

    folder.spec.write_text(
        JobSpec(key=folder.path.name, command=("x",), config_digest="x").model_dump_json()
    )
    done = CliRunner().invoke(main, ["jobs", "sync", "--drop", folder.path.name])
    assert (done.exit_code, is_pending(folder)) == (0, False), done.output
    assert send_pending(embedded) == ([], [])


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
