"""Clients that run a job for an asset, as Dagster resources: on this computer, SLURM or Kubernetes.

Any asset of any Dagster project starts a module with them, as with Dagster's own Pipes clients. The job
belongs to the asset in its run: it is submitted once, resumes after an interruption, and a retry of the
run adopts it. The sensor ``automation.sensors.reconcile_jobs`` has the run of a killed worker retried.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import dagster as dg
from pydantic import Field

from roma_core.files import digest_of, read_json
from roma_core.job import JobFolder, Result
from roma_pipelines.launching.jobs import usage
from roma_pipelines.launching.launcher import Launcher, Rejected
from roma_pipelines.launching.outcome import attempts_table, events_table
from roma_pipelines.launching.pipes import job_folder, run_job
from roma_pipelines.launching.spec import JobFailed, JobSize, JobSpec, Outcome
from roma_pipelines.launching.targets import ENV_NAMES, job_spec, launcher_for, module_command
from roma_pipelines.storage import Storage

__all__ = ["JobClient", "JobSize", "KubernetesJobClient", "LocalJobClient", "SlurmJobClient"]

_begun: set[tuple[str, int, str]] = set()  # run, retry of its step, key of its job


@dataclass(frozen=True)
class CompletedJob:
    """A completed job: its outcome, what it used, its folder and result."""

    outcome: Outcome
    usage: dict[str, Any]
    folder: JobFolder
    result: Result

    def output(self, name: str) -> Path:
        """Path of an output of the job."""
        return self.folder.path / self.result.outputs[name]

    def metadata(self) -> dict[str, Any]:
        """Metadata of the materialisation, which downstream assets read."""
        facts = {k: v for k, v in self.result.facts.items() if isinstance(v, int | float | str)}
        known = self.outcome.metadata() | self.usage | facts | _attempts_metadata(self.outcome)
        known["log"] = dg.MetadataValue.path(str(self.folder.attempt(self.result.attempt).log))
        # a module may use any names
        metrics = {f"metrics/{k}" if k in known else k: v for k, v in self.result.metrics.items()}
        # rounded for display; result.json has all digits
        shown = (metrics | known).items()
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in shown}


def _attempts_metadata(outcome: Outcome) -> dict[str, Any]:
    folder = JobFolder(outcome.folder)
    return {
        "job_folder": dg.MetadataValue.path(str(folder.path)),
        "attempts_made": dg.MetadataValue.md(attempts_table(outcome.attempts)),
        "events": dg.MetadataValue.md(events_table(folder)),
    }


def _refuse_another_job(
    context: dg.AssetExecutionContext, folder: JobFolder, command: tuple[str, ...], config: str
) -> None:
    if not folder.spec.exists():
        return
    kept = JobSpec.model_validate(read_json(folder.spec, schema_version=1))
    # without the working folder, which another release of the project may have elsewhere
    before, now = (shlex.join(one[3:]) for one in (kept.command, command))
    if before != now or kept.config_digest != config:
        raise dg.Failure(
            f"the job of {context.asset_key.to_user_string()} in this run is `{before}`, not `{now}` or "
            f"with another config; start a new run, or a second job from another asset",
            allow_retries=False,
        )


class JobClient(dg.ConfigurableResource):
    """Runs jobs on one target; annotate an asset's parameter with it to leave the target open."""

    target: ClassVar[str]

    env_names: list[str] = Field(
        default=list(ENV_NAMES), description="Variables that jobs get from here, secrets included."
    )
    cwd: str | None = Field(default=None, description="Folder of modules; null: this process's.")

    def launcher(self, profile: str | None = None) -> Launcher:
        """The launcher of this target; ``profile`` goes before the client's own."""
        return launcher_for(self.target, profile or getattr(self, "profile", None), Storage.open())

    def run(
        self,
        *,
        context: dg.AssetExecutionContext,
        command: str | Sequence[str],
        resources: JobSize = JobSize(),  # noqa: B008 - frozen
        config: Mapping[str, Any] | None = None,
        runner: Literal["torchrun", "plain"] = "torchrun",
        env: Mapping[str, str] | None = None,
        max_attempts: int = 20,
    ) -> dg.MaterializeResult:
        """Run a module as the job of this asset, to its end; its log and progress appear meanwhile.

        The module finds its folder in the variable ``ROMA_JOB_FOLDER`` (``config.json``, ``outputs/``,
        ``checkpoints/step-N``) and may leave numbers for the asset in ``outputs/metrics.json``. Before
        a limit or a preemption it gets SIGTERM: if it saves and exits with code 75, the next attempt
        starts it again. What it logs through ``dagster_pipes`` is shown.

        Args:
            command: the module, as for ``python -m``, and its arguments; like ``config``, the same
                in every retry of the run.
            resources: of one attempt. The local target runs the processes of all nodes.
            config: settings for the module, plain JSON; written to ``config.json``.
            runner: torchrun starts the processes, or ``plain`` one process without a rendezvous.
            env: further variables of the job, no secrets: ``env_names`` passes those on.
            max_attempts: attempts in a row that may add no checkpoint.

        Raises:
            dagster.Failure: the job failed (with the end of its log) or was rejected (why), or the
                asset's job in this run has another command or config.
            ValueError: there is no such module or profile, or the arguments contradict each other.
        """
        folder = job_folder(context)
        step = (context.run_id, context.retry_number, folder.path.name)
        if step in _begun:
            name = context.asset_key.to_user_string()
            raise ValueError(
                f"{name} has run its job already; start a second one from another asset"
            )
        words = shlex.split(command) if isinstance(command, str) else list(command)
        if not words:
            raise ValueError("the command is empty; name a module, as for `python -m`")
        module = module_command(self.launcher(), self.cwd or str(Path.cwd()), *words)
        given = {"command": words} if config is None else dict(config)
        options: dict[str, Any] = {"environment": env, "max_attempts": max_attempts}
        _refuse_another_job(context, folder, module, digest_of(given))
        _begun.add(step)
        job = self.complete(context, folder, module, given, resources, runner=runner, **options)
        # another op of this asset may have started its job since, in another process
        _refuse_another_job(context, folder, module, digest_of(given))
        return dg.MaterializeResult(metadata=job.metadata())

    def complete(
        self,
        context: dg.AssetExecutionContext,
        folder: JobFolder,
        command: tuple[str, ...],
        config: Any,
        resources: JobSize,
        *,
        runner: Literal["torchrun", "plain"] | None = None,
        profile: str | None = None,
        **options: Any,
    ) -> CompletedJob:
        """The job in this folder once it is completed; the command is that of a JobSpec.

        ``options`` are those of ``run_job``; the errors, those of :meth:`run`.
        """
        launcher = self.launcher(profile)
        about = (folder.path.name, command, digest_of(config), tuple(self.env_names), runner)
        spec = job_spec(self.target, resources, *about)
        try:
            outcome = run_job(context, launcher, folder, spec, config, **options)
        except JobFailed as error:
            facts = _attempts_metadata(error.outcome) | usage(error.outcome, spec, launcher.profile)
            raise dg.Failure(description=str(error), metadata=facts, allow_retries=False) from error
        except Rejected as error:
            raise dg.Failure(description=str(error), allow_retries=False) from error
        assert outcome.result is not None, "a completed job has a result"
        return CompletedJob(outcome, usage(outcome, spec, launcher.profile), folder, outcome.result)


class LocalJobClient(JobClient):
    """Jobs on this computer; they outlive the process that started them."""

    target = "local"


class SlurmJobClient(JobClient):
    """Jobs on a SLURM cluster."""

    target = "slurm"
    profile: str | None = Field(default=None, description="null: that of ROMA_SLURM_PROFILE.")


class KubernetesJobClient(JobClient):
    """Jobs on a Kubernetes cluster."""

    target = "kubernetes"
    profile: str | None = Field(default=None, description="null: that of ROMA_KUBERNETES_PROFILE.")


JOB_CLIENTS: dict[str, JobClient] = {
    client.target: client() for client in (LocalJobClient, SlurmJobClient, KubernetesJobClient)
}
"""The resources that the assets of experiments need, by the names of the targets."""
