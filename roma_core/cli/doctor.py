"""``roma doctor``: versions, devices, processes, storage and trackers as a training would find them.

Every check is short and changes nothing; a failed one says what to do. ``roma-pipeline health``
checks the services of an installation instead, with the same kind of results.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import click

from roma_core.cli import json_option, print_json

_TIMEOUT_S = 2.0
_PACKAGES = ("torch", "accelerate", "safetensors", "numpy", "pydantic-settings", "mlflow", "wandb")
_WORLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
_STORAGE_MB = 64
_SLOW_MB_PER_S = 20


@dataclass(frozen=True)
class CheckResult:
    """One line of a report: what was checked, its status, and why or what to do."""

    name: str
    status: Literal["ok", "warning", "error"]
    detail: str


def report(results: Iterable[CheckResult], *, as_json: bool = False, strict: bool = False) -> int:
    """Print results as they come, or one JSON list; exit code 1 on any error (or warning)."""
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    seen = []
    for result in results:
        seen.append(result)
        if not as_json:
            status = click.style(f"{result.status:<8}", fg=colours[result.status])
            click.echo(f"{status} {result.name:<18} {result.detail}")
    if as_json:
        print_json([asdict(result) for result in seen])
    bad = {"error", "warning"} if strict else {"error"}
    return int(any(result.status in bad for result in seen))


def versions() -> Iterator[CheckResult]:
    """Python and the packages that training uses."""
    yield CheckResult("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        try:
            yield CheckResult(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield CheckResult(name, "error", "not installed; pip install roma-pipeline brings it")


def devices() -> Iterator[CheckResult]:
    """CPUs and GPUs of this process."""
    import torch

    n_cpus = os.cpu_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else n_cpus
    yield CheckResult("cpu", "ok", f"{cores} core(s) for this process, {n_cpus} in the computer")
    if not torch.cuda.is_available():
        yield CheckResult("gpu", "warning", "none that torch can use; training runs on the CPU")
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(i))
        text = f"{facts.name}, {free:.1f} of {total:.1f} GiB free, {bf16}"
        yield CheckResult(f"gpu {i}", "ok", text)


def world() -> Iterator[CheckResult]:
    """Variables of a launcher of several processes; under torchrun every process prints its own."""
    found = {name: os.environ[name] for name in _WORLD if name in os.environ}
    text = ", ".join(f"{k}={v}" for k, v in found.items())
    if "WORLD_SIZE" not in found:
        one = "one process (start with torchrun or accelerate launch for more)"
        yield CheckResult("world", "ok", "; ".join(filter(None, [one, text])))
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in found]
    if missing:
        yield CheckResult("world", "error", f"{text}, but {missing} not set; use torchrun")
        return
    yield CheckResult("world", "ok", text)
    host = found["MASTER_ADDR"]
    try:
        yield CheckResult("rendezvous", "ok", f"{host} is {socket.gethostbyname(host)}")
    except OSError as error:
        yield CheckResult("rendezvous", "error", f"{host}: {error}; check MASTER_ADDR")


def storage(folder: Path) -> Iterator[CheckResult]:
    """Whether the folder, or the nearest existing one above it, can hold checkpoints, and how fast."""
    here = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=here, prefix=".roma-doctor-") as name:
            yield from _measured(Path(name), here)
    except OSError as error:
        yield CheckResult("storage", "error", f"{here}: {error}; give another folder (--run-dir)")


def _measured(scratch: Path, here: Path) -> Iterator[CheckResult]:
    content = os.urandom(2**20)
    file = scratch / "file"
    started = time.perf_counter()
    with file.open("wb", buffering=0) as handle:
        for _ in range(_STORAGE_MB):
            handle.write(content)
        os.fsync(handle.fileno())
    speed = _STORAGE_MB / (time.perf_counter() - started)
    started = time.perf_counter()
    for k in range(10):
        small = scratch / f"small-{k}"
        with small.open("wb") as handle:
            handle.write(b"x")
            os.fsync(handle.fileno())
        small.replace(scratch / "renamed")
    commit_ms = (time.perf_counter() - started) * 100
    text = f"{here}: {speed:.0f} MB/s written and synced, {commit_ms:.1f} ms for a small file"
    slow = speed < _SLOW_MB_PER_S
    advice = ", slow: raise save_every" if slow else ""
    yield CheckResult("storage", "warning" if slow else "ok", text + advice)
    try:
        os.link(file, scratch / "link")
        yield CheckResult("links", "ok", "hard links work")
    except OSError as error:
        text = f"no hard links ({error}); jobs need them to start only once: use a POSIX folder"
        yield CheckResult("links", "error", text)


def trackers() -> Iterator[CheckResult]:
    """Whether MLflow and Weights & Biases answer, if they are set up."""
    from roma_core.trainer.trackers import WandbConfig

    uri = os.environ.get("MLFLOW_TRACKING_URI") or os.environ.get("ROMA_MLFLOW_TRACKING_URI")
    scheme = urlsplit(uri or "").scheme
    if not uri:
        text = "no MLFLOW_TRACKING_URI; metrics stay in metrics.jsonl"
        yield CheckResult("mlflow", "warning", text)
    elif scheme in ("http", "https"):
        yield _answer("mlflow", uri.rstrip("/") + "/health")
    elif scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        found = path.is_file()
        text = f"{path}" if found else f"{path} does not exist; `roma-pipeline up` or demo makes it"
        yield CheckResult("mlflow", "ok" if found else "error", text)
    else:
        yield CheckResult("mlflow", "warning", f"{scheme}: not checked")
    mode = WandbConfig().effective_mode
    if mode != "online":
        yield CheckResult("wandb", "ok" if mode == "offline" else "warning", mode)
    else:
        yield _answer("wandb", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))


def _answer(topic: str, url: str) -> CheckResult:
    """Whether a server answers at ``url``, with any status; credentials are not shown."""
    host = urlsplit(url).netloc.rpartition("@")[2]
    shown = urlsplit(url)._replace(netloc=host, query="").geturl()
    started = time.perf_counter()
    try:
        urllib.request.urlopen(url, timeout=_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return CheckResult(topic, "warning", f"{shown} answers with {error.code}")
    except (OSError, ValueError) as error:
        text = f"{shown} does not answer ({error}); training continues and logs to it later"
        return CheckResult(topic, "error", text)
    elapsed_ms = (time.perf_counter() - started) * 1000
    return CheckResult(topic, "ok", f"{shown} answers in {elapsed_ms:.0f} ms")


@click.command(epilog="Example: roma doctor --run-dir runs")
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    show_default="the working directory",
    help="Folder of runs; its speed is measured with 64 MB.",
)
@json_option
def doctor(run_dir: Path, as_json: bool) -> None:
    """Check what a training needs here and print a line for each; exit 1 on any error.

    Each tracker gets two seconds to answer.
    """
    checks = itertools.chain(versions(), devices(), world(), storage(run_dir), trackers())
    sys.exit(report(checks, as_json=as_json))
