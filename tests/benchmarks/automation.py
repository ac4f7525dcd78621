"""What a tick costs: ``python -m tests.benchmarks.automation [--runs 1000]``.

Ticks of every sensor and of the schedule, through Dagster's own machinery, over an instance with so
many past runs, each with its materialisations. Printed: the median and the slowest of 20 ticks and the
median of their CPU time, which other programs change less; and the same over an instance with 10 runs,
side by side.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import dagster as dg

from roma_core.data.build import build_dataset
from roma_core.data.config import source_fingerprint
from roma_core.data.manifest import read_manifest
from roma_pipelines.automation.alerts import alert_on_failure
from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.components import RomaExperiment
from roma_pipelines.resources import JOB_CLIENTS
from roma_pipelines.storage import Storage, prepare_instance
from tests.pipelines.automation.played_month import write_series

_TICKS = 20
_NOUNS = ("dataset", "pretrained_encoder", "finetuned_classifier", "evaluation_report")


def experiment(folder: Path) -> tuple[dg.Definitions, str, str]:
    """With everything that ticks; version and source's fingerprint of its data set, which is built."""
    write_series(folder / "data" / "a.parquet", 20, 0, time.time() - 3600)
    write_series(folder / "inbox" / "a.parquet", 20, 0, time.time() - 3600)
    source = {
        "kind": "parquet",
        "files": [str(folder / "data" / "*.parquet")],
        "axes": [{"column": "time"}],
        "channels": [{"column": "value"}],
        "metadata": {"label": "kind"},
    }
    drift = {"files": [str(folder / "inbox" / "*.parquet")]}
    component = RomaExperiment(
        name="waves",
        dataset={"source": source},
        schedule="0 3 * * *",
        automation={"new_data": {}, "drift": drift, "budget_hours_per_week": 1000},
    )
    config = component.dataset
    root = Storage.open()
    built = build_dataset(config, root.datasets, root.cache, progress=False)
    looked_after = dg.Definitions(sensors=[alert_on_failure, reconcile_jobs], resources=JOB_CLIENTS)
    merged = dg.Definitions.merge(component.build_defs(None), looked_after)  # type: ignore[arg-type]
    return merged, read_manifest(built).digest, source_fingerprint(config).digest


def fill(instance: dg.DagsterInstance, n: int, version: str, fingerprint: str) -> None:
    """Past runs; every fifth failed, so that there is something to look through."""
    keys = [dg.AssetKey(["waves", noun]) for noun in _NOUNS]
    for k in range(n):
        run = dg.DagsterRun(
            job_name="__ASSET_JOB",
            run_id=f"{k:08d}-0000-4000-8000-000000000000",
            status=dg.DagsterRunStatus.FAILURE if k % 5 == 0 else dg.DagsterRunStatus.SUCCESS,
            tags={"roma/experiment": "waves", "dagster/run_key": str(k)},
            asset_selection=frozenset(keys),
        )
        instance.add_run(run)
        for key in keys:
            tags = {"dagster/data_version": version, "dagster/code_version": "c"}
            tags["dagster/input_data_version/waves/dataset"] = version
            metadata = {"source_fingerprint": fingerprint}
            instance.report_runless_asset_event(
                dg.AssetMaterialization(key, metadata=metadata, tags=tags)
            )


def measure(n_runs: int, folder: Path) -> dict[str, tuple[float, float, float]]:
    """Name -> median and slowest tick, and the median of their CPU time, ms."""
    os.environ["ROMA_STORAGE_ROOT"] = str(folder / "root")
    os.environ.pop("DAGSTER_HOME", None)
    prepare_instance(Storage.open())
    definitions, version, fingerprint = experiment(folder)
    repository = definitions.get_repository_def()
    found = {}
    with dg.DagsterInstance.get() as instance:
        fill(instance, n_runs, version, fingerprint)
        for sensor in repository.sensor_defs:
            cursor, times = None, []
            for _ in range(_TICKS + 1):
                context = dg.SensorEvaluationContext(  # as a code server makes it
                    instance_ref=instance.get_ref(), repository_def=repository, cursor=cursor
                )
                start = time.perf_counter(), time.process_time()
                cursor = sensor.evaluate_tick(context).cursor
                times.append(_since(start))
            found[sensor.name] = _ms(times)
        for schedule in repository.schedule_defs:
            times = []
            for _ in range(_TICKS + 1):
                at = dg.build_schedule_context(instance=instance, repository_def=repository)
                start = time.perf_counter(), time.process_time()
                schedule.evaluate_tick(at)
                times.append(_since(start))
            found[schedule.name] = _ms(times)
    return found


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _ms(times: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Median, slowest and median CPU; the first, which imports and opens, is left out."""
    wall, cpu = ([1000 * one[k] for one in times[1:]] for k in (0, 1))
    return statistics.median(wall), max(wall), statistics.median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        before, after = measure(10, Path(few)), measure(options.runs, Path(many))
    print(f"{'tick of, median (slowest), CPU':<32} {'10 runs':>26} {f'{options.runs} runs':>26}")
    for name, found in after.items():
        shown = ["{:.1f} ({:.1f}), {:.1f} ms".format(*one) for one in (before[name], found)]
        print(f"{name:<32} {shown[0]:>26} {shown[1]:>26}")


if __name__ == "__main__":
    main()
