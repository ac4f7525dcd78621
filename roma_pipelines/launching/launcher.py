"""The verbs every backend has; the supervisor and the assets know nothing more specific.

What a job inherits of the environment of whoever starts it.
Profiles of clusters: one YAML file each, in a folder of its kind.
From a JobSpec to what a target is given: pure functions, pinned by golden files.
"""

from __future__ import annotations

import os
import shlex
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

import roma_core
from roma_core.job import JobFolder
from roma_core.settings import validation_errors
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState

# Settings are frozen in config.json, and variables of an outer torchrun or scheduler would mislead
# this one: so a list of what may pass beside env_names, not of what may not.
# fmt: off
_INHERITED = frozenset([
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "PYTHONPATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "no_proxy",
])
# fmt: on
_INHERITED_PREFIXES = ("LC_", "XDG_", "NCCL_")


def inherited() -> dict[str, str]:
    """Variables every job gets from this process, with the search path of its modules."""

    def passes(name: str) -> bool:
        return name in _INHERITED or name.startswith(_INHERITED_PREFIXES)

    variables = {name: value for name, value in os.environ.items() if passes(name)}
    return {**variables, "PYTHONPATH": _python_path(os.environ.get("PYTHONPATH"))}


def passthrough_env(spec: JobSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables this job gets besides: those its spec names, and those given with their values."""
    named = {name: os.environ[name] for name in spec.env_names if name in os.environ}
    return {**named, **environment}


def _python_path(inherited: str | None) -> str:
    """Module search path of the job, which starts in its own folder: ours first, all absolute."""
    source = Path(roma_core.__file__).parents[1]
    entries = [
        str(Path(entry).absolute()) for entry in (inherited or "").split(os.pathsep) if entry
    ]
    if str(source) != sysconfig.get_path("purelib") and str(source) not in entries:
        entries.insert(0, str(source))
    return os.pathsep.join(entries)


Profile = TypeVar("Profile", bound=BaseModel)
DEPLOY = Path(__file__).parents[2] / "deploy"
"""Where the profiles that ship are, in a checkout."""


def read_profile(
    profile: type[Profile], kind: str, folder: Path, name: str, ours: Mapping[str, Any]
) -> Profile:
    """The profile of this name, with the user's settings laid over it.

    Args:
        kind: SLURM or Kubernetes, as people write it.

    Raises:
        ValueError: there is no such profile, or it is wrong; the text names file and field.
    """
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"there is no {kind} profile {name!r} in {folder}; there are {', '.join(known) or 'none'}. "
            f"Copy generic.yaml, or set ROMA_{kind.upper()}_PROFILES to the folder of yours"
        )
    path = folder / f"{name}.yaml"
    try:
        document = yaml.safe_load(path.read_text())
        document = {} if document is None else document
        if not isinstance(document, dict):
            raise ValueError("expected `setting: value` lines")
        return profile.model_validate({**document, "name": name, **ours})
    except ValidationError as error:
        raise ValueError(
            f"{path}: {'; '.join(map(str, validation_errors(error, profile)))}"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from None


class Unreachable(RuntimeError):
    """The target does not answer now. Nothing is known: what was asked for may have been done."""


class Rejected(ValueError):
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
    def fs_lag_s(self) -> float:
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


def program(
    spec: JobSpec, python: str, node_rank: str, master_addr: str, master_port: str, scratch: str
) -> list[str]:
    """The command line of one node, under the claim of the attempt.

    Rendezvous is static, which keeps global rank 0 on the first node, and torchrun restarts
    nothing itself: the supervisor alone makes attempts.

    Args:
        scratch: folder for torchrun's own files.

    Raises:
        ValueError: ``starter="plain"`` with more than one process.
    """
    if spec.starter == "plain":
        if spec.world_size != 1:
            raise ValueError(
                f'starter="plain" runs one process, the job asks for {spec.world_size}; '
                f'use starter="torchrun"'
            )
        return [python, *spec.command]
    return [
        *(python, "-m", "torch.distributed.run"),
        f"--nnodes={spec.nodes}",
        f"--nproc-per-node={spec.processes_per_node}",
        f"--node-rank={node_rank}",
        f"--master-addr={master_addr}",
        f"--master-port={master_port}",
        "--max-restarts=0",
        f"--log-dir={scratch}",  # else it leaves a folder in /tmp for every attempt
        *through_torchrun(spec.command),
    ]


def through_torchrun(command: Sequence[str]) -> list[str]:
    """Words that torchrun hands on as ``command``: it fills ``${local_rank}`` and halves ``$$``."""
    return [word.replace("$", "$$") for word in command]


def claimed(folder: Path | str, attempt: int, python: str, argv: list[str]) -> list[str]:
    """``argv``, run only if the attempt is not somebody else's."""
    return [python, "-m", "roma_core.claim", str(folder), str(attempt), "--", *argv]


def plan_local(
    spec: JobSpec, folder: Path | str, attempt: int, python: str, master_port: int | str
) -> list[str]:
    """Command line of one attempt on this computer.

    Raises:
        ValueError: the job wants more than one node, or cannot be started as it says.
    """
    if spec.nodes != 1:
        raise ValueError(
            f"the target local is one computer, the job asks for nodes={spec.nodes}; "
            f"use nodes=1 with more processes_per_node, or another target"
        )
    scratch = f"{folder}/attempts/{attempt}/torchrun"
    argv = program(spec, python, "0", "127.0.0.1", str(master_port), scratch)
    return claimed(folder, attempt, python, argv)


def process_variables(spec: JobSpec) -> dict[str, str]:
    """Variables of an attempt, wherever it runs, that follow from the spec alone."""
    variables = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(spec.threads_per_process),
        "MKL_NUM_THREADS": str(spec.threads_per_process),
    }
    return variables if spec.gpus_per_node else {**variables, "CUDA_VISIBLE_DEVICES": ""}


def render(spec: JobSpec, argv: list[str], variables: dict[str, str]) -> str:
    """A plan as people read it and a shell could run it; one variable or option a line."""
    lines = [*remarks(spec), ""]
    parts = [f"{name}={shlex.quote(value)}" for name, value in variables.items()] + [""]
    for word in argv:
        if word.startswith("-"):
            parts.append("")
        parts[-1] = f"{parts[-1]} {shlex.quote(word)}".strip()
    return "\n".join([*lines, " \\\n    ".join(parts), ""])


def remarks(spec: JobSpec) -> list[str]:
    """Comments at the top of a plan: what is asked for, and what is handed on."""
    names = " ".join(spec.env_names) or "none"
    return [f"# {size_of(spec)}", f"# variables handed on where they are set: {names}"]


def size_of(spec: JobSpec) -> str:
    """What a job asks for, in words."""
    asked = [
        _count(spec.nodes, "node"),
        f"{_count(spec.processes_per_node, 'process', 'es')} on each",
        f"{_count(spec.threads_per_process, 'CPU thread')} for each process",
        f"{_count(spec.gpus_per_node, 'GPU')} a node" if spec.gpus_per_node else "no GPU",
    ]
    return ", ".join(asked)


def _count(n: int, what: str, plural: str = "s") -> str:
    return f"{n} {what}{plural if n != 1 else ''}"
