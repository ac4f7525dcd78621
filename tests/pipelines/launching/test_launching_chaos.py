"""The orchestrator killed with -9 at every named point of a whole experiment, and then its retry:
always one job per asset, one MLflow run per job, one model version.
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
MLFLOW = ("find_or_create_run", "end_run", "register", "promote")
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


@pytest.mark.parametrize("point", POINTS)
def test_one_job_one_run_one_version_wherever_it_was_killed(tmp_path, store_root, point):
    (tmp_path / "roma" / "mlflow").mkdir(parents=True)
    (store_root / "mlflow.db").rename(tmp_path / "roma" / "mlflow" / "mlflow.db")

    assert materialise(tmp_path, point) == -signal.SIGKILL
    assert (tmp_path / "hit").read_text() == point
    assert materialise(tmp_path) == 0, (tmp_path / "log").read_text()[-3000:]

    jobs = all_jobs(tmp_path / "roma" / "jobs")
    assert len(jobs) == 3
    assert all(job.status == "completed" for job in jobs)
    # a training that went on while nobody watched is adopted; nothing is ever run twice
    assert [len(job.records) for job in jobs] == [1, 1, 1]
    client = connect(MlflowSettings(), tmp_path / "roma" / "mlflow")
    experiment = client.get_experiment_by_name("roma/waves")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["roma.job_key"] for run in runs) == sorted(job.key for job in jobs)
    assert {run.info.status for run in runs} == {"FINISHED"}
    (version,) = client.search_model_versions("name = 'waves'")
    assert version.version == client.get_model_version_by_alias("waves", "champion").version
    assert tiny.living_jobs(tmp_path) == []
