"""The verbs every backend has; the supervisor and the assets know nothing more specific."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from roma_core.job import JobFolder
from roma_pipelines.launching.job import JobHandle, JobSpec, JobState


class Launcher(Protocol):
    """Runs attempts of a job on one target."""

    @property
    def backend(self) -> str:
        """Name of the target's kind, as handles carry it: ``local``, ``slurm``, …"""
        ...

    def plan(self, spec: JobSpec) -> str:
        """The exact text that would be submitted; no clock, file or cluster involved.

        Raises:
            ValueError: this target can never run the spec.
        """
        ...

    def submit(
        self, spec: JobSpec, folder: JobFolder, attempt: int, environment: Mapping[str, str]
    ) -> JobHandle:
        """Start one attempt; ``environment`` holds further variables with their values."""
        ...

    def find(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        """The attempt as its owner, or the target, knows it; None if it was never started."""
        ...

    def watch(self, handle: JobHandle) -> JobState:
        """How the attempt stands now; an end is reported once all its processes are gone."""
        ...

    def cancel(self, handle: JobHandle) -> None:
        """End the attempt with everything it started, and return when it is gone.

        Raises:
            RuntimeError: something of it is still there.
        """
        ...
