"""``roma-pipeline demo`` as people run it: bad surroundings, Ctrl-C, a full disk, a second call."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner

from roma_core.files import write_json
from roma_core.job import JobFolder
from roma_pipelines.cli import main
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.launching.outcome import read_events
from roma_pipelines.registry.store import MlflowSettings, connect
from tests.pipelines import tiny

ROOT = Path(__file__).parents[3]
SHIPPED = (sys.executable, "-m", "roma_pipelines.cli")


def tiny_demo(folder, *arguments):
    return (sys.executable, "-m", "tests.pipelines.cli.tiny_demo", str(folder), *arguments, "waves")


def surroundings(folder, **variables):
    """Options of ``subprocess``: a clean environment with ``folder`` as the place to work in."""
    (folder / "empty.env").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ROMA_")}
    kept.pop("DAGSTER_HOME", None)
    ours = {"HOME": str(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    ours["ROMA_ENV_FILE"] = str(folder / "empty.env")
    return {"cwd": folder, "env": kept | ours | variables, "text": True}


def run(*command, folder, **variables):
    return subprocess.run(command, **surroundings(folder, **variables), capture_output=True)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs a command in this process; what it ends with, as of a process of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)

    def here(*arguments, **variables):
        result = CliRunner().invoke(main, arguments, env=variables)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return subprocess.CompletedProcess(
            arguments, result.exit_code, result.stdout, result.stderr
        )

    return here


def one_error(done):
    """The only line of a refusal."""
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


def test_state_of_another_version_is_left_alone(tmp_path):
    root = tmp_path / ".roma"
    root.mkdir()
    write_json(root / "layout.json", {"schema_version": 0})

    line = one_error(run(*SHIPPED, "demo", folder=tmp_path))

    assert f"{root} was written by another version of this software" in line
    assert "schema_version 0" in line
    assert "move it away (its models stay loadable" in line and "or set ROMA_STORAGE_ROOT" in line


def test_a_root_that_cannot_be_written_is_named(tmp_path, here):
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "roma"

    line = one_error(here("demo", ROMA_STORAGE_ROOT=str(root)))

    assert f"cannot write to {root}" in line
    assert "set ROMA_STORAGE_ROOT to a writable folder" in line


def test_an_unknown_experiment_is_answered_with_those_there_are(here):
    line = one_error(here("demo", "vowels"))

    assert "no experiment 'vowels'; available: basic_motions, " in line


def test_a_misspelt_variable_is_refused_by_its_name(here):
    line = one_error(here("demo", ROMA_STORAGE_ROT="here"))

    assert "ROMA_STORAGE_ROT" in line
    assert "closest one is ROMA_STORAGE_ROOT" in line


@pytest.mark.parametrize("server", ["dagster", "mlflow"])
def test_a_port_in_use_is_named_before_anything_starts(server, tmp_path, here):
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("", 0)) as free:
        port, other = listener.getsockname()[1], free.getsockname()[1]
        free.close()
        option, other_option = f"--{server}-port", "--mlflow-port"
        if server == "mlflow":
            other_option = "--dagster-port"

        done = here("up", option, str(port), other_option, str(other))

    line = one_error(done)
    assert f"port {port}" in line
    assert f"give another one with {option}" in line
    assert not (tmp_path / ".roma").exists()


class Story:
    """The tiny demo: killed, interrupted, run to its end, and run once more."""

    def __init__(self, folder, **variables):
        self.folder, self.variables = folder, variables
        self.command = tiny_demo(folder)

    def interrupted_at(self, words, number, meanwhile=lambda: None):
        """Run it until it says ``words``, then signal its process group as a terminal does."""
        child = subprocess.Popen(
            self.command,
            **surroundings(self.folder, **self.variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        said = ""
        for line in child.stdout:
            said += line
            if words in line:
                break
        assert words in said, child.communicate()
        assert tiny.living_jobs(self.folder)
        meanwhile()
        os.killpg(child.pid, number)
        out, err = child.communicate(timeout=60)
        return subprocess.CompletedProcess(self.command, child.returncode, said + out, err)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    story = Story(tmp_path_factory.mktemp("story"))
    yield story
    assert tiny.living_jobs(story.folder) == []


@pytest.fixture(scope="module")
def adopted(story):
    """The job of the training that a killed demo left, and the end of the next demo by Ctrl-C."""
    killed = story.interrupted_at("pretrain: ", signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    (job,) = all_jobs(story.folder / ".roma" / "jobs")
    assert (job.status, job.supervised) == ("running", False)
    assert tiny.living_jobs(story.folder), "it continues without a supervisor"
    return job, story.interrupted_at("finetune: ", signal.SIGINT)


@pytest.fixture(scope="module")
def interrupted(adopted):
    return adopted[1]


@pytest.fixture(scope="module")
def finished(story, interrupted):
    return run(*story.command, folder=story.folder)


@pytest.mark.slow
def test_the_training_of_a_killed_demo_is_adopted(story, adopted):
    job, again = adopted

    assert "resuming an interrupted run" in again.stdout
    found = {one.key: one for one in all_jobs(story.folder / ".roma" / "jobs")}
    assert len(found[job.key].records) == 1
    trail = [entry.action for entry in read_events(JobFolder(job.folder.path))]
    assert "adopted it" in trail and "completed" in trail


@pytest.mark.slow
def test_ctrl_c_in_a_training_leaves_no_process(story, interrupted):
    assert interrupted.returncode == 130
    last = interrupted.stderr.splitlines()[-1]
    assert last == "interrupted; the same command resumes"
    assert "Traceback" not in interrupted.stderr
    assert tiny.living_jobs(story.folder) == []
    with dg.DagsterInstance.from_config(str(story.folder / ".roma" / "dagster")) as instance:
        newest, *_ = instance.get_runs(limit=1)
    assert newest.status is dg.DagsterRunStatus.CANCELED, "health counts it as no failure"


@pytest.mark.slow
def test_the_same_command_then_goes_on_to_the_end(finished):
    assert finished.returncode == 0, finished.stderr
    assert "type hint" not in finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0] == (
        "materialising waves: finetuned_classifier, evaluation_report, registered_classifier"
    )
    assert re.fullmatch(r"test accuracy [01]\.\d{3} \(95 % [01]\.\d{3}–[01]\.\d{3}\)", lines[-1])
    assert any(re.match(r"report +\.roma/jobs/\w+/outputs/report\.html$", line) for line in lines)
    assert any("waves version 1 (champion, candidate)" in line for line in lines)
    assert any("roma predict --model models:/waves@champion .roma/" in line for line in lines)


@pytest.mark.slow
def test_the_interrupted_training_is_killed_in_mlflow_too(story, finished):
    client = connect(MlflowSettings.from_values({}), story.folder / ".roma" / "mlflow")
    experiment = client.get_experiment_by_name("roma/waves")
    runs = client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])

    # the adopted pretraining has one run
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED", "FINISHED", "FINISHED"]


@pytest.mark.slow
def test_a_second_call_reuses_what_is_there(story, finished):
    again = run(*story.command, folder=story.folder)

    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()
    assert lines[0] == "waves is up to date; --fresh runs it again"
    assert lines[-1] == finished.stdout.splitlines()[-1]
    assert not any(line.startswith("materialising") for line in lines)


@pytest.mark.chaos
def test_a_demo_of_other_settings_ends_the_training_that_a_killed_one_left(tmp_path):
    story = Story(tmp_path)
    story.interrupted_at("pretrain: ", signal.SIGKILL)
    (job,) = all_jobs(tmp_path / ".roma" / "jobs")

    fresh = Story(tmp_path)
    fresh.command = tiny_demo(tmp_path, "--fresh")
    fresh.interrupted_at("pretrain: ", signal.SIGINT)

    ended, begun = sorted(all_jobs(tmp_path / ".roma" / "jobs"), key=lambda job: job.made_at)
    assert (ended.key, ended.status) == (job.key, "cancelled")
    assert begun.key != job.key
    assert tiny.living_jobs(tmp_path) == []


@pytest.mark.chaos
def test_two_demos_of_one_experiment_are_one_too_many(tmp_path):
    def while_it_trains():
        done = run(*tiny_demo(tmp_path), folder=tmp_path)
        assert "already runs waves; wait for it" in one_error(done)

    Story(tmp_path).interrupted_at("pretrain: ", signal.SIGINT, while_it_trains)
    assert len(all_jobs(tmp_path / ".roma" / "jobs")) == 1


# $1 the mount point, then the command: refused before it begins, stopped in the middle, resumed
DISK = """
set -u
mount -t tmpfs -o size=1900k tmpfs "$1"; shift
"$@"; echo "code $?"
"$@" --min-free-mb 0; echo "code $?"
mount -o remount,size=300m "$ROMA_STORAGE_ROOT"
exec "$@"
"""


@pytest.mark.slow
def test_a_full_disk_is_one_error_and_the_same_command_then_goes_on(tmp_path):
    namespace = ("unshare", "--map-root-user", "--mount")
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"]).returncode:
        reason = "a small disk of its own needs Linux's user namespaces"
        if os.environ.get("ROMA_TEST_REQUIRE_ALL") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    disk = tmp_path / "disk"
    disk.mkdir()

    demo = Story(tmp_path, ROMA_STORAGE_ROOT=str(disk))
    demo.command = (*namespace, "sh", "-c", DISK, "sh", str(disk), *demo.command)
    done = demo.interrupted_at("finetune: ", signal.SIGINT)

    assert done.stdout.count("code 1\n") == 2
    assert "Traceback" not in done.stderr
    # on a full disk the end of a line of Dagster's log may be missing in front of ours
    errors = re.findall(r"Error: [^\n]*; free some[^\n]*", done.stderr)
    assert len(errors) == 2, done.stderr
    assert f"{disk} has 2 MB of free space, at least 200 MB are needed" in errors[0]
    assert f"no space left in {disk}" in errors[1]
    assert "run the same command to resume" in errors[1]
    assert "pretrain: " in done.stdout
    assert tiny.living_jobs(tmp_path) == []
