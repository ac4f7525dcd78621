"""The orchestrator killed with -9 at every named point of a whole experiment, and then its retry:
always one job per asset, one MLflow run per job, one model version. Once at each point alone, and
once at all of them, one after another, in the course of one experiment.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from roma_pipelines.launching.jobs import all_jobs
from roma_pipelines.launching.supervisor import FAULT_POINTS
from roma_pipelines.registry.store import MlflowSettings, connect
from tests.pipelines import tiny

pytestmark = pytest.mark.chaos
ROOT = Path(__file__).parents[3]
MLFLOW = ("find_or_create_run", "ended", "log_run", "register", "promote")
POINTS = (*FAULT_POINTS, *(f"{when} {name}" for name in MLFLOW for when in ("before", "after")))


def materialise(folder, *words):
    argv = [sys.executable, "-m", "tests.pipelines.launching.chaos_materialise", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "ROMA_STORAGE_ROOT": str(folder / "roma"),
        "ROMA_ENV_FILE": os.devnull,
    }
    with (folder / "log").open("ab") as log:
        done = subprocess.run([*argv, *words], cwd=folder, env=environment, stdout=log, stderr=log)
    return done.returncode


# in the order in which one experiment can come to them: a job that is adopted is not submitted
IN_TURN = (
    *("before intent", "after intent", "before submit", "after submit"),
    *("before log_run", "before find_or_create_run", "after find_or_create_run", "after log_run"),
    *("before end", "after end", "before ended", "after ended"),
    "after record",  # of the next job
    *("before register", "after register", "before promote", "after promote"),
)


@pytest.fixture
def folder(tmp_path, store_root):
    (tmp_path / "roma" / "mlflow").mkdir(parents=True)
    (store_root / "mlflow.db").rename(tmp_path / "roma" / "mlflow" / "mlflow.db")
    return tmp_path


@pytest.mark.parametrize("point", POINTS)
def test_one_job_one_run_one_version_wherever_it_was_killed(folder, point):
    kill_at(folder, point)

    finish(folder)


def test_one_of_each_after_a_kill_at_every_point_in_turn(folder):
    assert set(IN_TURN) == set(POINTS)
    for point in IN_TURN:
        print(point, flush=True)
        kill_at(folder, point)

    finish(folder)


def kill_at(folder, point):
    (folder / "hit").unlink(missing_ok=True)
    assert materialise(folder, point) == -signal.SIGKILL, (folder / "log").read_text()[-3000:]
    assert (folder / "hit").read_text() == point


def finish(folder):
    """The retry, and what there is to be afterwards."""
    assert materialise(folder) == 0, (folder / "log").read_text()[-3000:]

    jobs = all_jobs(folder / "roma" / "jobs")
    assert len(jobs) == 3
    assert all(job.status == "completed" for job in jobs)
    # a training that went on while nobody watched is adopted; nothing is ever run twice
    assert [len(job.records) for job in jobs] == [1, 1, 1]
    client = connect(MlflowSettings(), folder / "roma" / "mlflow")
    experiment = client.get_experiment_by_name("roma/waves")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["roma.job_key"] for run in runs) == sorted(job.key for job in jobs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    (version,) = client.search_model_versions("name = 'waves'")
    assert version.version == client.get_model_version_by_alias("waves", "champion").version
    assert tiny.living_jobs(folder) == []
