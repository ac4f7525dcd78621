"""Run the work of a job, or any module that uses the Trainer, inside a job folder.

    python -m roma_core.run_job WORKING_FOLDER MODULE [ARGUMENT…]

The module gets its arguments unchanged and runs in WORKING_FOLDER. The launcher's stop file reaches
it as SIGTERM, upon which the Trainer saves and returns; the attempt then ends with "continue".
Otherwise a module that returns, or exits with code 0, is completed; the numbers that it left in
``outputs/metrics.json`` of the job folder are the job's metrics.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from filelock import FileLock, Timeout

from roma_core.claim import ATTEMPT_VARIABLE, CONTINUE_EXIT_CODE, FOLDER_VARIABLE
from roma_core.files import create_json, read_json
from roma_core.job import Attempt, Exit, JobFolder, Result, StopRequests


@dataclass(frozen=True)
class Work:
    """Result of the function that does a job's work; see :class:`roma_core.job.Result` for the fields."""

    status: Literal["completed", "continue"]
    world_size: int = 1
    step: int | None = None
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


Body = Callable[[JobFolder, Attempt], Work]


def run_in_folder(folder: JobFolder, body: Body) -> int:
    """Run one attempt of a job; returns the process's exit code.

    Started by hand, it is attempt 1, a second process in the same folder is refused, and Ctrl-C raises
    KeyboardInterrupt. Another error of the body is written to ``exit.json`` and printed.
    """
    rank = int(os.environ.get("RANK", "0"))
    launched = os.environ.get(ATTEMPT_VARIABLE)
    attempt = folder.attempt(int(launched or 1))
    attempt.path.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if launched is None and rank == 0:
            try:
                stack.enter_context(FileLock(folder.path / ".running.lock", timeout=0))
            except Timeout:
                raise SystemExit(
                    f"another process runs in {folder.path}; wait for it, or choose another folder"
                ) from None
            attempt.exit.unlink(missing_ok=True)
            attempt.stop.unlink(missing_ok=True)
        try:
            work = body(folder, attempt)
        except BaseException as error:
            stack.enter_context(StopRequests())
            reason = f"{type(error).__name__}: {error}"
            create_json(attempt.exit, Exit(status="failed", reason=reason).model_dump(mode="json"))
            if launched is None and isinstance(error, KeyboardInterrupt):
                raise
            if launched is None and isinstance(error, ValueError | OSError):
                path = attempt.path / "traceback.txt"  # the message is for users
                with contextlib.suppress(OSError):  # a full disk may be what failed
                    path.write_text(traceback.format_exc())
                reason = f"{error}\n(the stack is in {path})"
            else:
                traceback.print_exc()
            print(f"failed: {reason}", file=sys.stderr, flush=True)
            return 1
        stack.enter_context(StopRequests())  # one comes too late, and must not prevent the reports
        if rank == 0:
            attempt.write_exit(Exit(status=work.status, step=work.step, reason=work.reason))
            if work.status == "completed":
                facts = {k: v for k, v in vars(work).items() if k not in ("status", "reason")}
                wall_s = time.monotonic() - started
                key = folder.path.name
                folder.write_result(Result(job_key=key, attempt=attempt.n, wall_s=wall_s, **facts))
    if launched is None and work.reason == "SIGINT":
        raise KeyboardInterrupt("interrupted; the same command resumes")
    return 0 if work.status == "completed" else CONTINUE_EXIT_CODE


_POLL_S = 0.5


def _run_module(module: str, arguments: list[str]) -> int:
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


def _metrics(folder: JobFolder) -> dict[str, float]:
    """The numbers that the module left; ValueError if the file has anything else."""
    path = folder.outputs / "metrics.json"
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(type(v) in (int, float) for v in found.values()):
        raise ValueError(f'{path}: expected numbers by name, such as {{"accuracy": 0.93}}')
    return found


def main(working_folder: str, module: str, *arguments: str) -> int:
    """Run the module in the job folder of this process; returns its exit code."""
    os.chdir(working_folder)

    def body(folder: JobFolder, attempt: Attempt) -> Work:
        stopped, ended = threading.Event(), threading.Event()

        def watch_stop_file() -> None:
            while not ended.wait(_POLL_S):
                if attempt.stop.exists() and not ended.is_set():
                    stopped.set()
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

        is_first = os.environ.get("RANK", "0") == "0"
        if is_first:  # ranks agree among themselves
            threading.Thread(target=watch_stop_file, name="stop file", daemon=True).start()
        folder.outputs.mkdir(exist_ok=True)
        code = _run_module(module, list(arguments))
        ended.set()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if stopped.is_set() or code == CONTINUE_EXIT_CODE:
            reason = "stop file" if stopped.is_set() else ""
            return Work("continue", world_size, reason=reason)
        if code != 0:
            raise RuntimeError(f"{module} left with exit code {code}")
        return Work("completed", world_size, metrics=_metrics(folder) if is_first else {})

    return run_in_folder(JobFolder(os.environ[FOLDER_VARIABLE]), body)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m roma_core.run_job WORKING_FOLDER MODULE [ARGUMENT…]")
    sys.exit(main(*sys.argv[1:]))
