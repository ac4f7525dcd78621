"""What becomes of a job whose watcher died, by the state of the Dagster run that began it."""

import json
import os
import shutil
import threading
import time
import uuid

import dagster as dg
import pytest

from roma_core.files import read_json, write_json
from roma_core.job import JobFolder
from roma_pipelines.automation import sensors
from roma_pipelines.automation.sensors import action_for, reconcile
from roma_pipelines.launching.jobs import SettledJobs, cancel, read_job
from roma_pipelines.launching.launcher import Unreachable
from roma_pipelines.launching.supervisor import supervise
from tests.time_limits import within

CONFIG = {"base_lr": 0.001}
STATUS = dg.DagsterRunStatus


@pytest.fixture(autouse=True)
def time_to_cancel(monkeypatch):
    monkeypatch.setattr(sensors, "_CANCEL_WITHIN_S", within(30))
    monkeypatch.setattr(sensors, "_REPORT_WITHIN_S", within(15))


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def add_run(instance):
    def add_run(status, parent=None, **tags):
        tags = {name.replace("__", "/"): value for name, value in tags.items()}
        if parent:
            tags |= {"dagster/parent_run_id": parent, "dagster/root_run_id": parent}
        run = dg.DagsterRun("job", str(uuid.uuid4()), status=status, tags=tags)
        return instance.add_run(run).run_id

    return add_run


@pytest.fixture
def abandon(launcher, folder, make_spec, processes, eventually):
    """A running job that ``run_id`` watched, whose watcher is dead (or lives)."""

    class Gone(BaseException):
        pass

    def abandon(run_id, alive=False):
        def leave(state):
            if (folder.path / "starts").exists():
                raise Gone

        watcher = {"dagster_run_id": run_id} if run_id else {}
        spec = make_spec("wait_for('go', 60)\nsucceed()")
        with pytest.raises(Gone):
            supervise(
                launcher, folder, spec, CONFIG, on_poll=leave, holder=watcher, poll_every_s=0.02
            )
        if not alive:
            document = json.loads(folder.lease.read_text())
            folder.lease.write_text(json.dumps(document | {"start": "long ago"}))
        return read_job(folder.path)

    yield abandon
    (folder.path / "go").touch()
    eventually(lambda: not processes())


@pytest.mark.parametrize(
    ("status", "alive", "action"),
    [
        (STATUS.STARTED, True, "none"),
        (STATUS.STARTED, False, "fail the run"),
        (STATUS.STARTING, False, "fail the run"),
        (STATUS.NOT_STARTED, False, "none"),
        (STATUS.CANCELING, True, "none"),  # its worker is at it
        (STATUS.CANCELING, False, "cancel the job"),
        (STATUS.CANCELED, False, "cancel the job"),
        (STATUS.FAILURE, False, "cancel the job"),
        (STATUS.SUCCESS, False, "cancel the job"),
    ],
)
def test_action_by_the_status_of_the_run(instance, add_run, abandon, status, alive, action):
    job = abandon(add_run(status), alive)

    assert action_for(job, instance)[0] == action


def test_a_job_that_no_run_began_is_left_alone(instance, abandon):
    assert action_for(abandon(None), instance)[0] == "none"


def test_a_job_whose_run_was_deleted_is_not_wanted(instance, abandon):
    assert action_for(abandon("no-such-run"), instance)[0] == "cancel the job"


def test_a_failed_run_that_is_retried_keeps_its_job(instance, add_run, abandon):
    will = add_run(STATUS.FAILURE, dagster__will_retry="true")
    job = abandon(will)
    assert action_for(job, instance)[0] == "none"

    retry = add_run(STATUS.FAILURE, parent=will)
    assert action_for(job, instance)[0] == "cancel the job"
    add_run(STATUS.NOT_STARTED, parent=retry)
    assert action_for(job, instance)[0] == "none"


def test_a_run_whose_worker_died_is_failed_and_its_job_goes_on(
    instance, add_run, abandon, folder, processes
):
    run_id = add_run(STATUS.STARTED)
    abandon(run_id)

    (done,) = reconcile(folder.path.parent, instance, lambda record: None)

    assert done.endswith("fail the run")
    assert instance.get_run_by_id(run_id).status is STATUS.FAILURE
    assert processes() != []


