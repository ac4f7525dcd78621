"""The profile of one SLURM cluster, and the batch script of an attempt on it.

A profile, ``profiles/slurm/<name>.yaml``, holds what is the cluster's; what is the job's is
in its JobSpec, and what is the user's (account, partition) may be set by ``ROMA_SLURM_…``. All that
reaches a shell or the scheduler from here is a name without shell characters, is quoted, or is a
line of ``setup``, which is shell.

The batch shell runs on the first node: it loads modules, finds the rendezvous address, and starts
one task on every node, which claims the attempt and becomes torchrun. The batch shell alone
receives USR1, which SLURM sends some time before the limit, and turns it into the stop file.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_settings import SettingsConfigDict

from roma_core.claim import ATTEMPT_VARIABLE, FOLDER_VARIABLE
from roma_core.job import JobFolder
from roma_core.settings import RomaSettings
from roma_pipelines.launching import launcher
from roma_pipelines.launching.spec import JobSpec

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+/-]*$")]
"""A partition, an account, a module, …: without shell characters."""
Names = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,+/&|()*\[\]-]*$")]
"""The same with SLURM's syntax for several: ``a,b`` or ``[a|b]``; quoted where it is used."""
Option = Annotated[str, StringConstraints(pattern=r"^--[a-z][a-z-]*(=[^\n\"'`$\\]+)?$")]

# fmt: off
_PLANNED_OPTIONS = frozenset([  # the batch script sets them itself
    "array", "chdir", "comment", "cpus-per-task", "error", "export", "gpus", "gpus-per-node",
    "gpus-per-socket", "gpus-per-task", "job-name", "mem", "no-requeue", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "requeue", "signal", "time",
])
# fmt: on


class SlurmSettings(RomaSettings):
    """The SLURM cluster to use, and the user's own settings on it; the rest is in its profile."""

    model_config = SettingsConfigDict(env_prefix="ROMA_SLURM_")

    profile: str = Field("generic", description="Profile of jobs that name none.")
    profiles: Path | None = None
    """Folder of profiles; null takes profiles/slurm of the project, and those that are shipped."""
    account: Name | None = Field(None, description="Account to charge; null takes the profile's.")
    partition: Names | None = Field(None, description="null takes the profile's.")
    qos: Name | None = Field(None, description="Quality of service; null takes the profile's.")


class SlurmProfile(launcher.ClusterProfile):
    """A SLURM cluster: how jobs are submitted to it, and what they ask for there."""

    kind, settings = "SLURM", SlurmSettings

    name: Name = Field(description="Name of the profile and of its file.")
    ssh: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]*$")
    """Login node, as ssh names it; null: SLURM's commands are on this computer."""
    partition: Names | None = Field(None, description="null: the cluster's default.")
    account: Name | None = Field(None, description="Account to charge.")
    qos: Name | None = Field(None, description="Quality of service.")
    constraint: Names | None = Field(None, description="Features nodes must have.")
    gpu_type: Name | None = Field(None, description="null: GPUs of any type.")
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    """Option of sbatch that asks for GPUs."""
    exclusive: bool = Field(False, description="Take whole nodes.")
    cpus_per_process: int | None = Field(None, gt=0, description="null: its number of threads.")
    time_limit_min: int = Field(60, gt=1, description="Of one attempt, for jobs that name none.")
    stop_before_end_s: int = Field(120, gt=0, description="Save this long before the limit.")
    modules: tuple[Name, ...] = Field((), description="Names for `module load`, in order.")
    setup: tuple[str, ...] = Field((), description="Bash lines before the job, on the first node.")
    python: str | None = Field(None, pattern=r"^[^\n]+$")
    """Interpreter on the nodes, or in the container; null: the one that launches."""
    container: tuple[str, ...] = Field((), description="Command in front: apptainer exec IMAGE.")
    sbatch_options: tuple[Option, ...] = Field((), description="Further options of sbatch.")
    srun_options: tuple[Option, ...] = Field((), description="Further options of srun.")
    poll_s: float = Field(5.0, gt=0, description="Seconds between polls while states change.")
    slowest_poll_s: float = Field(60.0, gt=0, description="Longest interval of polls, seconds.")

    @model_validator(mode="after")
    def _options_do_not_contradict_the_plan(self) -> Self:
        for option in self.sbatch_options:
            (name, _, value), why = option.removeprefix("--").partition("="), ""
            planned = any(own.startswith(name) for own in _PLANNED_OPTIONS)  # it may be abbreviated
            if planned or (name == "gres" and re.search(r"\bgpu\b", value)):
                why = "the job does (GPUs: gpus_per_node, with gpu_option of the profile)"
            elif "clusters".startswith(name):  # jobs there would be neither found nor cancelled
                why = "jobs are watched on one cluster; write a profile of that one, with its `ssh`"
            elif name in ("parsable", "test-only", "wait", "wrap"):
                why = "it changes what sbatch answers"
            if why:
                raise ValueError(f"sbatch_options must not set {option.removeprefix('--')}: {why}")
        return self


# -- the batch script: pure, pinned by golden files --------------------------------------------

_STOP = """\
# SLURM's signal before the limit becomes the stop file: the trainer saves, and ends with "continue".
# A duplicate of the job, which did not claim the attempt, must not stop it.
signalled=
trap 'signalled=1; grep -qs "\\"$SLURM_JOB_ID\\"" "$attempt/owner.json" && touch "$attempt/stop"' USR1 TERM
"""

_RENDEZVOUS = """\
# Rendezvous address: the first node, as SLURM itself addresses it.
address=127.0.0.1
if [ "$SLURM_JOB_NUM_NODES" != 1 ]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${first%%$'\\n'*}
    [[ $(scontrol -o show node "$first") =~ \\ NodeAddr=([^\\ ]+) ]] ||
        fail "scontrol does not give the address of the first node (${first:-no name})"
    address=${BASH_REMATCH[1]}
fi
port=$((20000 + SLURM_JOB_ID % 20000))
while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
"""

