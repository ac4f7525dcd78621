"""A package, tried as its consumers will: in a process of its own, without this project.

The process loads a copy of ``logged_model.py`` by its path, refuses every import of this project,
verifies the folder, computes the golden rows, and times single series.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

_TIMEOUT_S = 300
_REPEATS = 5
_PROGRAM = """
import importlib.util, json, pathlib, statistics, sys, time
code, folder, repeats = sys.argv[1:]
for ours in ("roma_core", "roma_pipelines"):
    sys.modules[ours] = None  # an import of it fails
spec = importlib.util.spec_from_file_location("logged_model", code)
logged = importlib.util.module_from_spec(spec)
spec.loader.exec_module(logged)
logged.torch.set_num_threads(1)
folder = pathlib.Path(folder)
try:
    logged.open_package(folder)  # torch imports a thousand modules of its own when it first loads
    start = time.perf_counter()
    package = logged.open_package(folder)
    load_s = time.perf_counter() - start
    golden = folder / "golden.jsonl"
    difference = package.check_golden(golden)
except logged.PackageError as error:
    sys.exit(f"REFUSED {error}")
rows = [logged.Series(**json.loads(line)["series"]) for line in golden.read_text().splitlines()]
times = []
for _ in range(int(repeats)):
    for row in rows:
        start = time.perf_counter()
        package.predict([row])
        times.append(time.perf_counter() - start)
latency = statistics.median(times) * 1e3
print(json.dumps({"load_s": load_s, "latency_ms": latency, "golden_difference": difference}))
"""


class SmokeTest(BaseModel):
    """A package, loaded by its own file alone in a process of its own, and asked its golden rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    load_s: float = Field(
        description="Verify, load and compute the golden rows; imports not in it."
    )
    latency_ms: float = Field(description="Median time of one series among the golden rows.")
    golden_difference: float = Field(description="Largest difference of an output; at most 1e-4.")


class SmokeTestFailed(RuntimeError):
    """The package cannot be used by a consumer; the text says why."""


def smoke_test_package(folder: Path, code: Path | None = None) -> SmokeTest:
    """Load a package in a fresh process, check its golden rows and time it.

    Args:
        code: the model's own file; None takes this project's.

    Raises:
        TrialFailed: it was refused, or the process failed.
    """
    code = code or Path(__file__).with_name("pyfunc_model.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM, str(code), str(folder), str(_REPEATS)],
            env=environment | {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise SmokeTestFailed(f"{folder} did not answer within {_TIMEOUT_S} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SmokeTestFailed(lines[-1].removeprefix("REFUSED "))
    return SmokeTest.model_validate(json.loads(done.stdout.splitlines()[-1]))
