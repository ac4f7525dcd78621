"""What the end of an attempt means: one table, no file and no clock.

Two witnesses are heard. The target says how the processes ended (``Phase``); the job says in its
folder what it did (``Said``). Only both together make a job completed. Where they leave it open,
another attempt continues from the last checkpoint, as long as checkpoints advance.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from roma_pipelines.launching.job import AttemptRecord, Phase


class Said(StrEnum):
    """What the job's own files say of an ended attempt."""

    PROOF = "a valid result.json"  # of this job, and of as many processes as were asked for
    COMPLETED = "exit.json: completed"  # but no valid result
    CONTINUE = "exit.json: continue"
    FAILED = "exit.json: failed"
    NOTHING = "no exit.json"


class Verdict(StrEnum):
    COMPLETED = "completed"
    CONTINUE = "continue"
    CONTINUE_IF_ADVANCED = "continue if a checkpoint was added"
    FAILED = "failed"
    CANCELLED = "cancelled"


# fmt: off
TABLE: dict[Phase, dict[Said, Verdict]] = {
    Phase.ENDED_OK: {
        Said.PROOF: Verdict.COMPLETED,
        Said.COMPLETED: Verdict.FAILED,               # a success nobody can prove
        Said.CONTINUE: Verdict.CONTINUE,
        Said.FAILED: Verdict.FAILED,
        Said.NOTHING: Verdict.FAILED,                 # exit code 0 proves nothing
    },
    Phase.ENDED_BAD: {
        Said.PROOF: Verdict.FAILED,                   # some process failed beside the one that wrote it
        Said.COMPLETED: Verdict.FAILED,
        Said.CONTINUE: Verdict.CONTINUE,              # torchrun returns 1 whatever its workers return
        Said.FAILED: Verdict.FAILED,
        Said.NOTHING: Verdict.CONTINUE_IF_ADVANCED,   # died without a word: memory, hardware, or a bug
    },
    Phase.INTERRUPTED: {
        Said.PROOF: Verdict.CONTINUE,                 # the next attempt confirms it within a step
        Said.COMPLETED: Verdict.CONTINUE,
        Said.CONTINUE: Verdict.CONTINUE,
        Said.FAILED: Verdict.FAILED,
        Said.NOTHING: Verdict.CONTINUE,
    },
    Phase.GONE: {
        Said.PROOF: Verdict.COMPLETED,                # the exit code died with its watcher
        Said.COMPLETED: Verdict.FAILED,
        Said.CONTINUE: Verdict.CONTINUE,
        Said.FAILED: Verdict.FAILED,
        Said.NOTHING: Verdict.CONTINUE,               # power cut, reboot, kill
    },
    Phase.OUT_OF_MEMORY: {
        Said.PROOF: Verdict.FAILED,
        Said.COMPLETED: Verdict.FAILED,
        Said.CONTINUE: Verdict.CONTINUE,
        Said.FAILED: Verdict.FAILED,
        Said.NOTHING: Verdict.FAILED,                 # it would only happen again
    },
    Phase.HUNG: {
        Said.PROOF: Verdict.CONTINUE,
        Said.COMPLETED: Verdict.CONTINUE,
        Said.CONTINUE: Verdict.CONTINUE_IF_ADVANCED,  # it could save when asked to end
        Said.FAILED: Verdict.FAILED,
        Said.NOTHING: Verdict.CONTINUE_IF_ADVANCED,
    },
    Phase.CANCELLED: dict.fromkeys(Said, Verdict.CANCELLED),
}
# fmt: on


def judge(
    state: Phase,
    said: Said,
    checkpoint: int | None,
    before: list[AttemptRecord],
    max_attempts: int,
    began: bool = True,
) -> tuple[Literal["completed", "continue", "failed", "cancelled"], str]:
    """How an ended attempt counts, and why.

    Args:
        state: one of the phases that are ends.
        checkpoint: step of the newest checkpoint now, None without any.
        before: records of the attempts before this one, ascending.
        max_attempts: how many attempts in a row may end with "continue" or this one.
        began: whether its program ever started; one that only waited could add no checkpoint.
    """
    verdict = TABLE[state][said]
    seen = f"{state}, {said}"
    if verdict not in (Verdict.CONTINUE, Verdict.CONTINUE_IF_ADVANCED):
        return verdict.value, seen  # type: ignore[return-value]

    streak = 0
    for record in reversed(before):
        if record.end is None or record.end.how != "continue":
            break
        streak += 1
    last = before[-1].end.checkpoint if before and before[-1].end else None
    advanced = checkpoint is not None and (last is None or checkpoint > last)
    if streak + 1 >= max_attempts:
        return "failed", f"{seen}; {streak + 1} attempts in a row are the limit"
    if advanced or (verdict is Verdict.CONTINUE and (streak == 0 or not began)):
        return "continue", f"{seen}; newest checkpoint: step {checkpoint}"
    return "failed", f"{seen}; no checkpoint was added since the attempt before (step {checkpoint})"
