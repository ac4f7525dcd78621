"""Checks of a SLURM job before it queues; reports every reason at once.

``sbatch --test-only`` is the cluster's own decision on accounts, QOS and reservations. The checks
with ``sinfo`` before it say what to change, which sbatch does not.
"""

from __future__ import annotations

import re
import secrets
import shlex
import shutil
from dataclasses import dataclass

from roma_core.job import JobFolder
from roma_pipelines.launching.launcher import Unreachable, check_writable
from roma_pipelines.launching.slurm.cluster import Answer, Shell, minutes
from roma_pipelines.launching.slurm.profile import SlurmProfile
from roma_pipelines.launching.slurm.script import cpus_per_node
from roma_pipelines.launching.spec import JobSpec, Plan

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "sinfo")
_UNCONFIGURED = "Could not establish a configuration source"
"""SLURM's message where its commands are installed and no cluster is: retrying would not help."""


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition, as sinfo groups them."""

    partition: str
    up: bool
    limit_min: float  # infinity without a limit
    count: int
    cpus: int
    memory_mb: int
    gpus: dict[str, int]  # by type; "" where the site names none


def reasons_against(plan: Plan, profile: SlurmProfile, shell: Shell, python: str) -> list[str]:
    """All reasons why the plan would not run on this cluster.

    Raises:
        Unreachable: the cluster does not answer.
    """
    missing = [] if profile.ssh else [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        return [
            f"no {', '.join(missing)} on this computer; run on a login node of the cluster, or name "
            f"one as `ssh` in the profile {profile.name}"
        ]
    found = [*_check_folder(plan.folder, shell), *_check_python(python, profile, shell)]
    answer = shell.run("sinfo", "-h", "-o", "%P|%a|%l|%D|%c|%m|%G")
    if _UNCONFIGURED.lower() in answer.text.lower():
        found.append(_unconfigured(profile))
        return found
    kinds = _nodes(answer)
    wanted = profile.partition.split(",") if profile.partition else []
    known = {kind.partition.rstrip("*") for kind in kinds}
    if unknown := [name for name in wanted if name not in known]:
        found.append(
            f"there is no partition {', '.join(unknown)} at {profile.name}; there are "
            f"{', '.join(sorted(known))}"
        )
        return found
    found += _check_size(plan.spec, profile, [k for k in kinds if _is_wanted(k, wanted)])
    # if something was found, sbatch would only say the same again, in fewer words
    if not found and (error := _test_only(shell, plan.text)):
        found.append(f"sbatch would refuse it: {error}")
    return found


def _check_folder(folder: JobFolder, shell: Shell) -> list[str]:
    root = folder.path.parent
    if (found := check_writable(root)) or not shell.ssh:
        return found
    probe = root / f".preflight-{secrets.token_hex(4)}"
    probe.write_text(probe.name)
    try:
        if shell.run("cat", str(probe)).output == probe.name:
            return []
    finally:
        probe.unlink()
    return [
        f"{shell.ssh} does not see what is written to {root} here; jobs need a folder on a file system "
        f"that both sides see: set ROMA_STORAGE_ROOT to one"
    ]


def _check_python(python: str, profile: SlurmProfile, shell: Shell) -> list[str]:
    inside = profile.container or profile.setup or profile.modules
    if inside or "/" not in python or shell.run("test", "-x", python).code == 0:
        return []  # inside, only the node can tell
    return [f"there is no interpreter {python}; set `python` in the profile {profile.name}"]


def _unconfigured(profile: SlurmProfile) -> str:
    if profile.ssh:
        return (
            f"the SLURM commands of {profile.ssh} know of no cluster; name a login node as `ssh` in "
            f"the profile {profile.name}"
        )
    return (
        f"the SLURM commands of this computer know of no cluster; run on a login node, name one as "
        f"`ssh` in the profile {profile.name}, or set SLURM_CONF to the cluster's slurm.conf"
    )


def _nodes(answer: Answer) -> list[Nodes]:
    if answer.code:
        raise Unreachable(f"sinfo: {answer.text}")
    found = []
    for line in answer.output.splitlines():
        partition, up, limit, count, cpus, memory, gres = line.split("|")
        found.append(
            Nodes(
                partition=partition,
                up=up == "up",
                limit_min=minutes(limit),
                count=int(count),
                cpus=int(cpus.rstrip("+")),
                memory_mb=int(memory.rstrip("+")),
                gpus=gpus_of(gres),
            )
        )
    return found


def _is_wanted(kind: Nodes, wanted: list[str]) -> bool:
    return kind.partition.rstrip("*") in wanted if wanted else kind.partition.endswith("*")


def _check_size(spec: JobSpec, profile: SlurmProfile, kinds: list[Nodes]) -> list[str]:
    """Resources that no kind of node of the partition has, each with the most there is."""
    where = f"of partition {profile.partition}" if profile.partition else "of the default partition"
    if not any(kind.up for kind in kinds):
        return [f"partition {profile.partition or '(default)'} is not up"]
    kinds = [kind for kind in kinds if kind.up]
    cpus = cpus_per_node(spec, profile)
    limit_min = spec.time_limit_min or profile.time_limit_min
    memory_mb = (spec.memory_gb or profile.memory_gb or 0) * 1000

    def gpus(kind: Nodes) -> int:
        return kind.gpus.get(profile.gpu_type, 0) if profile.gpu_type else sum(kind.gpus.values())

    types = sorted({name for kind in kinds for name in kind.gpus if name})
    found = []
    if spec.nodes > (most := sum(kind.count for kind in kinds)):
        found.append(f"{spec.nodes} nodes are asked for, {where[3:]} has {most}")
    if spec.gpus_per_node > (most := max(gpus(kind) for kind in kinds)):
        kind_of = f" of type {profile.gpu_type}" if profile.gpu_type else ""
        there = f" (types there: {', '.join(types)})" if profile.gpu_type and types else ""
        found.append(
            f"{spec.gpus_per_node} GPUs{kind_of} a node are asked for, a node {where} has at most "
            f"{most}{there}"
        )
    if cpus > (most := max(kind.cpus for kind in kinds)):
        found.append(f"{cpus} CPUs a node are asked for, a node {where} has at most {most}")
    if memory_mb > (most := max(kind.memory_mb for kind in kinds)):
        found.append(
            f"{memory_mb / 1000:g} GB a node are asked for, a node {where} has at most "
            f"{most / 1000:g}"
        )
    if limit_min > (longest := max(kind.limit_min for kind in kinds)):
        found.append(
            f"a time limit of {limit_min} min is asked for, the longest {where} is {longest:g} min; "
            f"an attempt that reaches its limit is resumed by the next, so a shorter limit is enough"
        )
    return found


def gpus_of(gres: str) -> dict[str, int]:
    """``gpu:a100:4(S:0-1),lustre:1`` → ``{"a100": 4}``; the type is "" where none is named."""
    found: dict[str, int] = {}
    for name, count in re.findall(r"(?:^|,)gpu:(?:([A-Za-z][^:,(]*):)?(\d+)", gres):
        found[name] = found.get(name, 0) + int(count)
    return found


def _test_only(shell: Shell, script: str) -> str:
    """Why sbatch would refuse the script; empty if it would not."""
    options = [
        line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")
    ]
    answer = shell.run("sbatch", "--test-only", *shlex.split(" ".join(options)), "--wrap=true")
    if answer.code == 0:
        return ""
    if answer.slurm_is_away:
        raise Unreachable(f"sbatch --test-only: {answer.text}")
    return answer.text
