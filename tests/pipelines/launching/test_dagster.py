import json
import os
import signal
from threading import Thread

import dagster as dg
import pytest

from roma_pipelines.launching.pipes import MessageReader, job_folder, on_interrupt, run_job
from roma_pipelines.launching.spec import JobFailed, job_key
from roma_pipelines.launching.supervisor import Supervisor
from roma_pipelines.resources import JobClient, JobSize, LocalJobClient
from tests.pipelines.launching.fake import FakeLauncher, completed, running, waiting

CONFIG = {"base_lr": 0.001}


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def materialize(launcher, make_spec, folder, instance):
    """Materialises an asset whose job runs the given lines."""

    def materialize(body, observe_every_s=60.0, before=None, **options):
        spec = make_spec(body)
        if before:
            before(folder, spec)

        @dg.asset
        def encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            outcome = run_job(
                context,
                launcher,
                folder,
                spec,
                CONFIG,
                observe_every_s=observe_every_s,
                poll_every_s=0.02,
                **options,
            )
            return dg.MaterializeResult(metadata=outcome.metadata())

        return dg.materialize([encoder], instance=instance, raise_on_error=False)

    return materialize


def observations(instance):
    records = instance.fetch_observations(dg.AssetKey("encoder"), limit=50).records
    found = [record.asset_observation.metadata for record in reversed(records)]
    return [{name: value.value for name, value in metadata.items()} for metadata in found]


def log_lines(instance, result, level=None):
    entries = instance.all_logs(result.run_id)
    return [e.user_message for e in entries if level is None or e.level == level]


REPORTING = """
say("opened", extras={})
say("log", message="twelve whales loaded", level="INFO")
for step in range(1, 6):
    say("report_custom_message", payload={"kind": "progress", "step": step, "loss": 1 / step})
say("report_asset_materialization", asset_key="encoder", metadata={}, data_version=None)
say("log", message="odd", level="SHOUT")
say("closed")
succeed()
"""


def test_log_and_progress_appear_on_the_asset(materialize, instance):
    result = materialize(REPORTING)

    assert result.success
    lines = log_lines(instance, result)
    assert lines.count("twelve whales loaded") == 1
    assert lines.count("odd") == 1
    assert observations(instance) == [{"step": 1, "loss": 1.0}, {"step": 5, "loss": 0.2}]
    events = result.get_asset_materialization_events()
    assert len(events) == 1  # the asset's own; none by the job
    assert events[0].materialization.metadata["attempts"].value == 1
    assert log_lines(instance, result, level=30) == []  # warnings


def test_progress_is_seen_while_the_job_runs(materialize, instance, eventually, folder):
    body = (
        'say("opened", extras={})\n'
        'say("report_custom_message", payload={"kind": "progress", "loss": float("nan")})\n'
        "wait_for('go')\nsucceed()"
    )

    def go_once_observed():
        eventually(lambda: observations(instance))
        (folder.path / "go").touch()

    helper = Thread(target=go_once_observed)
    helper.start()
    result = materialize(body)
    helper.join()

    assert result.success
    assert observations(instance) == [{"loss": "nan"}]


def test_why_a_job_waits_is_seen_while_it_waits(folder, make_spec, instance):
    play = [waiting("Priority"), waiting("Priority"), waiting("Resources"), running(), completed()]
    spec = make_spec()

    @dg.asset
    def encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        outcome = run_job(context, FakeLauncher(play), folder, spec, CONFIG, poll_every_s=0.0)
        return dg.MaterializeResult(metadata=outcome.metadata())

    assert dg.materialize([encoder], instance=instance).success
    assert observations(instance) == [
        {"phase": "waiting", "queue": "Priority"},
        {"phase": "waiting", "queue": "Resources"},
    ]


def test_a_continued_job_is_one_story_without_warnings(materialize, instance):
    body = (
        'say("opened", extras={})\n'
        'say("report_custom_message", payload={"kind": "progress", "attempt": n})\n'
        'say("log", message=f"attempt {n}")\n'
        "save(n)\n"
        "if n < 2: leave('continue'); say('closed', exception={'message': 'x', 'name': 'Y',"
        " 'stack': [], 'cause': None, 'context': None}); sys.exit(75)\n"
        'say("closed")\nsucceed()'
    )

    result = materialize(body)

    assert result.success
    assert observations(instance)[-1] == {"attempt": 2}
    assert "attempt 2" in log_lines(instance, result)
    assert log_lines(instance, result, level=30) == []


