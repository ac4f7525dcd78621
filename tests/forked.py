"""Processes that start in a tenth of a second, for tests that need one but do not test its start.

A server, which the first process starts, imports torch and MLflow once, and every process is forked
from it with an environment, a folder and streams of its own. A process that Python starts imports
them for two to five seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_TMPDIR = tempfile.gettempdir()
Pipe = _context.Pipe


def start(
    target: Callable[..., Any],
    *arguments: Any,
    output: Path | None = None,
    errors: Path | None = None,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """A started process that calls ``target``.

    Args:
        output: file to which the process appends what it writes; stderr too, unless ``errors`` is given.
        environment: the whole one; by default that of this process.
    """
    values = dict(os.environ if environment is None else environment)
    streams = (output, errors or output)
    process = _context.Process(
        target=_begin, args=(target, arguments, streams, cwd or Path.cwd(), values)
    )
    # the server inherits them when it starts; its socket lies in no TMPDIR of a test
    with (
        patch.dict(os.environ, ENVIRONMENT | {"TMPDIR": _TMPDIR}),
        patch.object(tempfile, "tempdir", None),
    ):
        process.start()
    return process


def _begin(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    streams: tuple[Path | None, Path | None],
    cwd: Path,
    environment: dict[str, str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    for number, path in enumerate(streams, start=1):
        if path is not None:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, number)
            os.close(handle)
    target(*arguments)


def run_module(module: str, *arguments: str) -> None:
    """As ``python -m MODULE ARGUMENTS``; the ``target`` of a process."""
    sys.argv = [module, *arguments]
    sys.path.insert(0, str(Path.cwd()))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_server(module: str, *arguments: str) -> None:
    """The same, in a session of its own, which can be killed with what it started."""
    os.setsid()
    run_module(module, *arguments)


def run(
    module: str, *arguments: str, seconds: float | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``python -m MODULE ARGUMENTS`` to its end, as ``subprocess.run`` with ``capture_output``.

    Args:
        seconds: after which the process is killed, with subprocess.TimeoutExpired.
        options: ``cwd`` and ``environment`` of :func:`start`.
    """
    return _finished(run_module, [module, *arguments], seconds, **options)


def run_python(
    argv: list[str], *, cwd: Path, env: Mapping[str, str], timeout: float | None = None, **_: Any
) -> subprocess.CompletedProcess[str]:
    """In the place of ``subprocess.run``, of ``python -I -c CODE ARGUMENTS``."""
    _, isolated, c, code, *arguments = argv
    assert (isolated, c) == ("-I", "-c")
    return _finished(_run_code, [code, *arguments], timeout, cwd=cwd, environment=env)


def _run_code(code: str, *arguments: str) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def _finished(
    target: Callable[..., None], arguments: list[str], seconds: float | None, **options: Any
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = start(target, *arguments, output=output, errors=errors, **options)
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, seconds or 0.0)
        return subprocess.CompletedProcess(
            arguments, process.exitcode, output.read_text(), errors.read_text()
        )
