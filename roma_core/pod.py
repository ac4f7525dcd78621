"""What every pod of a Kubernetes job runs first, and its process 1: claim, meet, run, tell.

    python -m roma_core.pod JOB_FOLDER N [--meet HOST] -- PROGRAM [ARGUMENT…]

The pods of an attempt share a claim: ``attempts/N/owner.json`` names the Job they belong to, and a
pod of any other Job leaves with exit code 0. TERM, which Kubernetes sends before it takes a pod
away, becomes the attempt's stop file and is passed on, so that all pods save and end together. A
program that ended to go on later gives exit code 75, whatever its starter made of that.

Only the standard library and ``roma_core.files``: this runs before every job.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from roma_core.claim import ATTEMPT_VARIABLE, FOLDER_VARIABLE
from roma_core.files import create_json, read_json

JOB_VARIABLE = "ROMA_JOB_UID"
CONTINUE_EXIT_CODE = 75  # as roma_core.job has it, which imports more than this program may
_SEEN_WITHIN_S = 30.0  # network file systems remember for so long that a file was not there
_NAMED_WITHIN_S = 300.0  # the other pod may still wait for its image
_EVERY_S = 0.5


class Unable(Exception):
    """Why the pod cannot begin; exit code 2."""


def main(arguments: list[str]) -> int:
    """Exit code of the pod."""
    own, program = _split(arguments)
    if len(own) not in (2, 4) or not own[1].isdigit() or own[2:3] not in ([], ["--meet"]):
        print(f"usage: python -m roma_core.pod JOB_FOLDER N [--meet HOST] -- …; got {arguments}")
        return 2
    folder, n = Path(own[0]), own[1]
    attempt = folder / "attempts" / n
    child = _Child(attempt / "stop")  # from here on TERM is heard
    try:
        _find(folder)
        if not _claim(attempt):
            print(
                f"attempt {n} in {folder} is taken by {read_json(attempt / 'owner.json')}; leaving"
            )
            return 0
        if own[2:]:
            _meet(own[3])
    except Unable as reason:
        print(f"roma: {reason}", file=sys.stderr)
        return 2
    code = child.run(program, {FOLDER_VARIABLE: str(folder), ATTEMPT_VARIABLE: n})
    return CONTINUE_EXIT_CODE if code and _is_to_continue(attempt) else code


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments[:-1]:
        return [], []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _find(folder: Path) -> None:
    deadline = time.monotonic() + _SEEN_WITHIN_S
    while not (folder / "spec.json").exists():
        if time.monotonic() > deadline:
            raise Unable(
                f"the job folder {folder} is not to be seen in this pod (no spec.json in it); the "
                f"volume of the profile must show what the orchestrator writes, under the same path"
            )
        time.sleep(_EVERY_S)


def _claim(attempt: Path) -> bool:
    """Become one of the attempt's pods; False if it belongs to another Job."""
    mine = {"job_uid": os.environ.get(JOB_VARIABLE, "")}
    owner = {"schema_version": 1, "host": socket.gethostname(), "external": mine}
    path = attempt / "owner.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return create_json(path, owner) or read_json(path)["external"] == mine
    except OSError as error:
        raise Unable(
            f"cannot write to the job folder {attempt} ({error}); the user of the pod, "
            f"{os.getuid()}, needs the right to"
        ) from error


def _meet(host: str) -> None:
    """Wait until the first pod has a name: it gets one late, and not at all without a Service."""
    deadline = time.monotonic() + _NAMED_WITHIN_S
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise Unable(
                    f"{host} has no address after {_NAMED_WITHIN_S:g} s ({error}); is its pod "
                    f"running, and the headless Service there?"
                ) from error
        time.sleep(_EVERY_S)


def _is_to_continue(attempt: Path) -> bool:
    try:
        return bool(read_json(attempt / "exit.json")["status"] == "continue")
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _Child:
    """The program; hears TERM before there is one, too."""

    def __init__(self, stop: Path) -> None:
        self.stop = stop
        self.process: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        try:
            self.stop.touch()
        except OSError as error:  # the folder may be what is broken
            os.write(2, f"roma: cannot leave a stop file ({error})\n".encode())
        if self.process is None:
            sys.exit(128 + number)
        self.process.send_signal(number)

    def run(self, program: list[str], variables: dict[str, str]) -> int:
        try:
            self.process = subprocess.Popen(program, env={**os.environ, **variables})
        except OSError as error:
            print(f"roma: cannot start {program[0]}: {error}", file=sys.stderr)
            return 127
        code = self.process.wait()
        return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
