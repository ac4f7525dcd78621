"""``roma-pipeline plan``, ``launch`` and ``jobs``, as typed in a terminal."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from roma_pipelines.cli import main
from roma_pipelines.experiment import COMPONENT
from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.launching.supervisor import supervise
from tests.pipelines import tiny
from tests.time_limits import within

CONFIG = {"base_lr": 0.001}
WORDS = [
    "--nodes",
    "a b",
    "it's",
    '"quoted"',
    "$(touch evil)",
    "$$ ${local_rank}",
    "-m",
    "--",
    "",
    "täglich",
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ROMA_STORAGE_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def run(root):
    """Runs a command; returns exit code and output, standard error included."""

    def run(*words):
        done = CliRunner().invoke(main, list(words), catch_exceptions=False)
        return done.exit_code, done.output

    return run


@pytest.fixture
def profiles(root, monkeypatch):
    folder = root / "profiles"
    folder.mkdir()
    text = "poll_s: 0.3\nmemory_gb: 2\nenvironment: { GLOO_SOCKET_IFNAME: lo }\n"
    (folder / "mini.yaml").write_text(text)
    monkeypatch.setenv("ROMA_SLURM_PROFILES", str(folder))
    return folder


@pytest.fixture
def experiment(root):
    path = root / "defs.yaml"
    sections = tiny.attributes(root, resources={"nodes": 2})
    path.write_text(yaml.safe_dump({"type": COMPONENT, "attributes": sections}))
    return str(path)


# -- plan ----------------------------------------------------------------------------------------


def test_plan_prints_the_script_of_a_target(run, experiment):
    code, local = run("plan", experiment)
    assert (code, "torch.distributed.run" in local) == (0, True)
    assert "--nproc-per-node=2" in local  # both nodes' processes, on one computer
    assert "# FREE_PORT stands for: chosen at the start" in local
    assert "# 1 node, 2 processes on each" in local

    code, slurm = run("plan", experiment, "--target", "slurm", "--profile", "leonardo")
    assert code == 0
    assert "#SBATCH --partition=boost_usr_prod" in slurm
    assert "#SBATCH --nodes=2" in slurm
    assert "was never submitted" in slurm
    assert "# primary metric: auto; chosen from the classes once the data set is built" in slurm

    found = json.loads(CliRunner().invoke(main, ["plan", experiment, "--json"]).stdout)
    assert found["script"] in local and found["rejected"] == {}
    assert found["jobs"]["evaluation_report"]["target"] == "local"


def test_plan_refuses_what_the_experiment_has_not(run, root, experiment, monkeypatch):
    monkeypatch.setenv("ROMA_TRAINER_BASE_LRR", "1")
    code, text = run("plan", "japanese_vowels")
    assert code == 1 and "the closest one is ROMA_TRAINER_BASE_LR" in text
    monkeypatch.delenv("ROMA_TRAINER_BASE_LRR")

    code, text = run("plan", experiment, "--asset", "finetuned_regressor")
    assert code == 1 and "waves has no finetuned_regressor, its task is classification" in text
    assert "pretrained_encoder, finetuned_classifier, evaluation_report" in text


def test_plan_shows_how_a_script_differs_from_the_last_one(
    run, root, experiment, profiles, cluster, monkeypatch
):
    from roma_core.files import digest_of
    from roma_core.job import JobFolder
    from roma_pipelines.experiment import load_experiment
    from roma_pipelines.launching.targets import job_spec, launcher_for, roma_command
    from roma_pipelines.storage import Storage

    resources = load_experiment(experiment).resources.model_copy(update={"target": "slurm"})
    folder = JobFolder(root / "jobs" / ("ab" * 10))
    command = roma_command("pretrain", folder.path)
    spec = job_spec("slurm", resources, "ab" * 10, command, digest_of({}))
    launcher = launcher_for("slurm", "mini", Storage.open())
    options = {"holder": {"asset_key": "waves/pretrained_encoder"}, "poll_every_s": 0.1}
    launcher.fs_lag_s = 0.0
    with pytest.raises(RuntimeError):  # there is no configuration in it to train from
        supervise(launcher, folder, spec, {}, **options)

    target = ("--target", "slurm", "--profile", "mini")
    assert "# the same as the last one" in run("plan", experiment, *target)[1]
    (profiles / "mini.yaml").write_text("memory_gb: 3\n")
    _, text = run("plan", experiment, *target)
    assert "-#SBATCH --mem=2000M\n+#SBATCH --mem=3000M" in text


def test_plan_asks_the_cluster_too(run, experiment, profiles, cluster):
    target = ("--target", "slurm", "--profile", "mini", "--check")
    code, text = run("plan", experiment, *target)
    assert (code, "targets would run pretrained_encoder, finetuned" in text) == (0, True)

    (profiles / "mini.yaml").write_text("partition: nowhere\n")
    code, text = run("plan", experiment, *target)
    assert (code, "there is no partition nowhere at mini" in text) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nothing",), "no experiment 'nothing'; available: basic_motions, "),
        (("no/such.yaml",), "No such file"),
        (("japanese_vowels", "--target", "slurm", "--profile", "x"), "no SLURM profile 'x'"),
        (("japanese_vowels", "--target", "moon"), "'moon' is not one of 'local', 'slurm'"),
    ],
)
def test_plan_says_what_is_wrong(run, words, message):
    code, text = run("plan", *words)

    assert (code > 0, message in text) == (True, True), text


# -- launch --------------------------------------------------------------------------------------

MODULE = """
import json, os, sys
if os.environ["RANK"] == "0":
    print("WORLD", json.dumps([sys.argv[1:], os.getcwd(), os.environ["WORLD_SIZE"]]), flush=True)