def test_a_job_nobody_wants_is_cancelled_once(
    instance, add_run, abandon, folder, launcher, processes
):
    abandon(add_run(STATUS.CANCELED))

    (done,) = reconcile(folder.path.parent, instance, lambda record: launcher)

    assert done.startswith(f"job {folder.path.name}: ") and done.endswith("cancel the job")
    assert processes() == []
    assert reconcile(folder.path.parent, instance, lambda record: launcher) == []


def test_a_job_that_cannot_be_cancelled_is_tried_again(instance, add_run, abandon, folder):
    abandon(add_run(STATUS.CANCELED))

    def no_launcher(record):
        raise ValueError("there is no SLURM profile 'gone'")

    (done,) = reconcile(folder.path.parent, instance, no_launcher)

    assert "cancelling failed: there is no SLURM profile 'gone'" in done
    assert read_job(folder.path).open_attempt is not None


def test_a_cluster_that_does_not_answer_delays_neither_the_tick_nor_other_jobs(
    instance, add_run, abandon, folder, launcher, processes, monkeypatch
):
    """Its job is cancelled by one thread, whatever the number of ticks, and reported at the end."""
    abandon(add_run(STATUS.CANCELED))
    answers, asked = threading.Event(), []
    away = JobFolder(folder.path.with_name("f" * 20))
    shutil.copytree(folder.path, away.path)
    spec = read_json(away.spec) | {"key": "f" * 20}
    write_json(away.spec, spec)

    def launcher_of(record):
        return launcher

    def cancelling(job, by, launcher_of_attempt, wait_s):
        if job.key == "f" * 20:
            asked.append(job.key)
            answers.wait(within(60))
            raise Unreachable("ssh: no route to host")
        return cancel(job, by, launcher_of_attempt, wait_s)

    monkeypatch.setattr(sensors, "cancel", cancelling)
    monkeypatch.setattr(sensors, "_REPORT_WITHIN_S", within(1))
    try:
        began = time.monotonic()
        first = reconcile(folder.path.parent, instance, launcher_of)
        second = reconcile(folder.path.parent, instance, launcher_of)
        assert time.monotonic() - began < within(10)
        assert sum("cancel the job" in line for line in first) == 1 and processes() == []
        assert f"job {'f' * 20}: still being cancelled" in first
        assert second == [f"job {'f' * 20}: still being cancelled"]
        assert asked == ["f" * 20]
    finally:
        answers.set()
    third = reconcile(folder.path.parent, instance, launcher_of)
    assert any("cancelling failed: ssh: no route to host" in line for line in third)


def test_the_sensor_looks_at_the_configured_storage(
    instance, add_run, abandon, folder, processes, monkeypatch, tmp_path, store_root
):
    from roma_pipelines.automation.sensors import reconcile_jobs
    from roma_pipelines.registry.runs import RunRecord, known_run, send_record, write_record
    from roma_pipelines.registry.store import MlflowSettings, connect

    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path))
    (tmp_path / "mlflow").mkdir()
    (store_root / "mlflow.db").rename(tmp_path / "mlflow" / "mlflow.db")
    client = connect(MlflowSettings(), tmp_path / "mlflow")
    abandon(add_run(STATUS.CANCELED))
    write_record(folder, RunRecord(experiment="roma/waves", name="x", tags={}, params={}))
    send_record(client, folder)

    with dg.build_sensor_context(instance=instance) as context:
        skipped = reconcile_jobs(context)

    assert "cancel the job" in skipped.skip_message
    assert processes() == []
    assert client.get_run(known_run(folder)["run_id"]).info.status == "KILLED"


def test_a_job_that_ended_is_read_again_once_its_files_change(tmp_path):
    settled, job = SettledJobs(), tmp_path / "job"
    job.mkdir()
    os.utime(job, (time.time() - 3600, time.time() - 3600))
    assert settled.others(tmp_path) == [job]
    settled.add(job)
    assert settled.others(tmp_path) == []
    write_json(job / "lease.json", {})
    for _ in range(2):
        assert settled.others(tmp_path) == [job]
        settled.add(job)  # so new that its attempts may still change
