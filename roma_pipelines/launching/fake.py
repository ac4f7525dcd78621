"""The target ``fake``: jobs that are only played, step by step, as a script says.

For tests of what supervises jobs, and for trying out a pipeline without a computer to spare. An
attempt takes one step of its script whenever it is watched; nothing runs beside that, so a played
hour takes no time. The job folder is real: what a step writes there is what a training would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from roma_core.files import read_json
from roma_core.job import Attempt, Exit, JobFolder, Result
from roma_pipelines.launching.launcher import process_variables, program, render
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase

Step = Callable[[JobFolder, Attempt, JobSpec], JobState]
"""One step of an attempt: it may write into the folder, and says how things stand then."""


def waiting(reason: str = "Resources") -> Step:
    """In the queue."""
    return lambda folder, attempt, spec: JobState(Phase.WAITING, reason)


def running(step: int | None = None, save: bool = False) -> Step:
    """Running; with ``step`` its heart beats, with ``save`` it leaves a checkpoint of that step."""

    def play(folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        attempt.path.mkdir(parents=True, exist_ok=True)
        if step is not None:
            attempt.beat(step)
            if save:
                (folder.checkpoints / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        return JobState(Phase.RUNNING)

    return play


def away(reason: str = "nobody answers") -> Step:
    """The target gives no answer."""
    return lambda folder, attempt, spec: JobState(Phase.UNKNOWN, reason)


def completed(world_size: int | None = None, metrics: Mapping[str, float] | None = None) -> Step:
    """Ended with a result; ``world_size`` other than the spec's is no proof."""

    def play(folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        attempt.path.mkdir(parents=True, exist_ok=True)
        attempt.write_exit(Exit(status="completed"))
        folder.write_result(
            Result(
                job_key=spec.key,
                attempt=attempt.n,
                world_size=world_size or spec.world_size,
                metrics=dict(metrics or {}),
                wall_s=0.0,
            )
        )
        return JobState(Phase.ENDED_OK)

    return play


def ended(phase: Phase, reason: str = "", said: Exit | None = None) -> Step:
    """Ended in some other way, after the last words ``said``, if there were any."""

    def play(folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        if said is not None:
            attempt.path.mkdir(parents=True, exist_ok=True)
            attempt.write_exit(said)
        return JobState(phase, reason)

    return play


@dataclass
class _Played:
    """An attempt that was submitted."""

    id: str
    steps: list[Step]
    state: JobState = field(default_factory=lambda: JobState(Phase.WAITING))


class FakeLauncher:
    """Plays attempts in memory.

    Attributes:
        submitted: (folder, attempt) of every submission, in order.
    """

    backend = "fake"
    price = None
    fs_lag_s = 0.0

    def __init__(self, *scripts: Sequence[Step], refuses: Sequence[str] = ()) -> None:
        """
        Args:
            scripts: steps of attempt 1, 2, …; the last one serves all further attempts. Without
                any, an attempt runs once and is completed.
            refuses: reasons of its preflight.
        """
        self._scripts = [list(script) for script in scripts] or [[running(), completed()]]
        self._refuses = list(refuses)
        self._jobs: dict[tuple[str, int], _Played] = {}
        self.submitted: list[tuple[str, int]] = []

    def plan(self, spec: JobSpec, folder: str = "JOB_FOLDER", attempt: int = 1) -> str:
        argv = program(spec, "python", "RANK", "ADDRESS", "PORT", "SCRATCH")
        return render(spec, argv, process_variables(spec))

    def preflight(self, spec: JobSpec, folder: JobFolder) -> list[str]:
        return list(self._refuses)

    def submit(
        self, spec: JobSpec, folder: JobFolder, attempt: int, environment: Mapping[str, str]
    ) -> JobHandle:
        place = self._place(folder, attempt)
        self.submitted.append(place)
        if place not in self._jobs:  # else the job's own claim would let only the first one run
            script = self._scripts[min(attempt, len(self._scripts)) - 1]
            self._jobs[place] = _Played(str(len(self.submitted)), list(script))
        return self._handle(place)

    def find(self, folder: JobFolder, attempt: int) -> JobHandle | None:
        place = self._place(folder, attempt)
        return self._handle(place) if place in self._jobs else None

    def watch(self, handle: JobHandle) -> JobState:
        job = self._jobs.get((handle.folder, handle.attempt))
        if job is None:
            return JobState(Phase.GONE, "it was played in another process")
        if job.steps and not job.state.ended:
            folder = JobFolder(handle.folder)
            spec = JobSpec.model_validate(read_json(folder.spec, schema_version=1))
            job.state = job.steps.pop(0)(folder, folder.attempt(handle.attempt), spec)
        return job.state

    def cancel(self, handle: JobHandle) -> None:
        job = self._jobs.get((handle.folder, handle.attempt))
        if job is not None and not job.state.ended:
            job.state = JobState(Phase.CANCELLED)

    def _place(self, folder: JobFolder, attempt: int) -> tuple[str, int]:
        return str(folder.path.resolve()), attempt

    def _handle(self, place: tuple[str, int]) -> JobHandle:
        return JobHandle(place[0], place[1], self.backend, {"id": self._jobs[place].id})
