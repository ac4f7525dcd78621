"""First act of every attempt of a job: claim it, then become the program.

    python -m roma_core.claim JOB_FOLDER N -- PROGRAM [ARGUMENT…]

Whatever submitted the job may have submitted it twice: a scheduler that accepts and says it did
not, an orchestrator that died before it wrote down what it did. So the last word is here:
``attempts/N/owner.json`` is created exclusively, and a second start says so and leaves with exit
code 0. The program replaces this process, so process id and start time stay those of the owner.

Only the standard library and ``roma_core.files``: this runs before every job and costs the start of
one small interpreter.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from roma_core.files import create_json, read_json

FOLDER_VARIABLE = "ROMA_JOB_FOLDER"
ATTEMPT_VARIABLE = "ROMA_JOB_ATTEMPT"
_EXTERNAL_IDS = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "JOB_COMPLETION_INDEX")


def _state_and_start(pid: int) -> tuple[str, str] | None:
    """State letter and start time of a process; None if there is none of this id."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():  # macOS
        answer = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True
        )
        words = answer.stdout.split(maxsplit=1)
        return (words[0][0], words[1].strip()) if len(words) == 2 else None
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return fields[0], f"{boot}/{fields[19]}"


def process_start(pid: int) -> str | None:
    """When a process started, as text to compare; None if there is no process of this id.

    On Linux: the boot and the clock ticks since it, which neither a clock that is set nor a reboot
    confuses. With the process id it names one process for ever.
    """
    found = _state_and_start(pid)
    return found[1] if found else None


def is_running(pid: int, start: str) -> bool:
    """Whether exactly this process is alive; one that only waits to be reaped is not."""
    found = _state_and_start(pid)
    return found is not None and found[1] == start and found[0] not in "ZX"


def main(arguments: list[str]) -> None:
    """Claim and exec; leaves with 0 if the attempt is another's, 2 for a wrong call."""
    if len(arguments) < 4 or not arguments[1].isdigit() or arguments[2] != "--":
        print(f"usage: python -m roma_core.claim JOB_FOLDER N -- PROGRAM…; got {arguments}")
        sys.exit(2)
    folder, attempt, program = Path(arguments[0]), arguments[1], arguments[3:]
    owner = {
        "schema_version": 1,
        "pid": os.getpid(),
        "start": process_start(os.getpid()),
        "host": socket.gethostname(),
        "external": {name: os.environ[name] for name in _EXTERNAL_IDS if name in os.environ},
    }
    path = folder / "attempts" / attempt / "owner.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not create_json(path, owner):
        print(f"attempt {attempt} in {folder} is taken by {read_json(path)}; leaving", flush=True)
        sys.exit(0)
    os.environ[FOLDER_VARIABLE] = str(folder)
    os.environ[ATTEMPT_VARIABLE] = attempt
    os.execvp(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