def test_messages_never_decide_success(materialize, instance):
    body = (
        'say("opened", extras={})\n'
        'say("report_asset_materialization", asset_key="encoder", metadata={}, data_version=None)\n'
        'say("closed")'
    )

    result = materialize(body)

    assert not result.success
    assert result.get_asset_materialization_events() == []
    error = result.failure_data_for_node("encoder").error
    assert JobFailed.__name__ in str(error)


def test_a_failed_job_shows_its_log_in_the_error(materialize):
    result = materialize("raise MemoryError('too many whales')")

    assert "MemoryError: too many whales" in str(result.failure_data_for_node("encoder").error)


def test_broken_messages_are_passed_over(materialize, instance):
    body = (
        '(folder / "messages.jsonl").write_text(\'{"method": "log"}\\n{"method": 7, "params": 3}\\n\''
        ' + \'{"half\\n{"method": "closed", "params": []}\\n\')\nsucceed()'
    )

    result = materialize(body)

    assert result.success
    assert any("1 line(s)" in line for line in log_lines(instance, result, level=30))


def test_messages_of_an_adopted_job_are_not_repeated_and_give_no_warning(
    materialize, instance, launcher, starts
):
    def earlier_supervisor(folder, spec):
        """Starts the job, passes its first messages on, and is gone."""

        class Gone(BaseException):
            pass

        def leave(state):
            if (folder.path / "starts").exists() and folder.messages.exists():
                reader = MessageReader(folder)
                reader.read()
                reader.save()
                raise Gone

        with pytest.raises(Gone):
            Supervisor(launcher, folder, spec, CONFIG, on_poll=leave, poll_every_s=0.02).run()
        (folder.path / "go").touch()

    body = (
        'say("opened", extras={})\nwait_for("go")\n'
        'say("log", message="second half")\nsay("closed")\nsucceed()'
    )
    result = materialize(body, before=earlier_supervisor)

    assert result.success
    assert starts() == [1]
    assert log_lines(instance, result).count("second half") == 1
    assert log_lines(instance, result, level=30) == []


def test_a_job_of_the_real_protocol_is_understood(materialize, instance):
    body = (
        "from dagster_pipes import open_dagster_pipes\n"
        "with open_dagster_pipes() as pipes:\n"
        "    pipes.log.info('from the real protocol')\n"
        "    pipes.report_custom_message({'kind': 'progress', 'run': pipes.run_id})\n"
        "succeed()"
    )

    result = materialize(body)

    assert result.success
    assert observations(instance) == [{"run": result.run_id}]
    assert "from the real protocol" in log_lines(instance, result)


def test_a_key_is_the_same_for_every_attempt_of_a_run(instance):
    keys = []

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
    def encoder(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        keys.append(job_folder(context).path.name)
        if len(keys) == 1:
            raise RuntimeError("once")
        return dg.MaterializeResult()

    result = dg.materialize([encoder], instance=instance)
    assert keys == [job_key("encoder", result.run_id)] * 2

    dg.materialize([encoder], instance=instance)
    assert keys[2] not in keys[:2]


STATUS = dg.DagsterRunStatus


@pytest.mark.parametrize(
    ("status", "launched", "leave"),
    [
        (STATUS.STARTED, True, "detach"),  # deploy, drained node, Ctrl-C of the web server
        (STATUS.CANCELING, True, "cancel"),  # Terminate
        (STATUS.CANCELED, True, "cancel"),
        (None, True, "cancel"),  # the run was deleted
        (STATUS.STARTED, False, "cancel"),  # in the foreground of a terminal
    ],
)
def test_what_an_interrupt_means_for_the_job(status, launched, leave):
    class Run:
        run_id = "run-a"
        remote_job_origin = object() if launched else None

    class Instance:
        def get_run_by_id(self, run_id):
            if status is None:
                return None
            run = Run()
            run.status = status
            return run

    assert on_interrupt(Instance(), Run()) == leave


def test_ctrl_c_in_a_foreground_run_ends_the_job(materialize, processes, folder, eventually):
    def press_ctrl_c():
        eventually(lambda: (folder.path / "starts").exists())
        os.kill(os.getpid(), signal.SIGINT)

    helper = Thread(target=press_ctrl_c)
    helper.start()
    result = materialize("wait_for('go', 60)")
    helper.join()

    assert "DagsterExecutionInterruptedError" in str(result.failure_data_for_node("encoder").error)

    assert processes() == []
    assert json.loads(folder.attempt_record(1).read_text())["end"]["status"] == "cancelled"


def test_what_follows_the_acceptance_is_done_once_while_the_job_runs(materialize, folder):
    done = []

    def on_accepted():
        done.append(json.loads(folder.attempt_record(1).read_text())["external"])

    assert materialize("time.sleep(0.2)\nsucceed()", on_accepted=on_accepted).success
    assert len(done) == 1 and done[0]["pid"]


def test_its_error_ends_the_job(materialize, folder, processes):
    def on_accepted():
        raise OSError("the tracking server is away")

    result = materialize("wait_for('never')", on_accepted=on_accepted)

    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "the tracking server is away" in str(failure.step_failure_data.error)
    assert processes() == []
    end = json.loads(folder.attempt_record(1).read_text())["end"]
    assert end["status"] == "cancelled"


@pytest.fixture
def run_module(tmp_path, monkeypatch, instance):
    """Materialises an asset of another project, whose job is a module of the given lines."""
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path / "root"))
    monkeypatch.setenv("PASSWORD", "secret")

    def run_module(body, times=1, command="mine --lr 0.1", tags=None, **options):
        (tmp_path / "mine.py").write_text("import json, os, sys\n" + body)

        @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
        def model(context: dg.AssetExecutionContext, jobs: JobClient) -> dg.MaterializeResult:
            made = [jobs.run(context=context, command=command, **options) for _ in range(times)]
            return made[-1]

        client = LocalJobClient(cwd=str(tmp_path), env_names=["PASSWORD"])
        return dg.materialize(
            [model], instance=instance, resources={"jobs": client}, raise_on_error=False, tags=tags
        )

    return run_module


