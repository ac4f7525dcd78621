"""Jobs of this computer in forked processes, for tests of what becomes of a job.

The launcher is the real one, and so is everything in the job but the start of Python. Tests of how
processes start and end have the real start.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from roma_core import claim
from roma_pipelines.launching import local
from tests import forked

_CLAIM = [sys.executable, "-m", "roma_core.claim"]
_PROGRAM = [sys.executable, "-m"]


@contextlib.contextmanager
def jobs_are_forked() -> Iterator[None]:
    """Within it the target ``local`` starts jobs of one process by a fork."""
    stand_in = SimpleNamespace(Popen=_start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "subprocess", stand_in)
        yield


class _Forked:
    """What the launcher needs of ``subprocess.Popen``."""

    def __init__(self, process: Any) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def _start(argv: list[str], *, cwd: Path, env: dict[str, str], stdout: Any, **options: Any) -> Any:
    folder, n, dashes, *program = argv[3:]
    if argv[:3] != _CLAIM or program[:2] != _PROGRAM or program[2] != "roma_core.cli":
        return subprocess.Popen(argv, cwd=cwd, env=env, stdout=stdout, **options)
    assert dashes == "--"
    process = forked.start(
        *(_claim_and_run, folder, n, *program[2:]),
        output=Path(stdout.name),
        cwd=cwd,
        environment=env,
    )
    return _Forked(process)


def _claim_and_run(folder: str, n: str, module: str, *arguments: str) -> None:
    os.setsid()
    assert claim.claim(Path(folder) / "attempts" / n) is None
    os.environ |= {claim.FOLDER_VARIABLE: folder, claim.ATTEMPT_VARIABLE: n}
    forked.run_module(module, *arguments)
