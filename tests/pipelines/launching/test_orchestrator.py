"""A real Dagster (web server, daemon, run workers) over a real SLURM: who ends what.

Terminate ends the job. A worker that is killed, and an orchestrator that is killed and started again,
do not: the reconcile sensor fails the run, Dagster retries it, and the retry adopts the job.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

import roma_pipelines
from roma_pipelines.launching.jobs import all_jobs, read_job
from tests.pipelines.launching.conftest import PRELUDE
from tests.time_limits import within

ROOT = Path(__file__).parents[3]
LOCATION = {"location_file": str(Path(__file__).with_name("dagster_location.py"))}

LAUNCH = """
mutation($selector: JobOrPipelineSelector!) {
  launchRun(executionParams: {selector: $selector, mode: "default"}) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on Error { message }
  }
}
"""
TERMINATE = """
mutation($id: String!) { terminateRun(runId: $id) { __typename } }
"""
RUNS = "query { runsOrError { ... on Runs { results { runId status } } } }"


class Orchestrator:
    """``dagster dev`` with an instance of its own."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        home = root / "dagster"
        home.mkdir()
        shutil.copyfile(
            Path(roma_pipelines.__file__).parent / "dagster.yaml", home / "dagster.yaml"
        )
        workspace = {"load_from": [{"python_file": {
            "relative_path": LOCATION["location_file"], "location_name": "tests"}}]}  # fmt: skip
        (root / "workspace.yaml").write_text(json.dumps(workspace))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {
            **os.environ,
            **environment,
            "DAGSTER_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "ROMA_STORAGE_ROOT": str(root),
        }
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", "dagster", "dev", "-w", str(self.root / "workspace.yaml")]
        with (self.root / "dagster.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, "-h", "127.0.0.1", "-p", str(self.port)],
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + within(60)
        while True:
            try:
                self.ask("query { version }")
                return
            except OSError:
                assert time.monotonic() < deadline, (self.root / "dagster.log").read_text()[-3000:]
                time.sleep(0.3)

    def processes(self) -> list[psutil.Process]:
        """All of it: servers, daemon and run workers; no jobs, which are not below it."""
        home = self.environment["DAGSTER_HOME"]
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            environ = process.info["environ"] or {}
            alive = process.info["status"] != psutil.STATUS_ZOMBIE
            if alive and environ.get("DAGSTER_HOME") == home and "ROMA_JOB_FOLDER" not in environ:
                found.append(process)
        return found

    def kill(self) -> None:
        """Every process of it at once, with no time to say anything."""
        while left := self.processes():
            for process in left:
                process.kill()
            psutil.wait_procs(left, timeout=within(5))
        self.process.wait()

    def ask(self, query: str, **variables: object) -> dict:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=within(10)) as answer:
            document = json.load(answer)
        assert "errors" not in document, document
        return document["data"]

    def launch(self) -> str:
        selector = {
            "repositoryLocationName": "tests",
            "repositoryName": "__repository__",
            "jobName": "__ASSET_JOB",
            "assetSelection": [{"path": ["encoder"]}],
        }
        answer = self.ask(LAUNCH, selector=selector)["launchRun"]
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def statuses(self) -> dict[str, str]:
        runs = self.ask(RUNS)["runsOrError"]["results"]
        return {run["runId"]: run["status"] for run in runs}


@pytest.fixture(scope="module")
def orchestrator(shared_cluster, tmp_path_factory):
    root = tmp_path_factory.mktemp("orchestrator")
    (root / "mini.yaml").write_text("poll_s: 0.3\nslowest_poll_s: 1\nmemory_gb: 2\n")
    (root / "job.py").write_text(
        PRELUDE
        + "save(n)\nsay('opened', extras={})\nwait_for('go', 300)\nsucceed()\nsay('closed')\n"
    )
    orchestrator = Orchestrator(
        root,
        {
            "ROMA_ENV_FILE": os.devnull,
            "ROMA_SLURM_PROFILES": str(root),
            "ROMA_SLURM_PROFILE": "mini",
            "TEST_SCRIPT": str(root / "job.py"),
            "TEST_TARGET": "slurm",
            **shared_cluster.variables,
        },
    )
    try:
        orchestrator.start()
        yield orchestrator
    finally:
        orchestrator.kill()


@pytest.fixture
def running(orchestrator, cluster, eventually):
    """A run whose job runs; its run id and its job."""
    before = {job.key for job in all_jobs(orchestrator.root / "jobs")}
    run_id = orchestrator.launch()
    found = []

    def runs():
        jobs = all_jobs(orchestrator.root / "jobs")
        found[:] = [job for job in jobs if job.key not in before and job.checkpoint is not None]
        return found

    eventually(runs, 60)
    return run_id, found[0]


def now(job):
    return next(j for j in all_jobs(job.folder.path.parent) if j.key == job.key)


def state_of(cluster, job):
    return {job_id: state for job_id, _, state in cluster.jobs()}[
        job.records[-1].external["job_id"]
    ]


@pytest.mark.slow
def test_terminate_ends_the_job(orchestrator, running, cluster, eventually):
    run_id, job = running

    orchestrator.ask(TERMINATE, id=run_id)

    eventually(lambda: state_of(cluster, now(job)) == "CANCELLED", 60)
    eventually(lambda: orchestrator.statuses()[run_id] == "CANCELED", 60)
    assert now(job).status == "cancelled"


