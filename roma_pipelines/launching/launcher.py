"""The interface of a target, and what all targets share: command lines, environment, profiles."""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol, Self

import yaml
from pydantic import Field, StringConstraints, ValidationError

import roma_core
from roma_core.job import JobFolder
from roma_core.settings import Frozen, RomaSettings, validation_errors
from roma_pipelines.launching.spec import JobHandle, JobSpec, JobState, Plan
from roma_pipelines.storage import MIN_FREE_MB, project_folder

PLANNED_FOLDER = JobFolder("JOB_FOLDER")
"""Stands for the job folder in a plan that is only printed."""


class Unreachable(RuntimeError):
    """The target does not answer now. The request may have been carried out all the same."""


class Rejected(ValueError):
    """The target will not run the job as it is; ``reasons`` has every reason found."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("the target would reject the job:\n- " + "\n- ".join(reasons))


class Launcher(Protocol):
    """Runs attempts of a job on one target: plan, preflight, submit, then watch or cancel.

    Attributes:
        backend: kind of the target: ``local``, ``slurm``, …
        fs_lag_s: seconds until files that an attempt wrote are certainly visible here.
        profile: of the cluster, if the target is one.
    """

    backend: str
    fs_lag_s: float

    @property
    def profile(self) -> ClusterProfile | None: ...

    def plan(self, spec: JobSpec, folder: JobFolder = PLANNED_FOLDER, attempt: int = 1) -> Plan:
        """One attempt as it would be submitted; pure. ValueError if the target can never run it."""

    def preflight(self, plan: Plan) -> list[str]:
        """Every reason known now why the target would not run the plan; may raise Unreachable."""

    def submit(self, plan: Plan, environment: Mapping[str, str]) -> JobHandle:
        """Start the attempt; ``environment`` holds further variables with their values.

        Raises:
            Unreachable: whether it was started is not known; ``find`` finds out.
            Rejected: it was not started, and never will be as it is.
        """

    def find(self, plan: Plan) -> JobHandle | None:
        """The attempt as its owner or the target knows it; None if it was never started.

        Raises Unreachable if the target does not answer.
        """

    def watch(self, handle: JobHandle) -> JobState:
        """The attempt's state; an end once all processes are gone, UNKNOWN without an answer."""

    def cancel(self, handle: JobHandle) -> None:
        """End the attempt with everything it started; returns when it is gone.

        Raises Unreachable without an answer, RuntimeError if a part of it is still running.
        """


# -- command lines ---------------------------------------------------------------------------


def program(
    spec: JobSpec, python: str, node_rank: str, master_addr: str, master_port: str, scratch: str
) -> list[str]:
    """The command line of one node; ``scratch`` is for torchrun's own files.

    Rendezvous is static, which keeps global rank 0 on the first node, and torchrun restarts
    nothing itself: only the supervisor makes attempts. ValueError for a contradictory spec.
    """
    if spec.runner == "plain":
        if spec.world_size != 1:
            raise ValueError(
                f'runner="plain" runs one process, the job asks for {spec.world_size}; '
                f'use runner="torchrun"'
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
        # torchrun substitutes ${local_rank} and turns $$ into $
        *(word.replace("$", "$$") for word in spec.command),
    ]


def claimed(folder: JobFolder, attempt: int, python: str, argv: list[str]) -> list[str]:
    """``argv`` behind the claim of the attempt."""
    return [python, "-m", "roma_core.claim", str(folder.path), str(attempt), "--", *argv]


def process_variables(spec: JobSpec) -> dict[str, str]:
    """Environment variables of an attempt on any target, from the spec alone."""
    variables = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(spec.threads_per_process),
        "MKL_NUM_THREADS": str(spec.threads_per_process),
    }
    return variables if spec.gpus_per_node else {**variables, "CUDA_VISIBLE_DEVICES": ""}


def render(spec: JobSpec, argv: list[str], variables: dict[str, str]) -> str:
    """A command as a shell could run it, one variable or option a line."""
    parts = [f"{name}={shlex.quote(value)}" for name, value in variables.items()] + [""]
    for word in argv:
        if word.startswith("-"):
            parts.append("")
        parts[-1] = f"{parts[-1]} {shlex.quote(word)}".strip()
    return "\n".join([*header(spec), "", " \\\n    ".join(parts), ""])


def header(spec: JobSpec) -> list[str]:
    names = " ".join(spec.env_names) or "none"
    return [f"# {size_of(spec)}", f"# environment variables passed on if set: {names}"]


