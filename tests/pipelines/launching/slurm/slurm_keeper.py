"""Keeps the daemons of a small SLURM, and ends with everything below it when its input closes.

    python slurm_keeper.py FOLDER NODE…

The daemons run in the foreground as its children. It is their subreaper, so what slurmd sends to
the background (slurmstepd, jobs) comes back to it when slurmd ends: it kills what is below itself
and nothing else, even after a test run that was killed with -9, whose end closes its input.

Lines on standard input: ``kill NAME``, ``end NAME`` (politely), ``freeze NAME``, ``thaw NAME`` and
``start NAME``, for ``slurmctld`` or a node, and ``lose NAME``, a node with everything that runs on
it; each is answered by one line.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = {
    "kill": signal.SIGKILL,
    "end": signal.SIGTERM,
    "freeze": signal.SIGSTOP,
    "thaw": signal.SIGCONT,
}


class Keeper:
    def __init__(self, folder: Path, nodes: list[str]) -> None:
        self.folder, self.nodes = folder, nodes
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        # --force: munged refuses a socket below a closed folder, as pytest's temporary one is
        munge = self.folder / "munge"
        options = {"key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{option}={munge / name}" for option, name in options.items()]
        self._spawn("munged", "munged", "-F", "--force", "-S", str(munge / "socket"), *files)
        self._wait_for("munged", lambda: (munge / "socket").exists())
        self.start_one("slurmctld")  # a slurmd that meets no controller asks again a second later
        self._wait_for("slurmctld", lambda: " is UP" in self._answer("scontrol", "ping"))
        for node in self.nodes:
            self.start_one(node)
        idle = ["idle"] * len(self.nodes)
        self._wait_for(
            "the nodes",
            lambda: self._answer("sinfo", "-hN", "-p", "main", "-o", "%T").split() == idle,
        )

    def start_one(self, name: str) -> None:
        conf = str(self.folder / "slurm.conf")
        if name == "slurmctld":
            self._spawn(name, "slurmctld", "-D", "-f", conf)
        else:
            self._spawn(name, "slurmd", "-D", "-N", name, "-f", conf)

    def obey(self, line: str) -> None:
        verb, name = line.split()
        if verb == "start":
            self.start_one(name)
        elif verb == "lose":
            self.children[name].kill()
            _kill(_processes_on(name))
            self.children[name].wait()
        else:
            self.children[name].send_signal(_SIGNALS[verb])
            if verb in ("kill", "end"):
                self.children[name].wait()
        print("done", flush=True)

    def reap(self) -> None:
        """Let the entries of orphans go; the daemons' own belong to their Popen."""
        known = {child.pid: child for child in self.children.values()}
        with contextlib.suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in known:
                    known[found.si_pid].wait()
                else:
                    os.waitpid(found.si_pid, 0)

    def stop(self) -> None:
        controller = self.children.get("slurmctld")
        kept = {child.pid for child in self.children.values()}
        if controller:  # it waits ten seconds for its script runner if that goes first
            kept |= set(_below(controller.pid))
        _kill(pid for pid in _below(os.getpid()) if pid not in kept)
        for name in (*self.nodes, "slurmctld", "munged"):
            child = self.children.get(name)
            if child and child.poll() is None:
                child.send_signal(signal.SIGCONT)
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)
        deadline = time.monotonic() + 50
        while (left := _below(os.getpid())) and time.monotonic() < deadline:
            _kill(left)
            self.reap()
            time.sleep(0.02)

    def _spawn(self, name: str, *argv: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self.children[name] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )

    def _answer(self, *argv: str) -> str:
        return subprocess.run(argv, capture_output=True, text=True).stdout

    def _wait_for(self, what: str, condition) -> None:
        deadline = time.monotonic() + 150
        while not condition():
            dead = [name for name, child in self.children.items() if child.poll() is not None]
            if dead or time.monotonic() > deadline:
                sys.exit(f"{what} did not start (ended: {dead}); see {self.folder}/log")
            time.sleep(0.03)


def _below(top: int) -> list[int]:
    """Ids of all living descendants of a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [top]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _processes_on(node: str) -> list[int]:
    """Ids of the jobs' processes on a node, after those of the slurmstepd above them."""
    found, steps = [], []
    for pid in _below(os.getpid()):
        with contextlib.suppress(OSError):
            entry = Path(f"/proc/{pid}")
            if f"SLURMD_NODENAME={node}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(pid)
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    steps.append(parent)
    return steps + found


def _kill(pids) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(folder: Path, nodes: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    keeper = Keeper(folder, nodes)
    halted: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: halted.append(number))
    try:
        keeper.start()
        print("ready", flush=True)
        while not halted:
            if select.select([sys.stdin], [], [], 0.2)[0]:
                line = sys.stdin.readline()
                if not line:
                    break
                keeper.obey(line)
            keeper.reap()
    finally:
        keeper.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
