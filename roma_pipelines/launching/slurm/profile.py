"""The profile of one SLURM cluster, ``deploy/slurm/profiles/<name>.yaml``.

A profile holds what is the cluster's; what is the job's is in its JobSpec, and what is the user's
(account, partition) may be set by ``ROMA_SLURM_…``. Everything that reaches a shell or the scheduler
from here is a name without shell characters, is quoted, or is a line of ``setup``, which is shell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.settings import RomaSettings
from roma_pipelines.launching.launcher import ClusterProfile

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+/-]*$")]
"""A partition, an account, a module, …: without shell characters."""
Names = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,+/&|()*\[\]-]*$")]
"""The same with SLURM's syntax for several: ``a,b`` or ``[a|b]``; quoted where it is used."""
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[^\n\"'`$\\]+)?$")]

# fmt: off
PLANNED_OPTIONS = frozenset([
    "array", "chdir", "comment", "cpus-per-task", "error", "export", "gpus-per-node", "job-name",
    "mem", "no-requeue", "nodes", "ntasks", "ntasks-per-node", "open-mode", "output", "requeue",
    "signal", "time",
])
"""Options of sbatch that the batch script sets itself."""
# fmt: on


class SlurmSettings(RomaSettings):
    """The SLURM cluster to use, and the user's own settings on it; the rest is in its profile."""

    # every field has a description; reading attribute docstrings would cost 0.15 s per submission
    model_config = SettingsConfigDict(env_prefix="ROMA_SLURM_", use_attribute_docstrings=False)

    profile: str = Field("generic", description="Profile of jobs that name none.")
    profiles: Path | None = Field(
        None, description="Folder of profiles; null takes deploy/slurm/profiles of this project."
    )
    account: Name | None = Field(None, description="Account to charge; null takes the profile's.")
    partition: Names | None = Field(None, description="null takes the profile's.")
    qos: Name | None = Field(None, description="Quality of service; null takes the profile's.")


class SlurmProfile(ClusterProfile):
    """A SLURM cluster: how jobs are submitted to it, and what they ask for there."""

    kind, settings = "SLURM", SlurmSettings

    name: Name = Field(description="Name of the profile and of its file.")
    ssh: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$",
        description="Login node, as ssh names it; null: SLURM's commands are on this computer.",
    )
    partition: Names | None = Field(None, description="null: the cluster's default.")
    account: Name | None = Field(None, description="Account to charge.")
    qos: Name | None = Field(None, description="Quality of service.")
    constraint: Names | None = Field(None, description="Features nodes must have.")
    gpu_type: Name | None = Field(None, description="null: GPUs of any type.")
    exclusive: bool = Field(False, description="Take whole nodes.")
    cpus_per_process: int | None = Field(
        None, gt=0, description="CPUs to ask for per process; null: as many as it has threads."
    )
    time_limit_min: int = Field(60, gt=1, description="Of one attempt, for jobs that name none.")
    stop_before_end_s: int = Field(
        120,
        gt=0,
        description="So long before the limit the training saves; the next attempt resumes it.",
    )
    modules: tuple[Name, ...] = Field((), description="Names for `module load`, in order.")
    setup: tuple[str, ...] = Field(
        (), description="Lines of bash to run before the job, on the first node."
    )
    python: str | None = Field(
        None,
        pattern=r"^[^\n]+$",
        description="Interpreter of the job on the nodes (in the container, if there is one); null: "
        "the one that launches.",
    )
    container: tuple[str, ...] = Field(
        (), description="Command in front of the training, e.g. apptainer exec --nv image.sif."
    )
    sbatch_options: tuple[Option, ...] = Field((), description="Further options of sbatch.")
    srun_options: tuple[Option, ...] = Field((), description="Further options of srun.")
    poll_s: float = Field(5.0, gt=0, description="Seconds between polls while states change.")
    slowest_poll_s: float = Field(
        60.0, gt=0, description="Seconds between polls while they do not."
    )

    @model_validator(mode="after")
    def _options_do_not_contradict_the_plan(self) -> Self:
        names = (option.removeprefix("--").partition("=")[0] for option in self.sbatch_options)
        if own := [name for name in names if name in PLANNED_OPTIONS]:
            raise ValueError(
                f"sbatch_options must not set {', '.join(own)}; the job's specification does"
            )
        return self
