"""``roma doctor``: what a training would find here. Every check is short and changes nothing.

A check gives a :class:`Finding`; one that fails says what to do. Nothing waits longer than a few
seconds for anybody.

``roma doctor``: versions, devices, world, storage and trackers, as a training would find them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import click

TIMEOUT_S = 2.0
_PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "pydantic-settings", "mlflow", "wandb")
_WORLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
_STORAGE_MB = 64
_SLOW_MB_PER_S = 20


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    verdict: Literal["ok", "note", "failed"]
    text: str


def findings(folder: Path) -> Iterator[Finding]:
    """All checks, one after the other; ``folder`` is where runs are written."""
    yield from versions()
    yield from devices()
    yield from world()
    yield from storage(folder)
    yield from trackers()


def versions() -> Iterator[Finding]:
    """Python and the packages that training uses."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "failed", "not installed; pip install roma-pipeline brings it")


def devices() -> Iterator[Finding]:
    """What this process may compute on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding(
        "cpu", "ok", f"{cores} core(s) for this process, {os.cpu_count()} in the computer"
    )
    if not torch.cuda.is_available():
        yield Finding("gpu", "note", "none that torch can use; training runs on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(i))
        text = f"{facts.name}, {free:.1f} of {total:.1f} GiB free, {bf16}"
        yield Finding(f"gpu {i}", "ok", text)


def world() -> Iterator[Finding]:
    """What the launcher of several processes says; under torchrun every process prints its own."""
    said = {name: os.environ[name] for name in _WORLD if name in os.environ}
    if "WORLD_SIZE" not in said:
        text = "one process (start with torchrun or accelerate launch for more)"
        yield Finding("world", "ok", "; ".join([text, *(f"{k}={v}" for k, v in said.items())]))
        return
    text = ", ".join(f"{k}={v}" for k, v in said.items())
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in said]
    if lacking:
        yield Finding("world", "failed", f"{text}, but {lacking} not set; use torchrun")
        return
    yield Finding("world", "ok", text)
    host = said["MASTER_ADDR"]
    try:
        yield Finding("rendezvous", "ok", f"{host} is {socket.gethostbyname(host)}")
    except OSError as error:
        yield Finding("rendezvous", "failed", f"{host}: {error}; check MASTER_ADDR")


def storage(folder: Path) -> Iterator[Finding]:
    """Whether the folder, or the nearest one above it, can hold checkpoints, and how fast."""
    here = folder.absolute()
    while not here.is_dir():
        here = here.parent
    try:
        with tempfile.TemporaryDirectory(dir=here, prefix=".roma-doctor-") as name:
            yield from _try_storage(Path(name), here)
    except OSError as error:
        yield Finding("storage", "failed", f"{here}: {error}; give another folder (--out)")


def _try_storage(aside: Path, here: Path) -> Iterator[Finding]:
    content = os.urandom(2**20)
    file = aside / "file"
    started = time.perf_counter()
    with file.open("wb") as handle:
        for _ in range(_STORAGE_MB):
            handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    speed = _STORAGE_MB / (time.perf_counter() - started)
    started = time.perf_counter()
    for k in range(10):
        small = aside / f"small-{k}"
        with small.open("wb") as handle:
            handle.write(b"x")
            os.fsync(handle.fileno())
        small.replace(aside / "renamed")
    commit_ms = (time.perf_counter() - started) * 100
    slow = speed < _SLOW_MB_PER_S
    yield Finding(
        "storage",
        "note" if slow else "ok",
        f"{here}: {speed:.0f} MB/s written and synced, {commit_ms:.1f} ms for a small file"
        + (", slow: raise save_every" if slow else ""),
    )
    try:
        os.link(file, aside / "link")
    except OSError as error:
        text = (
            f"no hard links ({error}); jobs need them to be started once only: use a POSIX folder"
        )
        yield Finding("links", "failed", text)
    else:
        yield Finding("links", "ok", "hard links work")


def trackers() -> Iterator[Finding]:
    """Whether MLflow and Weights & Biases answer, if they are set up."""
    from roma_core.trainer.trackers import WandbConfig

    uri = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("ROMA_MLFLOW_TRACKING_URI")
    if not uri:
        yield Finding("mlflow", "note", "no MLFLOW_TRACKING_URI; metrics stay in metrics.jsonl")
    elif urlsplit(uri).scheme in ("http", "https"):
        yield _answer("mlflow", uri.rstrip("/") + "/health")
    elif urlsplit(uri).scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        found = path.is_file()
        text = f"{path}" if found else f"{path} does not exist; `roma-pipeline up` or demo makes it"
        yield Finding("mlflow", "ok" if found else "failed", text)
    else:
        yield Finding("mlflow", "note", f"{urlsplit(uri).scheme}: not looked at")
    mode = WandbConfig().effective_mode
    if mode != "online":
        yield Finding("wandb", "ok" if mode == "offline" else "note", mode)
    else:
        yield _answer("wandb", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def _answer(topic: str, url: str) -> Finding:
    """Whether anybody answers at ``url``, whatever it says; never shows what may stand before @."""
    shown = (
        urlsplit(url)._replace(netloc=urlsplit(url).netloc.rpartition("@")[2], query="").geturl()
    )
    started = time.perf_counter()
    try:
        urllib.request.urlopen(url, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return Finding(topic, "note", f"{shown} answers with {error.code}")
    except (OSError, ValueError) as error:
        text = f"{shown} does not answer ({error}); training goes on without it and tells it later"
        return Finding(topic, "failed", text)
    return Finding(
        topic, "ok", f"{shown} answers in {(time.perf_counter() - started) * 1000:.0f} ms"
    )


_COLOURS = {"ok": "green", "note": "yellow", "failed": "red"}


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="the working directory",
    help="Folder that runs are written to; its speed is measured with 64 MB.",
)
def doctor(out: Path) -> None:
    """Look at what a training needs, and say what is missing.

    Leaves with 1 if something failed. A tracker is asked for two seconds at most.
    """

    failed = 0
    for finding in findings(out):
        failed += finding.verdict == "failed"
        verdict = click.style(f"{finding.verdict:<7}", fg=_COLOURS[finding.verdict])
        click.echo(f"{verdict} {finding.topic:<18} {finding.text}")
    sys.exit(1 if failed else 0)