if "fail" in sys.argv:
    sys.exit("it will not work")
"""


def as_from_a_terminal():
    """A shell that has these tests in its background makes them, and their children, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(folder, *words, **options):
    (folder / "mine.py").write_text(MODULE)
    argv = [sys.executable, "-m", "roma_pipelines.cli", "launch", *words]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen(
        argv,
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=as_from_a_terminal,
    )


@pytest.mark.parametrize("target", ["local", "slurm"])
def test_launch_hands_every_argument_on(root, profiles, request, target):
    options = ["--processes", "2"]
    if target == "slurm":
        request.getfixturevalue("cluster")
        options = ["--target", "slurm", "--profile", "mini", "--nodes", "2"]

    done = start(root, *options, "-m", "mine", *WORDS)
    output, errors = done.communicate(timeout=within(60))

    assert done.returncode == 0, errors
    (line,) = re.findall(r"^WORLD (.*)$", output, re.MULTILINE)
    assert json.loads(line) == [WORDS, str(root), "2"]
    assert "completed in 1 attempt(s)" in errors
    assert f" in {root / 'jobs'}/" in errors
    assert not (root / "evil").exists()


def test_launch_fails_as_its_module_does(root):
    done = start(root, "-m", "mine", "fail")
    output, errors = done.communicate(timeout=within(60))

    assert done.returncode == 1
    assert "it will not work" in output
    assert "mine left with exit code 1" in errors


STOPPING = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    Path("saved").touch()
    sys.exit(75)
