"""The target ``fake``: jobs that are simulated in memory, step by step, from a script.

For tests of the supervisor, and for trying out a pipeline without compute. An attempt takes one
step of its script whenever it is watched, so a simulated hour takes no time. The job folder is
real: each step writes there what a training would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from roma_core.job import Attempt, Exit, JobFolder, Result
from roma_pipelines.launching.launcher import (
    PLANNED_FOLDER,
    Launcher,
    process_variables,
    program,
    render,
)
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Phase, Plan
from roma_pipelines.resources import JobClient

Step = Callable[[JobFolder, Attempt, JobSpec], JobState]
"""One step of an attempt: it may write into the folder, and returns the state after it."""


def waiting(reason: str = "Resources") -> Step:
    return lambda folder, attempt, spec: JobState(Phase.WAITING, reason)


def running(step: int | None = None, save: bool = False) -> Step:
    """Running; with ``step`` it writes a heartbeat, with ``save`` a checkpoint of that step."""

    def play(folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        attempt.path.mkdir(parents=True, exist_ok=True)
        if step is not None:
            attempt.beat(step)
            if save:
                (folder.checkpoints / f"step-{step:06d}").mkdir(parents=True, exist_ok=True)
        return JobState(Phase.RUNNING)

    return play


def unreachable(reason: str = "no answer") -> Step:
    return lambda folder, attempt, spec: JobState(Phase.UNKNOWN, reason)


def completed(world_size: int | None = None, metrics: Mapping[str, float] | None = None) -> Step:
    """Ended with a result; a ``world_size`` other than the spec's is no proof."""

    def play(folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        attempt.path.mkdir(parents=True, exist_ok=True)
        attempt.write_exit(Exit(status="completed"))
        world, values = world_size or spec.world_size, dict(metrics or {})
        folder.write_result(
            Result(
                job_key=spec.key, attempt=attempt.n, world_size=world, metrics=values, wall_s=0.0
            )
        )
        return JobState(Phase.ENDED_OK)

    return play


def ended(phase: Phase, reason: str = "", report: Exit | None = None) -> Step:
    """Ended in some other way, with this ``exit.json`` or none."""

    def play(folder: JobFolder, attempt: Attempt, spec: JobSpec) -> JobState:
        if report is not None:
            attempt.path.mkdir(parents=True, exist_ok=True)
            attempt.write_exit(report)
        return JobState(phase, reason)

    return play


@dataclass
class _Simulated:
    steps: list[Step]
    state: JobState


class FakeLauncher:
    """Simulates attempts in memory; ``submitted`` is (folder, attempt) of every submission."""

    backend = "fake"
    profile = None
    fs_lag_s = 0.0

    def __init__(self, *scripts: Sequence[Step], rejects: Sequence[str] = ()) -> None:
        """
        Args:
            scripts: steps of attempt 1, 2, …; the last one serves all further attempts. Without
                any, an attempt runs once and is completed.
            rejects: reasons of its preflight.
        """
        self._scripts = [list(script) for script in scripts] or [[running(), completed()]]
        self._rejects = list(rejects)
        self._jobs: dict[tuple[str, int], _Simulated] = {}
        self.submitted: list[tuple[str, int]] = []

    def plan(self, spec: JobSpec, folder: JobFolder = PLANNED_FOLDER, attempt: int = 1) -> Plan:
        argv = program(spec, "python", "RANK", "ADDRESS", "PORT", "SCRATCH")
        return Plan(spec, folder, attempt, render(spec, argv, process_variables(spec)))

    def preflight(self, plan: Plan) -> list[str]:
        return list(self._rejects)

    def submit(self, plan: Plan, environment: Mapping[str, str]) -> JobHandle:
        self.submitted.append(_id(plan))
        script = self._scripts[min(plan.attempt, len(self._scripts)) - 1]
        # a second submission changes nothing: the job's own claim would let only the first run
        self._jobs.setdefault(_id(plan), _Simulated(list(script), JobState(Phase.WAITING)))
        return JobHandle(plan, {"id": plan.name})

    def find(self, plan: Plan) -> JobHandle | None:
        return JobHandle(plan, {"id": plan.name}) if _id(plan) in self._jobs else None

    def watch(self, handle: JobHandle) -> JobState:
        plan, job = handle.plan, self._jobs.get(_id(handle.plan))
        if job is None:
            return JobState(Phase.GONE, "it was simulated in another process")
        if job.steps and not job.state.ended:
            job.state = job.steps.pop(0)(plan.folder, plan.files, plan.spec)
        return job.state

    def cancel(self, handle: JobHandle) -> None:
        job = self._jobs.get(_id(handle.plan))
        if job is not None and not job.state.ended:
            job.state = JobState(Phase.CANCELLED)


def client_of(fake: Launcher) -> JobClient:
    """A client of jobs that run on this launcher."""

    class Client(JobClient):
        target = fake.backend

        def launcher(self, profile: str | None = None) -> Launcher:
            return fake

    return Client()


def _id(plan: Plan) -> tuple[str, int]:
    return str(plan.folder.path), plan.attempt
