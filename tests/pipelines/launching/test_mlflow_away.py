"""An MLflow server that dies or hangs while a job runs: nothing is lost, doubled, or failed by it.

Real servers, real jobs on every backend; a script of a few lines stands in for the training.
"""

import functools
import json
import os
import shutil
import signal
import time
from urllib.parse import urlsplit

import dagster as dg
import psutil
import pytest
from click.testing import CliRunner
from pydantic import BaseModel

from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_pipelines import tracked_job
from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.cli import main
from roma_pipelines.experiment import Experiment
from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.registry import runs
from roma_pipelines.registry.runs import (
    JOB_KEY_TAG,
    RunRecord,
    is_pending,
    known_run,
    send_pending,
    write_record,
)
from roma_pipelines.registry.store import MlflowSettings, connect
from roma_pipelines.storage import Storage
from tests.pipelines import tiny
from tests.pipelines.launching.fake import client_of
from tests.pipelines.launching.kubernetes.conftest import (
    api,
    free_port,
    quick,
)
from tests.pipelines.launching.kubernetes.conftest import (
    cluster as pods,
)
from tests.pipelines.launching.kubernetes.conftest import (
    profile as kubernetes_profile,
)
from tests.pipelines.mlflow_gate import Gate
from tests.pipelines.registry.conftest import mlflow_server, tracking_server
from tests.time_limits import wait_until, within

__all__ = ["api", "free_port", "kubernetes_profile", "mlflow_server", "pods", "quick"]

LOSSES = (0.9, 0.5, 0.25)
TRAINING = f"""
with (folder / "metrics.jsonl").open("w") as file:
    for step, loss in enumerate({LOSSES}, 1):
        record = dict(step=step, epoch=0, time=time.time(), metrics={{"train/loss": loss}})
        file.write(json.dumps(record) + "\\n")
"""
TRAINED = TRAINING + "succeed()\n"
DIVERGED = TRAINING + 'leave("failed", "the loss is nan at step 3")\nsys.exit(1)\n'
MOMENTS = {  # which call of which function finds the server away, and how the job ends
    "first poll": ("find_or_create_run", 1, TRAINED),
    "find run": ("find_or_create_run", 2, TRAINED),
    "forward metrics": ("forward_to_mlflow", 1, TRAINED),
    "log artifacts": ("log_artifact", 1, TRAINED),
    "end run": ("set_terminated", 1, TRAINED),
    "job failure": ("find_or_create_run", 2, DIVERGED),
}


class ServerProcess:
    """A server that is really killed, and started again on its port and database."""

    def __init__(self, folder):
        self.folder, self.port = folder, 0
        self._start()

    def _start(self):
        self._served = tracking_server(self.folder, self.port)
        self.address = self._served.__enter__()
        self.port = urlsplit(self.address).port

    def become(self, state):
        if state == "open":
            self._start()
            return
        for one in psutil.net_connections("tcp4"):
            if one.status == psutil.CONN_LISTEN and one.laddr.port == self.port:
                os.killpg(os.getpgid(one.pid), signal.SIGKILL)
                break
        self.close()

    def close(self):
        self._served.__exit__(None, None, None)


@pytest.fixture
def gate(request, store_template, tmp_path):
    if getattr(request, "param", "") == "process":
        shutil.copyfile(store_template, tmp_path / "mlflow.db")
        gate = ServerProcess(tmp_path)
    else:
        gate = Gate(urlsplit(request.getfixturevalue("mlflow_server")).port)
    yield gate
    gate.close()


@pytest.fixture
def storage(tmp_path, monkeypatch, gate):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "roma"))
    monkeypatch.setenv("ROMA_MLFLOW_TRACKING_URI", gate.address)
    monkeypatch.setattr(runs, "SHORT_S", 2)
    return Storage.open()


@pytest.fixture
def launcher_of(request):
    """The launcher of a target; its cluster is started when it is asked for."""

    def launcher_of(target):
        if target == "local":
            return LocalLauncher(grace_s=2.0)
        if target == "slurm":
            return request.getfixturevalue("slurm")
        request.getfixturevalue("pods")
        return KubernetesLauncher(request.getfixturevalue("kubernetes_profile"), fs_lag_s=0.0)

    return launcher_of


