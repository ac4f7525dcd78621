"""Materialises the tiny experiment; killed with -9 at one named point, or going on from a killed run.

python -m tests.pipelines.launching.chaos_materialise FOLDER [POINT]

A point is one of the supervisor's, or ``before NAME`` or ``after NAME`` of a function that changes
MLflow, at its first call in this process. The file FOLDER/hit holds the point once it was come to.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg

from roma_pipelines import resources
from roma_pipelines.assets import registered_model as registered_classifier
from roma_pipelines.registry import runs
from tests.pipelines import tiny

MLFLOW = {
    runs: ("find_or_create_run", "log_run", "ended"),
    registered_classifier: ("register", "promote"),
}


def main(folder: Path, point: str | None) -> int:
    def fault_point(name: str) -> None:
        if name == point:
            (folder / "hit").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    resources.run_job = functools.partial(resources.run_job, fault_point=fault_point)  # type: ignore[attr-defined]
    for module, names in MLFLOW.items():
        for name in names:
            setattr(module, name, _around(name, getattr(module, name), fault_point))
    job = tiny.definitions(tiny.attributes(folder)).resolve_implicit_global_asset_job_def()
    (folder / "dagster").mkdir(exist_ok=True)
    with dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance:
        killed = [run.run_id for run in instance.get_runs()]
        tags = {}
        if killed:  # as Dagster's daemon tags a retry
            marks = ("dagster/parent_run_id", "dagster/root_run_id")
            tags = {"dagster/is_resume_retry": "true", **dict.fromkeys(marks, killed[-1])}
        result = job.execute_in_process(instance=instance, tags=tags, raise_on_error=False)
    return 0 if result.success else 1


def _around(
    name: str, function: Callable[..., Any], fault_point: Callable[[str], None]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        fault_point(f"before {name}")
        value = function(*arguments, **options)
        fault_point(f"after {name}")
        return value

    return call


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
