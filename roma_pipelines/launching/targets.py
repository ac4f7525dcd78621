"""The launcher of a target by its name, commands of jobs, and the JobSpec of an asset's job."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from roma_pipelines.launching.launcher import Launcher
from roma_pipelines.launching.local import LocalLauncher, threads_here
from roma_pipelines.launching.spec import AttemptRecord, JobSize, JobSpec
from roma_pipelines.storage import Storage

# fmt: off
ENV_NAMES = (  # environment variables that jobs get where they are set, by default
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
    return ("-m", "roma_core.cli", *command.split(), "--job", str(folder))


def module_command(
    launcher: Launcher, folder: str, module: str, *arguments: str
) -> tuple[str, ...]:
    """A module with its arguments that runs in this folder, as a JobSpec has it.

    ValueError if there is no such module, where jobs have this interpreter and these files.
    """
    of_nodes = ("ssh", "python", "container", "modules", "setup")  # of a cluster's profile
    if not any(getattr(launcher.profile, name, None) for name in of_nodes):
        look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        argv = [sys.executable, "-c", look]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=folder)
        if done.returncode:  # an error now, not of every process
            why = done.stderr.strip().splitlines()[-1:]  # a parent package may fail to import
            raise ValueError(
                f"there is no module {module!r} in {folder} or among what is installed"
                + (f" ({why[0]})" if why else "")
                + "; name it as for `python -m`: dots, no .py"
            )
    return ("-m", "roma_core.run_job", folder, module, *arguments)


def default_threads(target: str, n_processes: int) -> int:
    """CPU threads of each of a job's processes where nobody says how many."""
    return threads_here(n_processes) if target == "local" else 1


def job_spec(
    target: str,
    resources: JobSize,
    key: str,
    command: tuple[str, ...],
    config_digest: str,
    env_names: tuple[str, ...] = ENV_NAMES,
    runner: Literal["torchrun", "plain"] | None = None,
) -> JobSpec:
    """The JobSpec of an asset's job on a target.

    The target ``local`` runs the processes of all nodes on this computer: the world size stays the
    same, and with it the global batch, so that one file trains the same model on either target.
    Without a ``runner``, torchrun starts several processes, and one process starts without it, 2 s
    earlier.
    """
    runner = runner or ("plain" if resources.world_size == 1 else "torchrun")
    size = {name: getattr(resources, name) for name in JobSize.model_fields}
    if target == "local":
        size |= {"nodes": 1, "processes_per_node": resources.world_size}
    size["threads_per_process"] = resources.threads_per_process or default_threads(
        target, resources.world_size
    )
    job = {"key": key, "command": command, "config_digest": config_digest, "runner": runner}
    return JobSpec(**job, **size, env_names=env_names)


def launcher_of_attempt(storage: Storage) -> Callable[[AttemptRecord], Launcher]:
    return lambda record: launcher_for(
        record.backend, (record.external or {}).get("profile"), storage
    )