@pytest.fixture
def train(storage, launcher_of, make_spec, monkeypatch, tmp_path):
    """Materialises an asset whose job runs the given lines; the result and the folder of the job."""

    class Config(BaseModel):
        base_lr: float = 0.001

    def train(body, target="local"):
        launcher = launcher_of(target)
        monkeypatch.setattr(tracked_job, "roma_command", lambda *_: make_spec(body).command)
        experiment = Experiment.parse(tiny.attributes(tmp_path, resources={"target": target}))

        policy = dg.RetryPolicy(max_retries=1)

        @dg.asset(key=["waves", "encoder"], retry_policy=policy, required_resource_keys={target})
        def encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            job = tracked_job.run_tracked_job(
                context,
                experiment,
                "pretrain",
                Config(),
                experiment.resources.of("pretraining"),
                params={"base_lr": 0.001},
            )
            return dg.MaterializeResult(metadata=job.metadata())

        with dg.DagsterInstance.ephemeral() as instance:
            clients = {target: client_of(launcher)}
            result = dg.materialize(
                [encoder], instance=instance, resources=clients, raise_on_error=False
            )
            logs = instance.all_logs(result.run_id)
        warnings = [e.user_message for e in logs if e.level == 30 and "MLflow" in e.user_message]
        (path,) = storage.jobs.iterdir()
        return result, JobFolder(path), warnings

    return train


@pytest.fixture
def at_call(monkeypatch):
    """Does something before one call of a function that talks to MLflow."""
    from mlflow import MlflowClient

    def at_call(name, number, act):
        owner = next(o for o in (runs, runs.trackers, MlflowClient) if hasattr(o, name))
        real, calls = getattr(owner, name), []

        @functools.wraps(real)
        def call(*arguments, **options):
            calls.append(name)
            if len(calls) == number:
                act()
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    return at_call


def runs_of(storage, folder):
    client = connect(MlflowSettings(), storage.mlflow)
    experiment = client.get_experiment_by_name("roma/waves")
    wanted = f"tags.`{JOB_KEY_TAG}` = '{folder.path.name}'"
    return client, client.search_runs([experiment.experiment_id], wanted)


def check_received(storage, folder, status="FINISHED"):
    """MLflow has the run once, with everything."""
    client, found = runs_of(storage, folder)
    (run,) = found
    assert (run.info.run_id, run.info.status) == (known_run(folder)["run_id"], status)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(LOSSES, 1))
    assert run.data.params == {"base_lr": "0.001"}
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == ({"config.json", "result.json"} if status == "FINISHED" else set())
    # the times of the job, not those of the delivery
    end = json.loads(folder.attempt_record(1).read_text())["end"]["ended_at"]
    assert run.info.end_time == round(end * 1000)
    assert run.info.start_time <= run.info.end_time
    assert not is_pending(folder)


@pytest.mark.parametrize(
    ("target", "state"),
    [
        ("local", "dead"),
        ("local", "hanging"),
        *(
            pytest.param(target, state, marks=pytest.mark.slow)
            for target in ("slurm", "kubernetes")
            for state in ("dead", "hanging")
        ),
    ],
)
@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_lost_doubled_or_failed(train, at_call, gate, storage, target, state, moment):
    name, number, body = MOMENTS[moment]
    at_call(name, number, lambda: gate.become(state))
    started = time.monotonic()

    result, folder, warnings = train(body, target)

    assert time.monotonic() - started < within(30)
    assert len(json.loads(folder.spec.read_text())["command"]) == 1
    assert len(folder.attempt_numbers()) == 1
    reasons = {"dead": ("refused", "reset", "aborted", "500"), "hanging": ("timed out",)}[state]
    assert any(reason in warnings[0] for reason in reasons), warnings
    assert "`roma-pipeline jobs sync`" in warnings[0] and "Max retries" not in warnings[0]
    assert is_pending(folder)
    if body is TRAINED:
        assert result.success
        (event,) = result.get_asset_materialization_events()
        assert event.materialization.metadata["attempts"].value == 1
    else:
        (failure,) = [e.step_failure_data for e in result.all_events if e.is_step_failure]
        assert "the loss is nan at step 3" in failure.user_failure_data.description
        assert not [e for e in result.all_events if e.is_step_up_for_retry]

    gate.become("open")

    assert send_pending(storage) == ([folder.path.name], [])
    check_received(storage, folder, "FINISHED" if body is TRAINED else "FAILED")
    assert send_pending(storage) == ([], [])


