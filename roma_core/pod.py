"""Process 1 of every pod of a Kubernetes job: claim the attempt, wait for pod 0, run the program.

    python -m roma_core.pod JOB_FOLDER N [--meet HOST] -- PROGRAM [ARGUMENT…]

The pods of one Job share its claim; a pod of any other Job leaves with exit code 0. SIGTERM, which
Kubernetes sends before it removes a pod, becomes the attempt's stop file and is passed on, so that
all pods save and end together. If the attempt's ``exit.json`` says "continue", the exit code is 75
whatever torchrun returned. The program's output goes to the attempt's ``log`` (``log.INDEX`` of
another pod than the first) and to stdout, so that the log outlives a pod that is deleted.

Only the standard library, ``roma_core.files`` and ``roma_core.claim``: this runs before every job.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from roma_core.claim import ATTEMPT_VARIABLE, CONTINUE_EXIT_CODE, FOLDER_VARIABLE, FS_LAG_S, claim
from roma_core.files import read_json

_DNS_TIMEOUT_S = 300.0  # the other pod may still pull its image
_POLL_S = 0.5
_OUTPUT_TIMEOUT_S = 5.0  # a process that outlives the program may keep its output open


class StartError(Exception):
    """Why the pod cannot start; exit code 2."""


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments[:-1] else 0
    own, program = arguments[:split], arguments[split + 1 :]
    if len(own) not in (2, 4) or not own[1].isdigit() or own[2:3] not in ([], ["--meet"]):
        print(f"usage: python -m roma_core.pod JOB_FOLDER N [--meet HOST] -- …; got {arguments}")
        return 2
    folder, n = Path(own[0]), own[1]
    attempt = folder / "attempts" / n
    child = _Child(attempt / "stop")  # installs the handlers of SIGTERM before anything waits
    try:
        if other := _claim(folder, attempt):
            print(f"attempt {n} in {folder} is taken by {other}; leaving")
            return 0
        if own[2:]:  # the DNS name of the first pod is published late
            why = f"{own[3]} has no address after {_DNS_TIMEOUT_S:g} s; check that its pod is running "
            why += "and that the headless Service exists"
            _retry(lambda: socket.getaddrinfo(own[3], None), _DNS_TIMEOUT_S, why)
    except StartError as reason:
        print(f"roma: {reason}", file=sys.stderr)
        return 2
    index = os.environ.get("JOB_COMPLETION_INDEX", "0")
    log = attempt / ("log" if index == "0" else f"log.{index}")
    code = child.run(program, {FOLDER_VARIABLE: str(folder), ATTEMPT_VARIABLE: n}, log)
    try:
        saved = code != 0 and read_json(attempt / "exit.json")["status"] == "continue"
    except (OSError, ValueError, KeyError, TypeError):
        saved = False
    return CONTINUE_EXIT_CODE if saved else code


def _claim(folder: Path, attempt: Path) -> object:
    _retry(
        (folder / "spec.json").stat,
        FS_LAG_S,
        f"the job folder {folder} is not visible in this pod (no spec.json in it); the volume of the "
        f"profile must show what the orchestrator writes, under the same path",
    )
    try:
        return claim(attempt)
    except OSError as error:
        raise StartError(
            f"cannot write to the job folder {attempt} ({error}); user {os.getuid()} of the pod "
            f"needs write permission"
        ) from error


def _retry(act: Callable[[], object], limit_s: float, problem: str) -> None:
    """Repeat until ``act`` raises no OSError; StartError with the problem after so long."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            act()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise StartError(f"{problem} ({error})") from error
        time.sleep(_POLL_S)


class _Child:
    """The program; SIGTERM and SIGINT are handled from before it starts."""

    def __init__(self, stop: Path) -> None:
        self.stop = stop
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        try:
            self.stop.touch()
        except OSError as error:  # the folder itself may be broken
            os.write(2, f"roma: cannot write the stop file ({error})\n".encode())
        if self.process is None:
            sys.exit(128 + number)
        self.process.send_signal(number)

    def run(self, program: list[str], variables: dict[str, str], log: Path) -> int:
        try:
            self.process = subprocess.Popen(
                program,
                env={**os.environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            print(f"roma: cannot start {program[0]}: {error}", file=sys.stderr)
            return 127
        copier = threading.Thread(target=_copy_output, args=(self.process.stdout, log), daemon=True)
        copier.start()
        code = self.process.wait()
        copier.join(_OUTPUT_TIMEOUT_S)
        return 128 - code if code < 0 else code


def _copy_output(output: IO[bytes], log: Path) -> None:
    """Copy the program's output to the attempt's log, and to stdout for ``kubectl logs``."""
    file: IO[bytes] | None = None
    try:
        file = log.open("ab", buffering=0)
    except OSError as error:
        print(f"roma: cannot write {log} ({error})", file=sys.stderr)
    while part := os.read(output.fileno(), 65536):
        sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        try:
            if file is not None:
                file.write(part)
        except OSError as error:  # the disk is full; the program runs on
            print(f"roma: cannot write {log} ({error})", file=sys.stderr)
            file = None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
