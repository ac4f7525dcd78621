"""``deploy/slurm/run_experiment.sh`` on a real SLURM of two nodes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.time_limits import within

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "run_experiment.sh"
WORDS = [
    "--name",
    "a b",
    "it's",
    '"quoted"',
    "$(touch evil)",
    "$$ ${local_rank}",
    "`id`",
    "*",
    "--",
    "",
    "täglich",
]

MODULE = """
import json, os, sys
from pathlib import Path
Path(f"rank-{os.environ['RANK']}.json").write_text(json.dumps({name: os.environ.get(name) for name in (
    "RANK", "WORLD_SIZE", "SLURMD_NODENAME", "OMP_NUM_THREADS", "ROMA_TRAINER_BASE_LR", "PLAIN",
    "QUOTED", "TRICKY", "GIVEN")} | {"argv": sys.argv[1:]}))
sys.exit(int(os.environ.get("CODE", "0")))
"""

RESUMING = """
import os, signal, sys, time
from pathlib import Path
if Path("saved").exists():
    print("resumed", flush=True)
    sys.exit(0)
def save(number, frame):
    Path("saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
Path("started").touch()
time.sleep(100)
"""


@pytest.fixture
def submit(cluster, tmp_path):
    """Submits the script from ``tmp_path`` and waits; returns exit code and log."""
    venv = f"VIRTUALENV_LOC={Path(sys.prefix)}"
    (tmp_path / "mine.py").write_text(MODULE)

    def submit(*words, options=(), env=(), while_it_runs=None):
        lines = [venv, "GLOO_SOCKET_IFNAME=lo", *env]
        (tmp_path / ".env").write_text("# mine\n" + "\n".join(lines))
        argv = ["sbatch", "--parsable", "--mem=2G", *options, str(SCRIPT), *words]
        job = cluster.run(*argv, cwd=tmp_path).strip()
        if while_it_runs:
            while_it_runs(job)
        deadline = time.monotonic() + within(60)
        while True:  # sbatch --wait looks every ten seconds only
            words = cluster.run("scontrol", "-o", "show", "job", job).split()
            record = dict(word.split("=", 1) for word in words if "=" in word)
            if record["JobState"] in ("COMPLETED", "FAILED"):
                break
            assert time.monotonic() < deadline, record
            time.sleep(0.2)
        log = tmp_path / f"roma-{job}.log"
        return int(record["ExitCode"].split(":")[0]), log.read_text()

    return submit


@pytest.fixture
def worlds(tmp_path):
    """What each process saw, by rank."""
    return lambda: [json.loads(p.read_text()) for p in sorted(tmp_path.glob("rank-*.json"))]


def test_two_nodes_with_two_processes_get_every_argument_intact(submit, worlds, tmp_path):
    options = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=4")
    env = ("ROMA_TRAINER_BASE_LR=0.5", "PLAIN=a b", "QUOTED='{\"x\": 1}'", "TRICKY=$(touch evil)")

    code, log = submit("mine", *WORDS, options=options, env=env)

    assert code == 0, log
    found = worlds()
    assert [world["RANK"] for world in found] == ["0", "1", "2", "3"]
    assert {world["WORLD_SIZE"] for world in found} == {"4"}
    assert [world["SLURMD_NODENAME"] for world in found] == ["n1", "n1", "n2", "n2"]
    assert {world["OMP_NUM_THREADS"] for world in found} == {"2"}
    assert all(world["argv"] == WORDS for world in found)
    assert found[0]["ROMA_TRAINER_BASE_LR"] == "0.5"
    assert (found[0]["PLAIN"], found[0]["QUOTED"]) == ("a b", '{"x": 1}')
    assert found[0]["TRICKY"] == "$(touch evil)"
    assert not (tmp_path / "evil").exists()


def test_the_environment_wins_over_the_file(submit, worlds):
    submit("-m", "mine", options=("--export=ALL,GIVEN=here",), env=("GIVEN=file",))

    (world,) = worlds()
    assert world["GIVEN"] == "here"


def test_a_failing_module_fails_the_job(submit, worlds):
    code, _ = submit("mine", env=("CODE=3",))

    assert code != 0
    assert len(worlds()) == 1


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        ((), (), "expected: sbatch"),
        (
            ("mine",),
            ("--export=ALL,VIRTUALENV_LOC=/no/such",),
            "there is no interpreter /no/such/bin/python",
        ),
    ],
)
def test_what_is_missing_is_said_and_fails(submit, words, options, message):
    code, log = submit(*words, options=options)

    assert (code, message in log) == (2, True), log


@pytest.fixture
def environment_modules(cluster, monkeypatch):
    """``module`` as sites hand it on: a function in the environment of whoever submits."""
    function = '() { case $2 in missing*) return 1 ;; *) export GIVEN="$GIVEN $2" ;; esac; }'
    monkeypatch.setitem(cluster.environment, "BASH_FUNC_module%%", function)


def test_modules_are_loaded_in_order(submit, worlds, environment_modules):
    code, log = submit("mine", env=('MODULES="cuda/12.1 python/3.11"',))

    assert code == 0, log
    assert worlds()[0]["GIVEN"] == " cuda/12.1 python/3.11"


def test_a_module_that_is_missing_is_named(submit, worlds, environment_modules):
    code, log = submit("mine", env=("MODULES=missing/1.0",))

    assert (code, "there is no environment module missing/1.0" in log) == (2, True), log
    assert worlds() == []


def test_outside_of_a_job_it_says_how_to_be_used(cluster):
    done = subprocess.run([SCRIPT, "mine"], env=cluster.environment, capture_output=True, text=True)

    assert (done.returncode, "inside a SLURM job" in done.stderr) == (2, True)


def test_before_the_limit_it_saves_requeues_and_goes_on(submit, cluster, tmp_path):
    (tmp_path / "resuming.py").write_text(RESUMING)

    def signal(job):
        deadline = time.monotonic() + within(40)
        while not (tmp_path / "started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster.run("scancel", "--batch", "--signal=USR1", job)

    code, log = submit("resuming", while_it_runs=signal)

    assert code == 0, log
    assert "start 1" in log and "requeueing" in log and "start 2" in log  # appended, not cut
    assert log.count("resumed") == 1
