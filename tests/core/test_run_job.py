"""The first and the last acts of a job's process."""

import subprocess
import sys
import time

import pytest

from roma_core.claim import ATTEMPT_VARIABLE
from roma_core.job import JobFolder
from roma_core.run_job import Work, run_in_folder
from tests.time_limits import wait_until

RUN = """
import os, signal, subprocess, sys
from roma_core import job
from roma_core.run_job import Work, run_in_folder

write_exit = job.Attempt.write_exit

def write_late(attempt, end):
    (attempt.path / "writing").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    if "again" not in sys.argv:
        done = subprocess.run([sys.executable, *sys.argv, "again"], capture_output=True, text=True)
        (attempt.path / "second").write_text(done.stderr)
    write_exit(attempt, end)

def body(folder, attempt):
    if sys.argv[2] == "failed":
        raise RuntimeError("the disk is gone")
    return Work(sys.argv[2])

job.Attempt.write_exit = write_late
raise SystemExit(run_in_folder(job.JobFolder(sys.argv[1]), body))
"""


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("continue", 75), ("failed", 1)])
def test_reports_are_written_under_the_lock_whatever_signal_comes(tmp_path, status, code):
    script = tmp_path / "job.py"
    script.write_text(RUN)
    folder = JobFolder(tmp_path / "run")

    done = subprocess.run([sys.executable, script, folder.path, status])

    attempt = folder.attempt(1)
    assert (done.returncode, attempt.read_exit().status) == (code, status)
    assert (folder.read_result() is not None) == (status == "completed")
    if status != "failed":
        assert "another process runs in" in (attempt.path / "second").read_text()


@pytest.mark.parametrize("raised", [True, False])
def test_ctrl_c_is_an_interrupt_of_a_run_by_hand_and_an_end_of_a_job(tmp_path, monkeypatch, raised):
    def body(folder, attempt):
        if raised:
            raise KeyboardInterrupt
        return Work("continue", reason="SIGINT")

    with pytest.raises(KeyboardInterrupt, match="^$" if raised else "the same command resumes"):
        run_in_folder(JobFolder(tmp_path / "by_hand"), body)
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1")
    assert run_in_folder(JobFolder(tmp_path / "job"), body) == (1 if raised else 75)


def test_beats_go_on_while_the_process_computes_and_stop_while_it_waits(tmp_path):
    attempt = JobFolder(tmp_path).attempt(1)
    attempt.path.mkdir(parents=True)
    with attempt.beating(0.05) as advanced:
        while not attempt.heartbeat.exists():
            pass

        def is_quiet():
            last = attempt.heartbeat.read_text()
            time.sleep(0.3)
            return attempt.heartbeat.read_text() == last

        wait_until(
            is_quiet, 10, "the end of beats"
        )  # other threads of the test's process may compute
        last = attempt.heartbeat.read_text()
        advanced.set()
        while attempt.heartbeat.read_text() == last:
            time.sleep(0.01)
