"""Tiny real jobs: a script of a few lines in place of a training, under the real launcher."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from roma_core.files import digest_of
from roma_core.job import JobFolder
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.slurm.launcher import SlurmLauncher
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.spec import JobSpec, Phase
from tests.pipelines.launching.slurm.real_slurm import Cluster, real_slurm
from tests.time_limits import SCALE, wait_until, within

KEY = "0123456789abcdef0123"
CONFIG = {"base_lr": 0.001}

PRELUDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

folder = Path(os.environ["ROMA_JOB_FOLDER"])
n = int(os.environ["ROMA_JOB_ATTEMPT"])
attempt = folder / "attempts" / str(n)
key = json.loads((folder / "spec.json").read_text())["key"]
with (folder / "starts").open("a") as file:
    file.write(f"{n}\\n")

def write(path, **document):
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps({"schema_version": 1, **document}))
    aside.replace(path)

def succeed(job_key=key, world_size=1):
    write(folder / "result.json", job_key=job_key, attempt=n, world_size=world_size, wall_s=1.5)
    write(attempt / "exit.json", status="completed")

def leave(status, reason=""):
    write(attempt / "exit.json", status=status, reason=reason)

def save(step):
    (folder / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)

def say(method, **params):
    with (folder / "messages.jsonl").open("a") as file:
        file.write(json.dumps({"method": method, "params": params}) + "\\n")

def beat(step):
    write(attempt / "heartbeat", time=time.time(), step=step)

def wait_for(name, seconds=20):
    end = time.monotonic() + seconds * TIME_SCALE
    while not (folder / name).exists():
        assert time.monotonic() < end, f"{name} did not come"
        time.sleep(0.01)
""".replace("TIME_SCALE", str(SCALE))


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "jobs" / KEY)


@pytest.fixture
def launcher() -> LocalLauncher:
    return LocalLauncher(grace_s=2.0)


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm") / "c"
    with real_slurm(folder) as cluster:
        yield cluster
    assert _processes_naming(str(folder)) == []


def _processes_naming(words: str) -> list[str]:
    """Command lines of living processes that have these words in it or in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ", "status"]):
        variables = [f"{k}={v}" for k, v in (process.info["environ"] or {}).items()]
        line = " ".join(process.info["cmdline"] or [])
        if process.info["status"] == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
            continue
        if words in line or any(words in variable for variable in variables):
            found.append(line)
    return found


@pytest.fixture
def cluster(shared_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A real SLURM of two nodes, idle; this process's SLURM commands talk to it."""
    for name, value in shared_cluster.variables.items():
        monkeypatch.setenv(name, value)
    yield shared_cluster
    shared_cluster.settle()


@pytest.fixture
def profile() -> SlurmProfile:
    """The cluster's profile: quick to ask, and a network between nodes that is the loopback."""
    return SlurmProfile(
        name="mini",
        poll_s=0.2,
        slowest_poll_s=0.4,
        memory_gb=2,
        time_limit_min=5,
        environment={"GLOO_SOCKET_IFNAME": "lo"},
    )


@pytest.fixture
def slurm(cluster: Cluster, profile: SlurmProfile, tmp_path: Path) -> SlurmLauncher:
    return SlurmLauncher(
        profile, tmp_path / "clusters", gone_after_s=2.0, cancel_timeout_s=within(10), fs_lag_s=0.0
    )


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., JobSpec]:
    """Builds the spec of a job that runs the given lines after PRELUDE."""

    def make(body: str = "succeed()", **fields: object) -> JobSpec:
        script = tmp_path / "job.py"
        script.write_text(PRELUDE + body + "\n")
        values = {"runner": "plain", "command": (str(script),), **fields}
        return JobSpec(key=KEY, config_digest=digest_of(CONFIG), **values)  # type: ignore[arg-type]

    return make


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Waits until a condition holds, and fails if it does not in time."""
    return lambda condition, seconds=10.0: wait_until(condition, seconds)


@pytest.fixture
def starts(folder: JobFolder) -> Callable[[], list[int]]:
    """Numbers of the attempts whose program began, in order."""
    return lambda: [int(line) for line in (folder.path / "starts").read_text().split()]


@pytest.fixture
def once(folder):
    """An ``on_poll`` that acts once, when the attempt runs and its program has come so far."""

    def make(act, when=lambda: folder.checkpoints.exists()):
        done = []

        def on_poll(state):
            if not done and state.phase is Phase.RUNNING and when():
                done.append(True)
                act()

        return on_poll

    return make


@pytest.fixture
def stand_in(tmp_path, cluster, monkeypatch):
    """Puts a script in the place of one of SLURM's commands; ``$REAL`` is the command itself."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name, body):
        real = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
        path = folder / name
        path.write_text(f"#!/bin/bash\nREAL={real}\n{body}\n")
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[], list[psutil.Process]]:
    """Living processes of any job of this test."""

    def processes() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            job = (process.info["environ"] or {}).get("ROMA_JOB_FOLDER", "")
            if process.info["status"] != psutil.STATUS_ZOMBIE and job.startswith(str(tmp_path)):
                found.append(process)
        return found

    return processes


_CACHES = frozenset(
    [".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache", ".hypothesis"]
)


def _tree() -> set[str]:
    """Files of the project's own folder, without caches."""
    found = set()
    for folder, folders, files in os.walk(Path(__file__).parents[3]):
        folders[:] = [name for name in folders if name not in _CACHES]
        found |= {os.path.join(folder, name) for name in files}  # noqa: PTH118 - thousands
    return found


@pytest.fixture(autouse=True)
def no_file_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files of every process of the test are gone, and the project's folder is as it was."""
    temporary = tmp_path / "TMPDIR"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    before = _tree()
    yield
    left = [path.name for path in temporary.iterdir()]
    # torch keeps what it compiled there for later processes
    assert [name for name in left if not name.startswith("torchinductor_")] == []
    assert sorted(_tree() - before) == []


@pytest.fixture(autouse=True)
def nothing_is_left_running(processes: Callable[[], list[psutil.Process]]) -> Iterator[None]:
    yield
    left = processes()
    for process in left:
        process.kill()
    assert not left
