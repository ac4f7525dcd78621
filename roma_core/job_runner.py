"""Runs a body of work inside a job folder and says how it ended.

Rank 0 writes ``result.json`` last, after everything the work is for is on disk; whoever fails first
writes ``exit.json``. The exit code tells the same, for people and for single processes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from filelock import FileLock, Timeout

from roma_core.attempt import ATTEMPT_VARIABLE
from roma_core.files import create_json
from roma_core.job import CONTINUE_EXIT_CODE, Attempt, Exit, JobFolder, Result


@dataclass(frozen=True)
class Work:
    """What a body did; see :class:`roma_core.job.Result` for the fields."""

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

    Started by a launcher, the attempt is the one it claimed. Started by hand, it is attempt 1, and
    a second process in the same folder is refused.

    Raises:
        Exception: whatever the body raised, after it was written to ``exit.json``.
    """
    rank = int(os.environ.get("RANK", "0"))
    launched = os.environ.get(ATTEMPT_VARIABLE)
    attempt = folder.attempt(int(launched or 1))
    attempt.path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.path / ".running.lock", timeout=0)
    if launched is None and rank == 0:
        try:
            lock.acquire()
        except Timeout:
            raise SystemExit(
                f"another process runs in {folder.path}; wait for it, or give another folder"
            ) from None
        attempt.exit.unlink(missing_ok=True)
        attempt.stop.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        work = body(folder, attempt)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        create_json(attempt.exit, Exit(status="failed", reason=reason).model_dump(mode="json"))
        if launched is None and isinstance(error, ValueError | OSError):
            stack = attempt.path / "traceback.txt"  # the sentence is for people, the stack for us
            with contextlib.suppress(OSError):  # a full disk may be what failed
                stack.write_text(traceback.format_exc())
            print(f"failed: {error}\n(the stack is in {stack})", file=sys.stderr, flush=True)
            return 1
        traceback.print_exc()
        print(f"failed: {reason}", file=sys.stderr, flush=True)
        return 1
    finally:
        if lock.is_locked:
            lock.release()
    if rank == 0:
        attempt.write_exit(Exit(status=work.status, step=work.step, reason=work.reason))
        if work.status == "completed":
            folder.write_result(
                Result(
                    job_key=folder.path.name,
                    attempt=attempt.n,
                    world_size=work.world_size,
                    step=work.step,
                    metrics=work.metrics,
                    outputs=work.outputs,
                    facts=work.facts,
                    wall_s=time.monotonic() - started,
                )
            )
    return 0 if work.status == "completed" else CONTINUE_EXIT_CODE