_WAIT = """\
# A signal interrupts `wait`; the step ends by itself, and its exit code is the job's.
while
    signalled=
    wait "$step"
    code=$?
    [ -n "$signalled" ]
do :; done
exit "$code"
"""


def batch_script(
    spec: JobSpec, profile: SlurmProfile, folder: JobFolder, attempt: int, python: str
) -> str:
    """The script for ``sbatch``; ``python`` is that of the nodes, unless the profile names one.

    Raises ValueError if no SLURM could run the spec, or the folder cannot be named in a script.
    """
    path = str(folder.path)
    if set("\n\r\\\"'") & set(path):
        raise ValueError(
            f"the job folder {path!r} has a quote, a backslash or a line break in its name, which "
            f"SLURM does not accept; set ROMA_STORAGE_ROOT to another folder"
        )
    variables = {**launcher.process_variables(spec), **profile.environment}
    parts = [
        # a login shell defines `module`, a function that the environment does not pass on
        "#!/bin/bash -l" if profile.modules or profile.setup else "#!/bin/bash",
        *launcher.header(spec),
        *(f"#SBATCH {option}" for option in _options(spec, profile, path, attempt)),
        "",
        f"folder={shlex.quote(path)}",
        f"attempt=$folder/attempts/{attempt}",
        'fail() { echo "roma: $*" >&2; exit 1; }',
        "",
        _STOP,
        f'export {FOLDER_VARIABLE}="$folder" {ATTEMPT_VARIABLE}={attempt}',
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        *(f'module load {name} || fail "no module {name}"' for name in profile.modules),
        *profile.setup,
        "",
        *([_RENDEZVOUS] if spec.runner == "torchrun" else []),
        *_step(spec, profile, folder, attempt, profile.python or python),
        _WAIT,
    ]
    return "\n".join(parts)


def _options(spec: JobSpec, profile: SlurmProfile, folder: str, attempt: int) -> list[str]:
    limit_min = spec.time_limit_min or profile.time_limit_min
    # limits are checked every 30 s, and a signal may come a minute early: short jobs get a third
    stop_s = min(profile.stop_before_end_s, limit_min * 60 // 3)
    memory_gb = spec.memory_gb or profile.memory_gb
    options, gpus = list(profile.sbatch_options), {}
    if spec.gpus_per_node:
        count = ":".join(filter(None, (profile.gpu_type, str(spec.gpus_per_node))))
        gpus = {"gpus-per-node": count}
        if profile.gpu_option == "gres":  # a second --gres would replace the first
            others = [option for option in options if option.startswith("--gres=")]
            options = [option for option in options if option not in others]
            wanted = [f"gpu:{count}", *(option.removeprefix("--gres=") for option in others)]
            gpus = {"gres": ",".join(wanted)}
    escaped = folder.replace("%", "%%")  # %j and the like are SLURM's
    values = {
        "job-name": spec.attempt_name(attempt),
        "comment": f"{spec.key}/{attempt}",
        "chdir": folder,
        "output": f"{escaped}/attempts/{attempt}/log",
        "open-mode": "append",
        "export": "ALL",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": str(spec.nodes),
        "ntasks-per-node": "1",
        "cpus-per-task": str(cpus_per_node(spec, profile)),
        **gpus,
        "mem": f"{math.ceil(memory_gb * 1000)}M" if memory_gb else None,
        "time": str(limit_min),
        "signal": f"B:USR1@{stop_s}",
    }
    given = [f"--{k}={shlex.quote(v)}" for k, v in values.items() if v is not None]
    flags = ["--no-requeue", *(["--exclusive"] if profile.exclusive else [])]
    further = [
        f"{name}={shlex.quote(value)}" if equals else name
        for name, equals, value in (option.partition("=") for option in options)
    ]
    return [*given, *flags, *further]


def cpus_per_node(spec: JobSpec, profile: SlurmProfile) -> int:
    return max(spec.threads_per_process, profile.cpus_per_process or 1) * spec.processes_per_node


_SHELL_VALUES = ("$address", "$port", "$attempt/torchrun")  # only the job's shell knows them
_TASK = (
    f'exec "$0" -m roma_core.claim "${FOLDER_VARIABLE}" "${ATTEMPT_VARIABLE}" -- '
    '"$0" -m torch.distributed.run --node-rank="$SLURM_PROCID" "$@"'
)


def _step(
    spec: JobSpec, profile: SlurmProfile, folder: JobFolder, attempt: int, python: str
) -> list[str]:
    # one task per node that becomes the runner itself: else no signal would reach the processes
    argv = launcher.program(spec, python, "RANK", "ADDRESS", "PORT", "SCRATCH")
    if spec.runner == "torchrun":
        n = len(spec.command)
        options = shlex.join(argv[3:-n]).replace("--node-rank=RANK ", "")  # each task's own
        for name, value in zip(("ADDRESS", "PORT", "SCRATCH"), _SHELL_VALUES, strict=True):
            options = options.replace(f"={name}", f'="{value}"')
        lines = [shlex.join(["bash", "-c", _TASK, python]), options, shlex.join(argv[-n:])]
    else:
        lines = [shlex.join(launcher.claimed(folder, attempt, python, [])), shlex.join(argv)]
    further = [shlex.join(words) for words in (profile.srun_options, profile.container) if words]
    srun = 'srun --kill-on-bad-exit=1 --wait=600 --cpus-per-task="$SLURM_CPUS_PER_TASK"'
    return [" \\\n    ".join([srun, *further, *lines]) + " &", "step=$!", ""]
