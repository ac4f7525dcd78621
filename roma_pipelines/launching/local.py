"""The target ``local``: processes on this computer that outlive the process which started them.

An attempt is a session of its own, so neither Ctrl-C nor the end of the orchestrator reaches it. It
is identified by process id and start time of its first process; its other processes (torchrun gives
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
from roma_core.job import JobFolder
from roma_core.trainer.config import MAX_THREADS
from roma_pipelines.launching import launcher
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase, Plan

# Signals by which a process is ended from outside; any other is the process's own crash.
_FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}

# Children belong to this process, not to a launcher object: only here their exit code is known.
_children: dict[tuple[int, str], subprocess.Popen[bytes]] = {}

_FREE_PORT = "FREE_PORT"
# Of GNU OpenMP, which torch has on Linux. Threads that wait for others sleep soon: else they keep these from
# the cores where two jobs share them, and both were 28 times slower on two cores.
_SHARED_CORES = {"GOMP_SPINCOUNT": "1000"}
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.05


class LocalLauncher:
    backend = "local"
    profile = None
    fs_lag_s = 0.0

    def __init__(self, python: str = sys.executable, grace_s: float = 30.0) -> None:
        """``grace_s``: seconds between SIGTERM and SIGKILL; a checkpoint should fit in."""
        self.python, self.grace_s = python, grace_s

    def plan(
        self, spec: JobSpec, folder: JobFolder = launcher.PLANNED_FOLDER, attempt: int = 1
    ) -> Plan:
        if spec.nodes != 1:
            raise ValueError(
                f"the target local is one computer, the job asks for nodes={spec.nodes}; "
                f"use nodes=1 with more processes_per_node, or another target"
            )
        python = "python" if folder == launcher.PLANNED_FOLDER else self.python
        scratch = str(folder.attempt(attempt).path / "torchrun")
        argv = launcher.program(spec, python, "0", "127.0.0.1", _FREE_PORT, scratch)
        argv = launcher.claimed(folder, attempt, python, argv)
        variables = launcher.process_variables(spec) | _SHARED_CORES
        return Plan(spec, folder, attempt, launcher.render(spec, argv, variables), argv)

    def preflight(self, plan: Plan) -> list[str]:
        return []  # whatever is wrong shows at the start, which is at once

    def submit(self, plan: Plan, environment: Mapping[str, str]) -> JobHandle:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = f"--master-port={probe.getsockname()[1]}"
        argv = [port if word == f"--master-port={_FREE_PORT}" else word for word in plan.content]
        log = plan.files.log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                argv,
                cwd=plan.folder.path,
                env={
                    **launcher.inherited(),
                    **launcher.process_variables(plan.spec),
                    **_SHARED_CORES,
                    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
                    **_mark(plan),
                    **launcher.passthrough_env(plan.spec, environment),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        start = process_start(child.pid)
        assert start is not None, "a child that was not waited for has an entry"
        _children[child.pid, start] = child
        return JobHandle(plan, {"pid": child.pid, "start": start})

    def find(self, plan: Plan) -> JobHandle | None:
        owner = plan.files.read_owner()
        if owner is None:  # a process may have been started that has not claimed it yet
            mark = launcher.claimed(plan.folder, plan.attempt, "", [])[1:5]
            for process in psutil.process_iter(["cmdline"]):
                start = process_start(process.pid)
                if (process.info["cmdline"] or [])[1:5] == mark and start is not None:
                    return JobHandle(plan, {"pid": process.pid, "start": start})
            owner = plan.files.read_owner()  # it may have claimed meanwhile
        return JobHandle(plan, {name: owner[name] for name in ("pid", "start")}) if owner else None

    def watch(self, handle: JobHandle) -> JobState:
        pid, start = handle.external["pid"], handle.external["start"]
        child = _children.get((pid, start))
        if child.poll() is None if child else is_running(pid, start):
            return JobState(Phase.RUNNING, f"process {pid}")
        owner = self.find(handle.plan)
        if owner is None or owner.external == handle.external:  # else a second start, which left
            self.cancel(handle)  # the first process is gone, its children may not be
        if child is None:
            return JobState(Phase.GONE, f"process {pid} ended, and its exit code is not known")
        code = child.returncode
        if code == 0:
            return JobState(Phase.ENDED_OK)
        if code > 0:
            return JobState(Phase.ENDED_BAD, f"exit code {code}")
        phase = Phase.INTERRUPTED if -code in _FROM_OUTSIDE else Phase.ENDED_BAD
        return JobState(phase, f"ended by signal {-code}: {signal.strsignal(-code)}")

    def cancel(self, handle: JobHandle) -> None:
        pid, start = handle.external["pid"], handle.external["start"]
        if is_running(pid, start):
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(pid, signal.SIGTERM)  # torchrun passes it on to its workers
        else:
            self._signal(handle, signal.SIGTERM)
        if self._wait_gone(handle, self.grace_s):
            return
        self._signal(handle, signal.SIGKILL)
        if not self._wait_gone(handle, _KILL_TIMEOUT_S):
            left = [process.pid for process in self._processes(handle)]
            raise RuntimeError(
                f"processes {left} of attempt {handle.plan.attempt} in {handle.plan.folder.path} "
                f"survive SIGKILL; they may wait for a disk or a device: look at them with ps"
            )

    def _processes(self, handle: JobHandle) -> list[psutil.Process]:
        """All living processes of the attempt, in any session."""
        mark = _mark(handle.plan).items()
        pid, start = handle.external["pid"], handle.external["start"]

        def belongs(process: psutil.Process) -> bool:
            if process.pid == os.getpid() or process.info["status"] == psutil.STATUS_ZOMBIE:
                return False
            first = process.pid == pid and process_start(pid) == start
            return first or mark <= (process.info["environ"] or {}).items()

        return list(filter(belongs, psutil.process_iter(["environ", "status"])))

    def _signal(self, handle: JobHandle, number: signal.Signals) -> None:
        for process in self._processes(handle):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself
                process.send_signal(number)

    def _wait_gone(self, handle: JobHandle, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        child = _children.get((handle.external["pid"], handle.external["start"]))
        while True:
            if not self._processes(handle):
                if child:
                    child.wait()  # reap it
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)


def _mark(plan: Plan) -> dict[str, str]:
    return {FOLDER_VARIABLE: str(plan.folder.path), ATTEMPT_VARIABLE: str(plan.attempt)}


def gpus_here() -> int | None:
    """GPUs of this computer; None where NVIDIA's device files cannot be counted."""
    if sys.platform != "linux" or any(Path(p).exists() for p in ("/dev/kfd", "/dev/dxg")):
        return None  # another vendor's, or Windows Subsystem for Linux
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))


def threads_here(n_processes: int) -> int:
    """CPU threads of each of so many processes: this computer's cores shared, at most 8.

    OMP_NUM_THREADS comes first, where it is a number.
    """
    if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(asked):
        return int(asked)
    from joblib import cpu_count  # respects affinity and the quota of a container

    n_cores = min(cpu_count(), psutil.cpu_count(logical=False) or cpu_count())
    return max(1, min(MAX_THREADS, n_cores // n_processes))


def exceeds_this_computer(spec: JobSpec) -> list[str]:
    """Resources asked for that this computer does not have.

    Not part of the preflight: an experiment sized for a cluster also runs here, with what there is.
    """
    memory_gb = round(psutil.virtual_memory().total / 1e9)
    gpus = (float(spec.gpus_per_node), gpus_here(), "GPUs")
    sizes = [gpus, (spec.memory_gb or 0.0, memory_gb, "GB of memory")]
    return [
        f"{asked:g} {unit} are asked for, this computer has {there}; ask for at most that, or choose "
        f"another target"
        for asked, there, unit in sizes
        if there is not None and asked > there
    ]
