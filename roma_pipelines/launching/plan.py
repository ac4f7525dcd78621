"""From a JobSpec to what a target is given: pure functions, pinned by golden files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from roma_pipelines.launching.job import JobSpec


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
    return [python, "-m", "roma_core.attempt", str(folder), str(attempt), "--", *argv]


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
