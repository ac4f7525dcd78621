"""Materialises an asset on SLURM until its job is accepted, in a process of its own, as a worker does.

    python -m tests.benchmarks.launching_asset FOLDER ASSET

prints the seconds from the asset's start, as Dagster's event log has it, to the job's id on record. The
job is cancelled then. ASSET is ``dataset``, which has no job and prints nothing, or
``pretrained_encoder``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import dagster as dg

from roma_core.job import JobFolder
from roma_pipelines import resources
from roma_pipelines.launching.outcome import read_records
from roma_pipelines.storage import Storage
from tests.pipelines import tiny

SIZE = {"nodes": 2, "processes_per_node": 2, "gpus_per_node": 1, "memory_gb": 4}


def main(folder: Path, noun: str) -> None:
    def fault_point(name: str) -> None:
        if name == "after record":
            raise dg.Failure("seen enough")

    resources.run_job = functools.partial(resources.run_job, fault_point=fault_point)  # type: ignore[attr-defined]
    sections = tiny.attributes(folder, resources={"target": "slurm", **SIZE})
    job = tiny.definitions(sections).resolve_implicit_global_asset_job_def()
    (folder / "dagster").mkdir(exist_ok=True)
    with dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance:
        selection = [dg.AssetKey(["waves", noun])]
        result = job.execute_in_process(
            instance=instance, asset_selection=selection, raise_on_error=False
        )
        starts = [
            entry.timestamp
            for entry in instance.all_logs(result.run_id)
            if entry.is_dagster_event and entry.dagster_event_type is dg.DagsterEventType.STEP_START
        ]
    if noun == "dataset":
        return
    newest = max(Storage.open().jobs.iterdir(), key=lambda path: path.stat().st_mtime)
    (record,) = read_records(JobFolder(newest))
    assert record.submitted_at is not None, f"{newest} was not accepted"
    print(record.submitted_at - starts[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
