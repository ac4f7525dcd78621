"""The launcher of a target by its name, and the JobSpec of an experiment's job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.local import LocalLauncher
from roma_pipelines.launching.spec import AttemptRecord, JobSize, JobSpec
from roma_pipelines.storage import Storage

if TYPE_CHECKING:  # it imports Dagster, which takes seconds
    from roma_pipelines.run_config import Resources

# fmt: off
_ENV_NAMES = (  # environment variables that jobs get where they are set
    "WANDB_API_KEY", "ROMA_WANDB_API_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN", "ROMA_WANDB_MODE", "WANDB_MODE", "ROMA_WANDB_INIT_TIMEOUT_S",
    "ROMA_WANDB_FINISH_TIMEOUT_S", "WANDB_BASE_URL",
)
# fmt: on


def launcher_for(target: str, profile: str | None, storage: Storage) -> Launcher:
    """The launcher of a target; ValueError if there is no such target or profile of its cluster.

    Without a profile, ROMA_SLURM_PROFILE or ROMA_KUBERNETES_PROFILE names it.
    """
    if target == "local":
        return LocalLauncher()
    if target == "slurm":
        from roma_pipelines.launching.slurm.launcher import SlurmLauncher
        from roma_pipelines.launching.slurm.profile import SlurmProfile

        return SlurmLauncher(SlurmProfile.load(profile), storage.clusters)
    if target == "kubernetes":
        from roma_pipelines.launching.kubernetes.launcher import KubernetesLauncher
        from roma_pipelines.launching.kubernetes.profile import KubernetesProfile

        return KubernetesLauncher(KubernetesProfile.load(profile))
    raise ValueError(
        f"unknown target {target!r}; expected local (this computer), slurm or kubernetes"
    )


def roma_command(command: str, folder: Path | str) -> tuple[str, ...]:
    """``roma COMMAND`` on a job folder, as a JobSpec has it."""
    return ("-m", "roma_core.cli", command, "--job", str(folder))


def job_spec(
    resources: Resources,
    key: str,
    command: tuple[str, ...],
    config_digest: str,
    runner: Literal["torchrun", "plain"],
) -> JobSpec:
    """The JobSpec of an experiment's job with the resources of its stage.

    The target ``local`` runs the processes of all nodes on this computer: the world size stays the
    same, and with it the global batch, so that one file trains the same model on either target.
    """
    size = {name: getattr(resources, name) for name in JobSize.model_fields}
    if resources.target == "local":
        size |= {"nodes": 1, "processes_per_node": resources.nodes * resources.processes_per_node}
    job = {"key": key, "command": command, "config_digest": config_digest, "runner": runner}
    return JobSpec(**job, **size, env_names=_ENV_NAMES)


def launcher_of_attempt(storage: Storage) -> Callable[[AttemptRecord], Launcher]:
    return lambda record: launcher_for(
        record.backend, (record.external or {}).get("profile"), storage
    )
