"""First program of every process group of a job: claims the attempt, then runs the given program.

    python -m roma_core.claim JOB_FOLDER N -- PROGRAM [ARGUMENT…]

A job may be submitted twice: by a scheduler that accepts and reports a time-out, or by an
orchestrator that died before it recorded the submission. So the job itself decides:
``attempts/N/owner.json`` is created exclusively, and a second start leaves with exit code 0. Tasks
or pods of one cluster job share its claim. The program replaces this process, so process id and
start time stay those of the owner.

Only the standard library and ``roma_core.files``: this runs before every job.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from roma_core.files import create_json, read_json

FOLDER_VARIABLE = "ROMA_JOB_FOLDER"
ATTEMPT_VARIABLE = "ROMA_JOB_ATTEMPT"
CONTINUE_EXIT_CODE = 75
"""Exit code of a process that saved and needs another attempt; torchrun does not pass it on."""

FS_LAG_S = 30.0
"""Network file systems may report a new file as missing for so long, in seconds."""


def claim(attempt: Path) -> dict[str, Any] | None:
    """Claim the attempt in this folder; the other owner if it is already claimed, else None.

    Processes of the same cluster job share one claim.

    Raises:
        OSError: the job folder is not writable.
    """
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    ours = {name: os.environ[name] for name in names if name in os.environ}
    if "ROMA_JOB_UID" in os.environ:  # Kubernetes
        ours["job_uid"] = os.environ["ROMA_JOB_UID"]
    owner = {
        "schema_version": 1,
        "pid": os.getpid(),
        "start": process_start(os.getpid()),
        "host": socket.gethostname(),
        "external": ours,
    }
    path = attempt / "owner.json"
    attempt.mkdir(parents=True, exist_ok=True)
    if create_json(path, owner):
        return None
    deadline = time.monotonic() + FS_LAG_S
    while True:
        try:
            other: dict[str, Any] = read_json(path)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return None if ours and other["external"] == ours else other


def process_start(pid: int) -> str | None:
    """Start time of a process as text to compare; None if there is no process of this id.

    On Linux: the boot id and the clock ticks since boot, which neither a clock change nor a reboot
    confuses. Together with the process id it identifies one process.
    """
    found = _state_and_start(pid)
    return found[1] if found else None


def is_running(pid: int, start: str) -> bool:
    """Whether exactly this process is alive; a zombie is not."""
    found = _state_and_start(pid)
    return found is not None and found[1] == start and found[0] not in "ZX"


def _state_and_start(pid: int) -> tuple[str, str] | None:
    if not Path("/proc/self/stat").exists():  # macOS
        answer = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True
        )
        words = answer.stdout.split(maxsplit=1)
        return (words[0][0], words[1].strip()) if len(words) == 2 else None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return fields[0], f"{boot}/{fields[19]}"


def main(arguments: list[str]) -> None:
    """Claim and exec; exits with 0 if the attempt is already claimed, 2 for wrong arguments."""
    if len(arguments) < 4 or not arguments[1].isdigit() or arguments[2] != "--":
        print(f"usage: python -m roma_core.claim JOB_FOLDER N -- PROGRAM…; got {arguments}")
        sys.exit(2)
    folder, n, program = arguments[0], arguments[1], arguments[3:]
    if other := claim(Path(folder) / "attempts" / n):
        print(f"attempt {n} in {folder} is taken by {other}; leaving", flush=True)
        sys.exit(0)
    os.environ |= {FOLDER_VARIABLE: folder, ATTEMPT_VARIABLE: n}
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
