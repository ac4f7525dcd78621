import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.spec import JobHandle, JobSize, Phase
from roma_pipelines.launching.supervisor import supervise
from roma_pipelines.launching.targets import job_spec


@pytest.fixture
def submit(folder, launcher, make_spec):
    """Submits attempt 1 of a job of the given lines."""

    def submit(body, **fields):
        spec = make_spec(body, **fields)
        (folder.path / "attempts").mkdir(parents=True, exist_ok=True)
        folder.spec.write_text(spec.model_dump_json())
        return launcher.submit(launcher.plan(spec, folder), {})

    return submit


@pytest.fixture
def end_of(launcher, eventually):
    def end_of(handle):
        eventually(lambda: launcher.watch(handle).ended)
        return launcher.watch(handle)

    return end_of


@pytest.mark.parametrize(
    ("body", "phase", "reason"),
    [
        ("pass", Phase.ENDED_OK, ""),
        ("sys.exit(3)", Phase.ENDED_BAD, "exit code 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", Phase.ENDED_BAD, "signal 11"),
        ("os.kill(os.getpid(), signal.SIGKILL)", Phase.INTERRUPTED, "signal 9"),
    ],
)
def test_how_a_process_ended_is_told(submit, end_of, body, phase, reason):
    state = end_of(submit(body))

    assert state.phase == phase
    assert reason in state.reason


def test_output_of_all_kinds_goes_to_the_log_at_once(submit, launcher, folder, eventually):
    handle = submit("print('out'); print('err', file=sys.stderr); wait_for('go')")
    log = folder.attempt(1).log

    eventually(lambda: log.exists() and {"out", "err"} == set(log.read_text().split()))
    launcher.cancel(handle)


def test_a_job_sees_what_it_was_handed_on_and_no_other_setting(submit, end_of, folder, monkeypatch):
    monkeypatch.setenv("ROMA_TRAINER_BASE_LR", "9")
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", ".")
    handle = submit(
        "print(json.dumps(dict(os.environ)))\nprint(os.getcwd())",
        env_names=("MY_TOKEN", "NOT_SET"),
        threads_per_process=3,
    )
    end_of(handle)

    environment, cwd = folder.attempt(1).log.read_text().splitlines()
    environment = json.loads(environment)
    assert environment["MY_TOKEN"] == "secret"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["GOMP_SPINCOUNT"] == "1000"
    assert not {"ROMA_TRAINER_BASE_LR", "WORLD_SIZE", "NOT_SET"} & environment.keys()
    assert all(Path(entry).is_absolute() for entry in environment["PYTHONPATH"].split(os.pathsep))
    assert cwd == str(folder.path)
    assert "secret" not in folder.spec.read_text()


def test_the_cores_of_this_computer_are_shared_by_the_processes_of_a_job(monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda **_: 12)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 6)
    one, two, seven = (JobSize(nodes=n, processes_per_node=1) for n in (1, 2, 7))
    about = ("0123456789abcdef0123", ("job.py",), "digest")

    def threads(target, size):
        return job_spec(target, size, *about).threads_per_process

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads("local", size) for size in (one, two, seven)] == [6, 3, 1]
    assert threads("slurm", two) == 1
    assert threads("local", JobSize(threads_per_process=12)) == 12
    monkeypatch.setattr("joblib.cpu_count", lambda **_: 4)  # the quota of a container
    assert threads("local", one) == 4
    monkeypatch.setattr("joblib.cpu_count", lambda **_: 64)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: None)  # not known everywhere
    assert threads("local", one) == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads("local", one) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert threads("local", one) == 8


def test_an_attempt_is_found_by_its_owner_and_before_it_claimed(
    submit, launcher, folder, make_spec, eventually
):
    plan = launcher.plan(make_spec("wait_for('go')"), folder)
    assert launcher.find(plan) is None
    handle = submit("wait_for('go')")

    assert launcher.find(plan) == handle  # by its command line, or by owner.json
    eventually(folder.attempt(1).owner.exists)
    assert LocalLauncher().find(plan) == handle
    launcher.cancel(handle)
    assert LocalLauncher().find(plan) == handle  # it was started once, and that stays known