@pytest.mark.chaos
@pytest.mark.parametrize("gate", ["process"], indirect=True)
@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_of_a_server_that_is_killed(train, at_call, gate, storage, moment):
    test_nothing_is_lost_doubled_or_failed(train, at_call, gate, storage, "local", "dead", moment)


def test_the_command_and_the_sensor_send_what_is_pending(train, gate, storage, at_call):
    at_call("find_or_create_run", 1, lambda: gate.become("dead"))
    _, folder, _ = train(TRAINED)

    done = CliRunner().invoke(main, ["jobs", "sync"])
    assert done.exit_code == 1
    assert f"job {folder.path.name}: MLflow has not received its run" in done.output
    assert "Traceback" not in done.output
    shown = CliRunner().invoke(main, ["jobs", "show", folder.path.name]).output
    assert "no run yet: FINISHED, pending" in shown
    sentence = f"the MLflow server {gate.address} does not answer ([Errno 111] Connection refused)"
    rolled_back = CliRunner().invoke(main, ["rollback", "waves", "--reason", "x"])
    assert (rolled_back.exit_code, rolled_back.output) == (1, f"Error: {sentence}\n")
    checks = json.loads(CliRunner().invoke(main, ["health", "--json"]).output)
    found = {check["name"]: (check["status"], check["detail"]) for check in checks}
    assert found["MLflow store"] == ("error", sentence)
    assert found["MLflow runs"][0] == "warning" and "lacks 1 runs" in found["MLflow runs"][1]

    gate.become("open")
    with (
        dg.DagsterInstance.ephemeral() as instance,
        dg.build_sensor_context(instance=instance) as context,
    ):
        assert "sent MLflow what it lacked of 1 jobs" in reconcile_jobs(context).skip_message
    check_received(storage, folder)
    done = CliRunner().invoke(main, ["jobs", "sync"])
    assert (done.exit_code, done.output) == (0, "MLflow received what it lacked of 0 jobs\n")


@pytest.mark.parametrize("served", ["before the next request", "before the end", "after the end"])
def test_a_request_that_is_served_late_doubles_no_run(gate, storage, at_call, monkeypatch, served):
    folder = JobFolder(storage.jobs / digest_of(served)[:20])
    folder.path.mkdir()
    running = RunRecord(experiment="roma/waves", name="a run", tags={}, params={})
    write_record(folder, running)
    at_call("create_run", 1, lambda: gate.become("late"))
    assert send_pending(storage)[0] == []
    gate.become("open")
    wait_until(lambda: any(b"runs/create" in asked for asked in gate.kept), 10)

    for moment in ("before the next request", "before the end", "after the end"):
        if moment == served:
            gate.deliver()
            assert len(runs_of(storage, folder)[1]) == 1 + (moment != "before the next request")
        if moment == "before the end":
            write_record(folder, running.model_copy(update={"status": "FINISHED"}))
        if moment == "after the end":
            monkeypatch.setattr(runs, "_LATE_S", 0)
        sent = [] if moment == "after the end" else [folder.path.name]
        assert send_pending(storage) == (sent, [])

    (run,) = runs_of(storage, folder)[1]
    assert (run.info.run_id, run.info.status) == (known_run(folder)["run_id"], "FINISHED")
    assert not list(folder.path.glob(".mlflow_asked"))


def test_a_run_whose_orchestrator_died_after_the_job_is_ended(train, storage, monkeypatch):
    monkeypatch.setattr(runs.JobRun, "end", lambda run: None)
    _, folder, _ = train(TRAINED)
    _, (run,) = runs_of(storage, folder)
    assert run.info.status == "RUNNING"

    assert send_pending(storage) == ([folder.path.name], [])

    check_received(storage, folder)