CLUSTERS = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
WEATHER = """
import json, os, sys, time
folder = os.environ["ROMA_JOB_FOLDER"]
assert sys.argv[1:] == ["--epochs", "20"]
open(folder + "/started-" + os.environ["RANK"], "x").close()
while not os.path.exists(folder + "/go"):
    time.sleep(0.05)
if os.environ["RANK"] == "0":
    json.dump({"accuracy": 0.93}, open(folder + "/outputs/metrics.json", "w"))
"""
MATERIALIZE = """
import dagster as dg, definitions
with dg.DagsterInstance.local_temp("dagster") as instance:
    killed = [run.run_id for run in instance.get_runs()]
    marks = dict.fromkeys(["dagster/parent_run_id", "dagster/root_run_id"], *killed)
    tags = {"dagster/is_resume_retry": "true", **marks} if killed else {}  # as the daemon's retry
    job = definitions.defs.resolve_implicit_global_asset_job_def()
    (event,) = job.execute_in_process(instance=instance, tags=tags).get_asset_materialization_events()
    print(event.materialization.metadata["accuracy"].value)
"""


@pytest.fixture
def project(cluster, tmp_path):
    """The project of docs/clusters.md; starts its materialisation in a process of its own."""
    (tmp_path / "dagster").mkdir()
    (tmp_path / "weather").mkdir()
    (tmp_path / "weather" / "train.py").write_text(WEATHER)
    _, _, section = CLUSTERS.partition("## In your own Dagster project\n")
    block = section.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "definitions.py").write_text(block)
    (tmp_path / "leonardo.yaml").write_text("poll_s: 0.2\nslowest_poll_s: 0.4\nmemory_gb: 2\n")
    variables = {
        "PYTHONPATH": str(ROOT),
        "ROMA_ENV_FILE": os.devnull,
        "ROMA_STORAGE_ROOT": str(tmp_path / "roma"),
        "ROMA_SLURM_PROFILES": str(tmp_path),
    }

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", MATERIALIZE],
            cwd=tmp_path,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "dagster.log").open("a"),
            text=True,
        )

    return start


@pytest.mark.slow
def test_another_project_that_is_killed_and_started_again_has_one_job(
    project, tmp_path, cluster, eventually
):
    first = project()
    eventually(lambda: len(list(tmp_path.glob("roma/jobs/*/started-*"))) == 4, 60)
    first.kill()
    first.communicate()
    (folder,) = tmp_path.glob("roma/jobs/*")
    assert not read_job(folder).supervised

    second = project()
    eventually(lambda: read_job(folder).supervised, 60)
    (folder / "go").touch()

    output, _ = second.communicate(timeout=within(60))
    assert output == "0.93\n", (tmp_path / "dagster.log").read_text()[-3000:]
    assert read_job(folder).status == "completed"
    names = [name for _, name, _ in cluster.jobs()]
    assert [name for name in names if folder.name[:12] in name] == [f"roma-{folder.name[:12]}-1"]


def worker_of(job):
    return psutil.Process(now(job).lease["pid"])


def settled(orchestrator, job, cluster, eventually):
    """Lets the job end, and waits for the run that made the asset; returns all statuses."""
    first = dict(orchestrator.statuses())
    eventually(lambda: len(orchestrator.statuses()) > len(first), 120)
    eventually(lambda: now(job).supervised, 120)
    (job.folder.path / "go").touch()
    eventually(lambda: "SUCCESS" in orchestrator.statuses().values(), 60)
    ended = now(job)
    assert ended.status == "completed"
    assert (job.folder.path / "starts").read_text() == "1\n"
    names = [name for _, name, _ in cluster.jobs()]
    assert names.count(f"roma-{job.key[:12]}-1") == 1
    return orchestrator.statuses()


@pytest.mark.chaos
def test_a_worker_killed_with_9_is_followed_by_a_retry_that_adopts(
    orchestrator, running, cluster, eventually
):
    run_id, job = running

    worker_of(job).kill()

    statuses = settled(orchestrator, job, cluster, eventually)
    assert statuses[run_id] == "FAILURE"
    assert "adopted it" in job.folder.events.read_text()


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_an_orchestrator_that_goes_and_comes_leaves_the_job_alone(
    orchestrator, running, cluster, eventually, how
):
    _, job = running

    if how == "killed":
        orchestrator.kill()
    else:
        orchestrator.process.send_signal(signal.SIGINT)
        orchestrator.process.wait(60)
        orchestrator.kill()  # what it left
    assert state_of(cluster, job) == "RUNNING"
    orchestrator.start()

    before = [s for s in orchestrator.statuses().values() if s == "SUCCESS"]
    eventually(lambda: now(job).supervised, 150)
    (job.folder.path / "go").touch()
    eventually(
        lambda: len([s for s in orchestrator.statuses().values() if s == "SUCCESS"]) > len(before),
        60,
    )
    assert now(job).status == "completed"
    assert (job.folder.path / "starts").read_text() == "1\n"
    assert "adopted it" in job.folder.events.read_text()