def test_a_process_that_has_not_claimed_yet_is_found(
    launcher, folder, tmp_path, make_spec, eventually
):
    first, eleventh = (launcher.plan(make_spec(), folder, n) for n in (1, 11))
    (tmp_path / "slow" / "roma_core").mkdir(parents=True)
    (tmp_path / "slow" / "roma_core" / "claim.py").write_text("import time; time.sleep(60)")
    argv = [sys.executable, "-m", "roma_core.claim", str(folder.path), "1", "--", "true"]
    child = subprocess.Popen(argv, env={"PYTHONPATH": str(tmp_path / "slow")})
    try:
        eventually(lambda: launcher.find(first))
        assert launcher.find(first).external["pid"] == child.pid
        assert launcher.find(eleventh) is None
    finally:
        child.kill()
        child.wait()


def test_a_number_that_went_to_another_process_is_not_the_job(launcher, folder, make_spec):
    plan = launcher.plan(make_spec(), folder)
    stranger = JobHandle(plan, {"pid": os.getpid(), "start": "another boot/1"})

    state = launcher.watch(stranger)

    assert state.phase == Phase.GONE
    launcher.cancel(stranger)  # and we are still here


FAMILY = """
child = "import os, time; os.setsid(); open('child','w').write('1'); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child])
wait_for("child")
"""
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); save(1); wait_for('go', 60)"


@pytest.mark.parametrize("body", ["save(1); wait_for('go', 60)", STUBBORN])
def test_cancel_ends_the_whole_tree_whatever_session_it_is_in(
    submit, launcher, folder, processes, eventually, body
):
    launcher.grace_s = 0.3
    handle = submit(FAMILY + body)
    eventually(folder.checkpoints.exists)
    assert len(processes()) == 2

    launcher.cancel(handle)

    assert processes() == []
    assert launcher.watch(handle).phase == Phase.INTERRUPTED
    launcher.cancel(handle)  # once more does no harm


def test_workers_do_not_outlive_the_first_process(
    submit, launcher, folder, processes, eventually, end_of
):
    launcher.grace_s = 0.3
    handle = submit(FAMILY + "save(1); wait_for('go', 60)")
    eventually(folder.checkpoints.exists)

    os.kill(handle.external["pid"], signal.SIGKILL)
    state = end_of(handle)

    assert state.phase == Phase.INTERRUPTED
    assert processes() == []


def test_a_job_asked_to_end_has_time_to_save(submit, launcher, folder, eventually):
    handle = submit(
        "def stop(*_):\n    save(7)\n    leave('continue')\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\nsave(1)\nwait_for('go', 60)"
    )
    eventually(folder.checkpoints.exists)

    launcher.cancel(handle)

    assert folder.attempt(1).read_exit().status == "continue"
    assert (folder.checkpoints / "step-000007").exists()


def test_a_second_start_of_an_attempt_does_not_run(
    submit, launcher, folder, make_spec, starts, eventually, end_of
):
    first = submit("wait_for('go')")
    eventually(lambda: (folder.path / "starts").exists())

    second = launcher.submit(first.plan, {})

    assert end_of(second).phase == Phase.ENDED_OK
    assert launcher.watch(first).phase == Phase.RUNNING
    assert launcher.find(first.plan) == first
    assert starts() == [1]
    launcher.cancel(first)
    assert not psutil.pid_exists(first.external["pid"])


RANKS = """
import os, signal, time, torch, torch.distributed as dist
from roma_core.job import JobFolder
from roma_core.run_job import Work, run_in_folder

def work(folder, attempt):
    dist.init_process_group("gloo")
    (folder.checkpoints / f"step-{attempt.n}").mkdir(parents=True, exist_ok=True)
    if attempt.n == 1 and dist.get_rank() == 0:  # torchrun must not end it before it finds its peer gone
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while attempt.n == 1:  # until rank 1 is killed
        dist.all_reduce(torch.ones(10))
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    return Work("completed", dist.get_world_size())

raise SystemExit(run_in_folder(JobFolder(os.environ["ROMA_JOB_FOLDER"]), work))
"""


def test_a_job_continues_whose_rank_was_killed(launcher, folder, make_spec, tmp_path):
    spec = make_spec(runner="torchrun", processes_per_node=2)
    (tmp_path / "job.py").write_text(RANKS)

    outcome = supervise(launcher, folder, spec, {"base_lr": 0.001}, poll_every_s=0.05)

    assert [record.end.status for record in outcome.attempts] == ["continue", "completed"]
    assert folder.attempt(1).read_exit().status == "failed"
    assert "peer" in outcome.attempts[0].end.reason
