"""The verbs every backend has; the supervisor and the assets know nothing more specific."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from roma_core.job import JobFolder
from roma_pipelines.launching.job import JobHandle, JobSpec, JobState


class NoAnswer(RuntimeError):
    """The target does not answer now. Nothing is known: what was asked for may have been done."""


class Refused(ValueError):
    """The target will not run the job as it is; ``reasons`` has all that was found at once."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("the job was refused before it was queued:\n- " + "\n- ".join(reasons))


@dataclass(frozen=True)
class Price:
    """What a target costs."""

    per_gpu_hour: float
    currency: str


class Launcher(Protocol):
    """Runs attempts of a job on one target."""

    @property
    def backend(self) -> str:
        """Name of the target's kind, as handles carry it: ``local``, ``slurm``, …"""
        ...

    @property
    def files_within_s(self) -> float:
        """How long what an attempt wrote may take to be seen here after it ended."""
        ...

    @property
    def price(self) -> Price | None:
        """What the target costs, if somebody said so."""
        ...

    def plan(self, spec: JobSpec, folder: str = "JOB_FOLDER", attempt: int = 1) -> str:
        """The exact text that would be submitted; no clock, file or cluster involved.

        Raises:
            ValueError: this target can never run the spec.
        """
        ...

    def preflight(self, spec: JobSpec, folder: JobFolder) -> list[str]:
        """Everything that can be known to be wrong before the job queues; empty if nothing is.

        Raises:
            NoAnswer: the target is away.
        """
        ...

    def submit(
        self, spec: JobSpec, folder: JobFolder, attempt: int, environment: Mapping[str, str]
    ) -> JobHandle:
        """Start one attempt; ``environment`` holds further variables with their values.

        Raises:
            NoAnswer: whether it was started is not known; ``find`` tells.
            Refused: it was not, and never will be as it is.
        """
        ...

    def find(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        """The attempt as its owner, or the target, knows it; None if it was never started.

        Raises:
            NoAnswer: the target is away, so nobody can say.
        """
        ...

    def watch(self, handle: JobHandle) -> JobState:
        """How the attempt stands now; an end is reported once all its processes are gone.

        A target that is away is no exception here but the phase UNKNOWN.
        """
        ...

    def cancel(self, handle: JobHandle) -> None:
        """End the attempt with everything it started, and return when it is gone.

        Raises:
            NoAnswer: the target is away.
            RuntimeError: something of it is still there.
        """
        ...
