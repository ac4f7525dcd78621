"""Runs any module that uses the Trainer as a launched job: the module does not know.

    python -m roma_core.module_job WORKING_FOLDER MODULE [ARGUMENT…]

The module sees its arguments as they are, and the folder it was launched from. Stop requests of the
launcher reach it as SIGTERM, upon which the Trainer saves and returns; the attempt then ends with
"continue". Without one, a module that returns, or leaves with exit code 0, has done what it was for.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from roma_core.attempt import FOLDER_VARIABLE
from roma_core.job import CONTINUE_EXIT_CODE, Attempt, JobFolder
from roma_core.job_runner import Work, run_in_folder

_LOOK_EVERY_S = 0.5


class _StopPasser(threading.Thread):
    """Turns the attempt's stop file into one SIGTERM to this process."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(name="stop file", daemon=True)
        self.attempt = attempt
        self.passed = False
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(_LOOK_EVERY_S):
            if self.attempt.stop.exists():
                self.passed = True
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _run(module: str, arguments: list[str]) -> int:
    """Exit code of a module run as ``python -m`` runs it."""
    sys.argv = [module, *arguments]
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as -m does
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


def main(words: list[str]) -> int:
    """Run the module in the job folder of this process; returns its exit code."""
    working_folder, module, arguments = words[0], words[1], words[2:]
    os.chdir(working_folder)

    def body(folder: JobFolder, attempt: Attempt) -> Work:
        passer = _StopPasser(attempt)
        # ranks agree among themselves: one that was asked is enough
        if os.environ.get("RANK", "0") == "0":
            passer.start()
        code = _run(module, arguments)
        passer.over.set()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if passer.passed or code == CONTINUE_EXIT_CODE:
            return Work("continue", world_size, reason="stop file" if passer.passed else "")
        if code != 0:
            raise RuntimeError(f"{module} left with exit code {code}")
        return Work("completed", world_size)

    return run_in_folder(JobFolder(Path(os.environ[FOLDER_VARIABLE])), body)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m roma_core.module_job WORKING_FOLDER MODULE [ARGUMENT…]")
    sys.exit(main(sys.argv[1:]))
