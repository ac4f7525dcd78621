"""What process 1 of a pod does with the program's output: its log outlives the pod."""

import os
import subprocess
import sys

import pytest

from tests.time_limits import within


@pytest.fixture
def pod(tmp_path):
    """Runs a program of Python lines as a pod does; returns the finished process."""
    (tmp_path / "spec.json").write_text("{}")

    def run(body, index="0"):
        start = "import sys, roma_core.pod as pod; pod._OUTPUT_TIMEOUT_S = 0.2"
        start += "; sys.exit(pod.main(sys.argv[1:]))"
        return subprocess.run(
            [sys.executable, "-c", start, str(tmp_path), "1", "--", sys.executable, "-c", body],
            env={**os.environ, "ROMA_JOB_UID": "u", "JOB_COMPLETION_INDEX": index},
            capture_output=True,
            timeout=within(20),
        )

    return run


def test_output_is_in_the_log_and_on_stdout(pod, tmp_path):
    done = pod("import sys; print('out', flush=True); print('err', file=sys.stderr)")

    assert done.returncode == 0
    assert done.stdout == b"out\nerr\n"
    assert (tmp_path / "attempts" / "1" / "log").read_bytes() == b"out\nerr\n"


def test_every_other_pod_has_a_log_of_its_own(pod, tmp_path):
    pod("print('zero')")
    pod("print('one')", index="1")

    assert (tmp_path / "attempts" / "1" / "log").read_text() == "zero\n"
    assert (tmp_path / "attempts" / "1" / "log.1").read_text() == "one\n"


def test_a_pod_that_is_started_again_appends(pod, tmp_path):
    pod("print('first')")
    pod("print('second')")

    assert (tmp_path / "attempts" / "1" / "log").read_text() == "first\nsecond\n"


def test_the_last_output_of_a_killed_program_is_kept(pod, tmp_path):
    done = pod("import os; os.write(1, b'x' * 100_000 + b'end'); os.kill(os.getpid(), 9)")

    assert done.returncode == 137
    log = (tmp_path / "attempts" / "1" / "log").read_bytes()
    assert len(log) == 100_003 and log.endswith(b"end")


def test_a_log_that_cannot_be_written_does_not_stop_the_program(pod, tmp_path):
    (tmp_path / "attempts" / "1" / "log").mkdir(parents=True)

    done = pod("print('out')")

    assert (done.returncode, done.stdout) == (0, b"out\n")
    assert b"cannot write" in done.stderr


def test_a_process_that_keeps_the_output_open_does_not_hold_the_pod(pod):
    sleeper = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {!r}])"
    done = pod(sleeper.format("import time; time.sleep(2)") + "; print('out')")

    assert done.returncode == 0
