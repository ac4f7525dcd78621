import json
import os
import subprocess
import sys

import pytest

from roma_core.claim import is_running, process_start
from roma_core.job import JobFolder


def start(folder, attempt, *program):
    argv = [sys.executable, "-m", "roma_core.claim", str(folder), str(attempt), "--", *program]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_the_program_takes_the_place_of_the_process_that_claimed(tmp_path):
    code = "import os; print(os.getpid(), os.environ['ROMA_JOB_FOLDER'], os.environ['ROMA_JOB_ATTEMPT'])"

    child = start(tmp_path, 2, sys.executable, "-c", code)
    printed = child.communicate()[0].split()

    owner = json.loads(JobFolder(tmp_path).attempt(2).owner.read_text())
    assert printed == [str(child.pid), str(tmp_path), "2"]
    assert (owner["schema_version"], owner["pid"]) == (1, child.pid)


def test_of_many_starts_one_runs_and_the_others_leave_with_0(tmp_path):
    children = [
        start(tmp_path, 1, sys.executable, "-c", "print('I run'); raise SystemExit(3)")
        for _ in range(4)
    ]
    printed = [child.communicate()[0] for child in children]

    assert sorted(child.returncode for child in children) == [0, 0, 0, 3]
    assert sum("I run" in text for text in printed) == 1
    assert sum("is taken by" in text for text in printed) == 3


def test_arguments_are_not_touched(tmp_path):
    words = ["a b", "$(id)", "'\"", "--", ""]

    child = start(
        tmp_path,
        1,
        sys.executable,
        "-c",
        "import sys, json; print(json.dumps(sys.argv[1:]))",
        *words,
    )

    assert json.loads(child.communicate()[0]) == words


@pytest.mark.parametrize(
    "arguments", [[], ["folder", "one", "--", "true"], ["folder", "1", "true"]]
)
def test_a_wrong_call_is_told_so(tmp_path, arguments):
    argv = [sys.executable, "-m", "roma_core.claim", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True)

    assert (done.returncode, done.stdout[:6]) == (2, "usage:")


def test_a_process_is_known_by_its_start_too():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    begun = process_start(child.pid)

    assert is_running(child.pid, begun)
    assert not is_running(child.pid, process_start(os.getpid()))  # its id, another's start
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, not reaped
    assert process_start(child.pid) == begun
    assert not is_running(child.pid, begun)
    child.communicate()
    assert process_start(child.pid) is None


def test_claiming_imports_nothing_slow():
    code = "import sys, roma_core.claim; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"pydantic", "psutil", "torch", "dagster"} & set(done.stdout.split())
