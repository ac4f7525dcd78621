"""Smoke test of a package: load it as a consumer does, in a new process, without this project.

The process loads the model's own file of code by path, blocks every import of this project,
verifies the folder, computes the golden rows, and times single series.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pydantic import Field

from roma_core.serving.package import MODEL_CODE
from roma_core.serving.registry_client import code_of
from roma_core.settings import Frozen

_TIMEOUT_S = 300
_PROGRAM = """
import importlib.util, json, pathlib, statistics, sys, time
code, folder, repeats = sys.argv[1:]
for blocked in ("roma_core", "roma_pipelines"):
    sys.modules[blocked] = None  # importing it raises
spec = importlib.util.spec_from_file_location("model_code", code)
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
model.torch.set_num_threads(1)
folder = pathlib.Path(folder)
try:
    model.open_package(folder)  # warm-up: the first load imports a thousand modules of torch
    start = time.perf_counter()
    package = model.open_package(folder)
    load_s = time.perf_counter() - start
    golden = folder / "golden.jsonl"
    difference = package.check_golden(golden)
except model.PackageError as error:
    sys.exit(f"PackageError: {error}")
rows = [model.Series(**json.loads(line)["series"]) for line in golden.read_text().splitlines()]
times = []
for _ in range(int(repeats)):
    for row in rows:
        start = time.perf_counter()
        package.predict([row])
        times.append(time.perf_counter() - start)
latency = statistics.median(times) * 1e3
print(json.dumps({"load_s": load_s, "latency_ms": latency, "golden_difference": difference}))
"""


class SmokeTest(Frozen):
    """Measurements of a package that its own code alone loaded in a new process."""

    load_s: float = Field(
        description="Time to verify, load and compute the golden rows, without imports."
    )
    latency_ms: float = Field(description="Median time of one series among the golden rows.")
    golden_difference: float = Field(description="Largest difference of an output; at most 1e-4.")


class SmokeTestFailed(RuntimeError):
    """A consumer cannot use the package; the message says why."""


def smoke_test_package(folder: Path) -> SmokeTest:
    """Load a package in a new process, check its golden rows and time it.

    A package inside a downloaded model is loaded by that model's code, any other by this project's.

    Raises:
        SmokeTestFailed: the package was rejected, or the process failed.
    """
    model = folder.parent.parent
    code = code_of(model) if (model / "MLmodel").is_file() else MODEL_CODE
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, str(code), str(folder), "5"],
            env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SmokeTestFailed(f"{folder} did not load within {_TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SmokeTestFailed(lines[-1].removeprefix("PackageError: "))
    return SmokeTest.model_validate(json.loads(done.stdout.splitlines()[-1]))