if Path("saved").exists():
    print("went on", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
Path("started").touch()
time.sleep(60)
"""


def test_ctrl_c_ends_the_watch_and_a_stop_request_continues_the_job(root, eventually, run):
    (root / "stopping.py").write_text(STOPPING)
    first = start(root, "-m", "stopping")
    eventually(lambda: (root / "started").exists(), 30)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=within(20))

    (key,) = re.findall(r"launch --job (\w+)", errors)
    (job,) = all_jobs(root / "jobs")
    assert (job.status, job.supervised) == ("running", False)
    job.folder.attempt(1).stop.touch()
    again = start(root, "--job", key)
    output, errors = again.communicate(timeout=within(30))

    assert again.returncode == 0, errors
    assert "went on" in output
    assert "completed in 2 attempt(s)" in errors


def test_ctrl_c_before_the_submission_says_that_nothing_runs(run, root, monkeypatch):
    def interrupted(self, plan):
        raise KeyboardInterrupt

    monkeypatch.setattr("roma_pipelines.launching.local.LocalLauncher.preflight", interrupted)

    code, text = run("launch", "-m", "json.tool")

    assert (code, "before anything was submitted to the target local" in text) == (130, True)
    assert "still running" not in text and str(root / "jobs") not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpus", "9"), "9 GPUs are asked for, this computer has 2"),
        (("--memory-gb", "1e6"), "1e+06 GB of memory are asked for, this computer has"),
    ],
)
def test_launch_asks_this_computer_for_no_more_than_it_has(run, root, monkeypatch, words, message):
    monkeypatch.setattr("roma_pipelines.launching.local.gpus_here", lambda: 2)

    code, text = run("launch", *words, "-m", "json")

    assert (code, message in text) == (1, True), text
    assert not list((root / "jobs").glob("*"))


@pytest.mark.parametrize("option", ["--nodes", "--processes", "--threads"])
def test_a_job_of_none_is_refused(run, root, monkeypatch, option):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    code, text = run("launch", option, "0", "-m", "json.tool")

    assert code == 2 and f"Invalid value for '{option}': 0 is not in the range" in text, text
    assert not (root / "jobs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("launch", "--target", "local", "--profile", "mini", "-m", "mine"),
        ("plan", "japanese_vowels", "--target", "local", "--profile", "mini"),
    ],
)
def test_a_profile_of_another_target_is_refused(run, root, words):
    code, text = run(*words)

    assert (code, "--profile mini names a cluster, but the target is local" in text) == (2, True)
    assert not (root / "jobs").exists()


@pytest.mark.parametrize("name", ["no_such_module", "json.nothing", "mine.py"])
def test_a_module_that_does_not_exist_is_said_before_anything_starts(
    run, root, name, monkeypatch, profiles
):
    monkeypatch.chdir(root)
    (root / "mine.py").touch()

    for target in ((), ("--target", "slurm", "--profile", "mini")):
        code, text = run("launch", *target, "-m", name)

        assert (code, f"there is no module {name!r} in {root}" in text) == (1, True), text
        assert len(text.splitlines()) == 1
        assert not list((root / "jobs").iterdir())


def test_more_threads_than_cpus_are_only_said(run, root, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)

    code, text = run("launch", "--threads", "3", "-m", "json.tool", "--help")

    assert (code, "3 threads are asked for, this computer has 2 CPUs" in text) == (0, True), text


@pytest.mark.parametrize("words", [(), ("--job", "x", "mine")])
def test_launch_wants_a_module_or_a_job(run, words):
    code, text = run("launch", *words)

    assert (code, "expected -m MODULE" in text) == (2, True)


# -- jobs ----------------------------------------------------------------------------------------


@pytest.fixture
def abandoned(launcher, folder, make_spec, eventually):
    """A running job whose supervisor is gone."""

    class Gone(BaseException):
        pass

    def leave(state):
        if (folder.path / "starts").exists():
            raise Gone

    spec = make_spec("print('a line', flush=True)\nwait_for('go', 60)\nsucceed()")
    with pytest.raises(Gone):
        supervise(launcher, folder, spec, CONFIG, on_poll=leave, poll_every_s=0.02)
    document = json.loads(folder.lease.read_text())
    folder.lease.write_text(json.dumps(document | {"start": "another process"}))
    eventually(lambda: folder.attempt(1).log.read_text() == "a line\n")
    return folder


def test_jobs_are_listed_shown_and_their_logs_read(run, abandoned, processes, eventually):
    key = abandoned.path.name

    _, text = run("jobs", "list")
    (row,) = [line.split() for line in text.splitlines() if key in line]
    assert row[1:4] == ["running", "local", "1"]
    _, text = run("jobs", "show", key[:6])
    assert "left the job running" in text
    assert re.search(r"^state       running \(process \d+\); seen \d+ s ago$", text, re.MULTILINE)
    assert run("jobs", "logs", key) == (0, "a line\n")

    (abandoned.path / "go").touch()
    eventually(lambda: not processes())


def test_ctrl_c_ends_a_look_at_the_log_with_one_line(root, abandoned, processes, eventually):
    argv = [sys.executable, "-m", "roma_pipelines.cli", "jobs", "logs", "-f", abandoned.path.name]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    looking = subprocess.Popen(
        argv,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=as_from_a_terminal,
    )
    assert looking.stdout.readline() == b"a line\n"
    time.sleep(0.2)  # it waits for more
    looking.send_signal(signal.SIGINT)

    assert looking.communicate(timeout=within(5)) == (b"", b"interrupted\n")
    assert looking.returncode == 130
    (abandoned.path / "go").touch()
    eventually(lambda: not processes())


def test_an_unsupervised_job_can_be_cancelled(run, abandoned, processes):
    key = abandoned.path.name
    assert processes()

    assert run("jobs", "cancel", key[:8]) == (0, f"job {key}: cancelled\n")
    assert processes() == []
    _, text = run("jobs", "cancel", key)
    assert "has already ended: cancelled" in text
    assert "1 have ended" in run("jobs", "list")[1]

    removal = re.compile(rf"^(?:would remove|removed) .* job {key}: ", re.MULTILINE)
    assert not removal.search(run("gc")[1])  # it is not old enough
    assert not removal.search(run("gc", "--days", "0")[1])  # this process supervises it
    document = json.loads(abandoned.lease.read_text())
    abandoned.lease.write_text(json.dumps(document | {"start": "another process"}))
    code, text = run("gc", "--days", "-5")
    assert (code, "is not in the range x>=" in text) == (2, True)
    assert removal.search(run("gc", "--days", "0")[1])
    assert abandoned.path.exists()
    assert removal.search(run("gc", "--days", "0", "--yes")[1])
    assert not abandoned.path.exists()


def test_a_job_on_slurm_can_be_cancelled_from_outside(
    run, root, cluster, profiles, eventually, processes
):
    (root / "stopping.py").write_text(STOPPING)
    words = ("--target", "slurm", "--profile", "mini", "-m", "stopping")
    supervising = start(root, *words)
    eventually(lambda: (root / "started").exists(), 40)
    supervising.kill()
    supervising.communicate()
    (job,) = all_jobs(root / "jobs")

    assert run("jobs", "cancel", job.key) == (0, f"job {job.key}: cancelled\n")
    states = {job_id: state for job_id, _, state in cluster.jobs()}
    assert states[job.records[0].external["job_id"]] == "CANCELLED"
    assert processes() == []


def test_an_unknown_job_is_said_so(run):
    code, text = run("jobs", "show", "abc")

    assert (code, "exactly one job" in text) == (1, True)


@pytest.fixture
def broken(root):
    """The folder of a job whose specification was cut short."""
    folder = root / "jobs" / "broken"
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text('{"schema_ver')
    return folder


def test_a_job_that_cannot_be_read_hides_no_other_one(
    run, broken, launcher, folder, make_spec, caplog
):
    supervise(launcher, folder, make_spec(), CONFIG, poll_every_s=0.02)

    code, text = run("jobs", "list", "--all")
    assert (code, folder.path.name in text) == (0, True)
    assert f"job folder {broken} cannot be read" in caplog.text
    caplog.clear()
    assert run("jobs", "show", folder.path.name)[0] == 0
    assert caplog.text == ""  # the other one's files were not looked at
    code, text = run("jobs", "show", "broken")
    assert (code, f"the job in {broken} cannot be read" in text) == (1, True)


def test_a_job_removed_while_it_is_read_is_left_out(broken, monkeypatch, caplog):
    def removed_meanwhile(path):
        shutil.rmtree(path)
        raise FileNotFoundError(path / "spec.json")

    monkeypatch.setattr("roma_pipelines.launching.jobs.read_job", removed_meanwhile)

    assert all_jobs(broken.parent) == []
    assert caplog.text == ""