MEASURED = """
config = json.load(open(os.environ["ROMA_JOB_FOLDER"] + "/config.json"))
assert sys.argv[1:] == ["--lr", "0.1"] and config == {"lr": 0.1}
assert (os.environ["PASSWORD"], os.environ["GREETING"]) == ("secret", "hello")
metrics = {"accuracy": 0.9, "water_low": 2, "attempts": 3, "log": 4}
json.dump(metrics, open(os.environ["ROMA_JOB_FOLDER"] + "/outputs/metrics.json", "w"))
"""
SLURM_SIZE = {"nodes": 2, "processes_per_node": 1}


def test_an_asset_of_any_project_runs_a_module(run_module, tmp_path, instance):
    result = run_module(MEASURED, config={"lr": 0.1}, env={"GREETING": "hello"}, runner="plain")

    (event,) = result.get_asset_materialization_events()
    facts = {name: value.value for name, value in event.materialization.metadata.items()}
    assert (facts["accuracy"], facts["attempts"], facts["processes"]) == (0.9, 1, "1")
    assert (facts["water_low"], facts["metrics/attempts"], facts["metrics/log"]) == (2, 3, 4)
    assert facts["job_key"] == job_key("model", result.run_id)
    assert facts["job_folder"] == str(tmp_path / "root" / "jobs" / facts["job_key"])
    assert facts["log"].endswith("/attempts/1/log") and "completed" in facts["events"]
    assert log_lines(instance, result, level=30) == []
    for file in (tmp_path / "root").rglob("*.json"):
        assert "secret" not in file.read_text() and "hello" not in file.read_text()

    retry = {"dagster/is_resume_retry": "true", "dagster/parent_run_id": result.run_id}
    for other in ({"command": "mine --lr 0.2"}, {"config": {"lr": 0.2}}, {}):
        given = {"config": {"lr": 0.1}, "env": {"GREETING": "hello"}, "runner": "plain"} | other
        again = run_module(MEASURED, tags=retry, **given)
        errors = [str(e.step_failure_data.error) for e in again.all_events if e.is_step_failure]
        assert again.success == (not other) and len(errors) == len(other)
        assert all("start a new run, or a second job" in error for error in errors)


@pytest.mark.parametrize(
    ("body", "options", "sentence", "starts"),
    [
        ("raise MemoryError('too many whales')", {}, "MemoryError: too many whales", 1),
        (MEASURED.replace("0.9", "'high'"), {}, "metrics.json: expected numbers by name", 1),
        ("", {"times": 2}, "model has run its job already", 1),
        ("", {"command": ""}, "the command is empty; name a module", 0),
        ("", {"command": "python mine.py"}, "there is no module 'python' in", 0),
        ("", {"resources": JobSize(**SLURM_SIZE)}, "the job asks for 2; use runner=", 0),
    ],
)
def test_what_is_wrong_with_a_job_fails_the_asset(
    run_module, tmp_path, body, options, sentence, starts
):
    given = {"config": {"lr": 0.1}, "env": {"GREETING": "hello"}, "runner": "plain"}
    result = run_module(body, **{**given, **options})

    (failure,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert sentence in str(failure)
    assert len(list((tmp_path / "root").glob("jobs/*/attempts/*.json"))) == starts
    if failure.user_failure_data is not None:  # the job's own failure is final
        assert not [event for event in result.all_events if event.is_step_up_for_retry]
        assert "failed" in failure.user_failure_data.metadata["attempts_made"].value