def size_of(spec: JobSpec) -> str:
    """The resources of a job as text: ``2 nodes, 4 processes on each, …``."""

    def count(n: int, what: str, plural: str = "s") -> str:
        return f"{n} {what}{plural if n != 1 else ''}"

    processes = count(spec.processes_per_node, "process", "es")
    threads = count(spec.threads_per_process, "CPU thread")
    gpus = f"{count(spec.gpus_per_node, 'GPU')} per node" if spec.gpus_per_node else "no GPU"
    return f"{count(spec.nodes, 'node')}, {processes} on each, {threads} for each process, {gpus}"


# -- preflight -------------------------------------------------------------------------------


def check_writable(root: Path) -> list[str]:
    """Reasons why jobs cannot be written below ``root``, which is made; empty if they can be."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        return [f"cannot write to {root} ({error.strerror}); set ROMA_STORAGE_ROOT"]
    free_mb = shutil.disk_usage(root).free / 1e6
    if free_mb < MIN_FREE_MB:
        return [f"{root} has {free_mb:.0f} MB of free space; {MIN_FREE_MB} MB are needed"]
    return []


# -- environment -----------------------------------------------------------------------------

# Settings are frozen in config.json, and variables of an outer torchrun or scheduler would mislead
# this one: so an allow list beside env_names, not a deny list.
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
    """Variables that every job gets from this process, and an absolute PYTHONPATH."""
    variables = {
        name: value
        for name, value in os.environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    source = str(Path(roma_core.__file__).parents[1])
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    entries = [str(Path(entry).absolute()) for entry in entries if entry]
    if source != sysconfig.get_path("purelib") and source not in entries:
        entries.insert(0, source)
    return {**variables, "PYTHONPATH": os.pathsep.join(entries)}


def passthrough_env(spec: JobSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """Further variables of this job: those its spec names, and those given with their values."""
    named = {name: os.environ[name] for name in spec.env_names if name in os.environ}
    return {**named, **environment}


# -- profiles of clusters --------------------------------------------------------------------

Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def profile_folders(kind: str) -> list[Path]:
    """Folders of profiles, those that are shipped first; a later one of a name replaces an earlier."""
    return [Path(__file__).parent / kind / "profiles", project_folder() / "profiles" / kind]


class ClusterProfile(Frozen):
    """What profiles of clusters hold: ``profiles/<kind>/<name>.yaml`` of the project, or shipped."""

    kind: ClassVar[str]
    settings: ClassVar[type[RomaSettings]]

    schema_version: Literal[1] = 1
    name: str
    description: str = Field("", description="Which cluster this is.")
    environment: dict[Variable, str] = Field({}, description="Variables of the job; no secrets.")
    memory_gb: float | None = Field(None, gt=0, description="Per node, for jobs that name none.")
    price_per_gpu_hour: float | None = Field(None, ge=0, description="For the cost on the asset.")
    currency: str = Field("EUR", description="Currency of the price.")

    @classmethod
    def load(cls, name: str | None = None, settings: RomaSettings | None = None) -> Self:
        """The profile of this name (None: that of the settings), with the user's settings over it.

        Raises ValueError if there is none, or if it is wrong, with file and field.
        """
        overrides = (settings or cls.settings()).model_dump(exclude_none=True)
        default, folder = overrides.pop("profile"), overrides.pop("profiles", None)
        name, folders = name or default, [folder] if folder else profile_folders(cls.kind.lower())
        known = {path.stem: path for each in folders for path in each.glob("*.yaml")}
        if name not in known:
            shipped = profile_folders(cls.kind.lower())[0] / "generic.yaml"
            raise ValueError(
                f"there is no {cls.kind} profile {name!r} in {folders[-1]}; there are "
                f"{', '.join(sorted(known)) or 'none'}. Copy {shipped} there, or set "
                f"ROMA_{cls.kind.upper()}_PROFILES to the folder of yours"
            )
        path = known[name]
        try:
            document = yaml.safe_load(path.read_text())
            document = {} if document is None else document
            if not isinstance(document, dict):
                raise ValueError("expected `setting: value` lines")
            return cls.model_validate({**document, "name": name, **overrides})
        except ValidationError as error:
            problems = "; ".join(map(str, validation_errors(error, cls)))
            raise ValueError(f"{path}: {problems}") from None
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: {error}") from None
