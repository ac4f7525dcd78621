"""The target ``local``: processes on this computer that outlive whoever started them.

An attempt is a session of its own, so no Ctrl-C and no end of the orchestrator reaches it. It is
known by the process id and start time of its first process; its other processes (torchrun gives
every worker a session of its own) by the two variables that name folder and attempt. Limits of
memory and time are not enforced here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from roma_core.claim import ATTEMPT_VARIABLE, FOLDER_VARIABLE, is_running, process_start
from roma_core.files import read_json
from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import (
    inherited,
    passthrough_env,
    plan_local,
    process_variables,
    render,
)
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase

# Signals by which somebody else ends a process; any other is the process's own crash.
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}

# A child belongs to its process, not to a launcher object: only here its exit code is ever told.
_children: dict[tuple[int, str], subprocess.Popen[bytes]] = {}

_KILL_TIMEOUT_S = 10.0
_LOOK_EVERY_S = 0.05


def gpus_here() -> int | None:
    """GPUs of this computer; None where counting NVIDIA's devices does not tell."""
    if sys.platform != "linux" or any(Path(p).exists() for p in ("/dev/kfd", "/dev/dxg")):
        return None  # another maker's, or those of a Windows around this Linux
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))


def more_than_here(spec: JobSpec) -> list[str]:
    """What is asked for that this computer has not.

    No part of the preflight: an experiment sized for a cluster also runs here, with what there is.
    """
    found = []
    if (there := gpus_here()) is not None and spec.gpus_per_node > there:
        found.append(
            f"{spec.gpus_per_node} GPUs are asked for, this computer has {there}; ask for at most "
            f"that, or choose another target"
        )
    if spec.memory_gb and spec.memory_gb > (most := psutil.virtual_memory().total / 1e9):
        found.append(
            f"{spec.memory_gb:g} GB of memory are asked for, this computer has {most:.0f}; ask for at "
            f"most that, or choose another target"
        )
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _state_of(code: int) -> JobState:
    if code == 0:
        return JobState(Phase.ENDED_OK)
    if code > 0:
        return JobState(Phase.ENDED_BAD, f"exit code {code}")
    phase = Phase.INTERRUPTED if -code in _FROM_OUTSIDE else Phase.ENDED_BAD
    return JobState(phase, f"ended by signal {-code}: {signal.strsignal(-code)}")


class LocalLauncher:
    """Runs attempts as processes of this computer."""

    backend = "local"
    price = None
    fs_lag_s = 0.0

    def __init__(self, python: str = sys.executable, grace_s: float = 30.0) -> None:
        """
        Args:
            python: the interpreter that runs the job.
            grace_s: seconds between asking a job to end and killing it; a checkpoint should fit.
        """
        self.python = python
        self.grace_s = grace_s

    def plan(self, spec: JobSpec, folder: str = "JOB_FOLDER", attempt: int = 1) -> str:
        argv = plan_local(spec, folder, attempt, "python", "FREE_PORT")
        return render(spec, argv, process_variables(spec))

    def preflight(self, spec: JobSpec, folder: JobFolder) -> list[str]:
        return []  # processes of this computer need nothing that a start does not tell at once

    def submit(
        self, spec: JobSpec, folder: JobFolder, attempt: int, environment: Mapping[str, str]
    ) -> JobHandle:
        path = folder.path.resolve()
        argv = plan_local(spec, path, attempt, self.python, _free_port())
        log = folder.attempt(attempt).log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                argv,
                cwd=path,
                env=self._environment(spec, path, attempt, environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        start = process_start(child.pid)
        assert start is not None, "a child that was not waited for has an entry"
        _children[child.pid, start] = child
        return self._handle(folder, attempt, child.pid, start)

    def find(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        owner = folder.attempt(attempt).owner
        if not owner.exists():
            starting = self._starting(folder, attempt)
            if starting is not None or not owner.exists():  # it may have claimed meanwhile
                return starting
        document = read_json(owner, schema_version=1)
        return self._handle(folder, attempt, document["pid"], document["start"])

    def watch(self, handle: JobHandle) -> JobState:
        pid, start = handle.external["pid"], handle.external["start"]
        child = _children.get((pid, start))
        if child.poll() is None if child else is_running(pid, start):
            return JobState(Phase.RUNNING, f"process {pid}")
        owner = self.find(JobFolder(handle.folder), handle.attempt)
        if owner is None or owner == handle:  # else this was a second start, which left
            self.cancel(handle)  # the first process is gone, those it started may not be
        if child is None:
            return JobState(Phase.GONE, f"process {pid} ended while nobody waited for it")
        return _state_of(child.returncode)

    def cancel(self, handle: JobHandle) -> None:
        pid, start = handle.external["pid"], handle.external["start"]
        if is_running(pid, start):
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(pid, signal.SIGTERM)  # torchrun passes it on to its workers
        else:
            self._signal(self._processes(handle), signal.SIGTERM)
        if self._wait_gone(handle, self.grace_s):
            return
        self._signal(self._processes(handle), signal.SIGKILL)
        if not self._wait_gone(handle, _KILL_TIMEOUT_S):
            left = [process.pid for process in self._processes(handle)]
            raise RuntimeError(
                f"processes {left} of attempt {handle.attempt} in {handle.folder} survive SIGKILL; "
                f"they may wait for a disk or a device: look at them with ps"
            )

    def _environment(
        self, spec: JobSpec, folder: Path, attempt: int, environment: Mapping[str, str]
    ) -> dict[str, str]:
        return {
            **inherited(),
            **process_variables(spec),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
            FOLDER_VARIABLE: str(folder),
            ATTEMPT_VARIABLE: str(attempt),
            **passthrough_env(spec, environment),
        }

    def _handle(self, folder: JobFolder, attempt: int, pid: int, start: str) -> JobHandle:
        external = {"pid": pid, "start": start}
        return JobHandle(str(folder.path.resolve()), attempt, self.backend, external)

    def _starting(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        """A process that was started for this attempt and has not claimed it yet."""
        mark = ["-m", "roma_core.claim", str(folder.path.resolve()), str(attempt)]
        for process in psutil.process_iter(["cmdline"]):
            start = process_start(process.pid)
            if (process.info["cmdline"] or [])[1:5] == mark and start is not None:
                return self._handle(folder, attempt, process.pid, start)
        return None

    def _processes(self, handle: JobHandle) -> list[psutil.Process]:
        """All living processes of the attempt, in whatever session they are."""
        mark = {FOLDER_VARIABLE: handle.folder, ATTEMPT_VARIABLE: str(handle.attempt)}.items()
        pid, start = handle.external["pid"], handle.external["start"]
        found = []
        for process in psutil.process_iter(["environ", "status"]):
            if process.pid == os.getpid() or process.info["status"] == psutil.STATUS_ZOMBIE:
                continue
            if (process.pid == pid and process_start(pid) == start) or mark <= (
                process.info["environ"] or {}
            ).items():
                found.append(process)
        return found

    def _signal(self, processes: list[psutil.Process], number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
                process.send_signal(number)

    def _wait_gone(self, handle: JobHandle, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        child = _children.get((handle.external["pid"], handle.external["start"]))
        while True:
            if not self._processes(handle):
                if child:
                    child.wait()  # it ended: let its entry go too
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_EVERY_S)
