"""What a tick costs: ``python -m tests.benchmarks.automation [--runs 1000] [--ticks 140]``.

Ticks of every sensor and of the schedule in turn, through Dagster's own machinery, over an instance with
so many past runs of half a year, each with its materialisations and the folders of three jobs. Printed:
the median and the slowest tick and the median of their CPU time, which other programs change less; how
far memory grew; and the same over an instance with 10 runs, side by side.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path

import dagster as dg
import psutil

from roma_core.data.build import build_dataset
from roma_core.data.config import source_fingerprint
from roma_core.data.manifest import read_manifest
from roma_core.files import digest_of, write_json
from roma_core.job import JobFolder
from roma_pipelines.automation.alerts import alert_on_failure
from roma_pipelines.automation.sensors import reconcile_jobs
from roma_pipelines.components import RomaExperiment
from roma_pipelines.launching.spec import AttemptRecord, End, JobSpec
from roma_pipelines.registry.runs import RunRecord
from roma_pipelines.resources import JOB_CLIENTS
from roma_pipelines.storage import Storage, prepare_instance
from tests.pipelines.automation.played_month import write_series

_NOUNS = ("dataset", "pretrained_encoder", "finetuned_classifier", "evaluation_report")
_HALF_A_YEAR_S = 182 * 86400.0


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
        predictions={"input": str(folder / "inbox")},
        automation={
            "new_data": {},
            "drift": drift,
            "budget_hours_per_week": 1000,
            "predict_on_promotion": True,
        },
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
        ended_at = time.time() - _HALF_A_YEAR_S * (1 - k / n)
        for noun in _NOUNS[1:]:
            add_job(run.run_id, noun, ended_at)
    sizes = {f"value.c{k} psi": 0.01 for k in range(20)}
    facts = {"inputs": "other", "series": 200, "drift_sizes": sizes, "features": "compared"}
    compared = dg.AssetMaterialization(dg.AssetKey(["waves", "recent_inputs"]), metadata=facts)
    instance.report_runless_asset_event(compared)


def add_job(run_id: str, noun: str, ended_at: float) -> None:
    """The folder of a job that completed, of which MLflow has the run."""
    key = digest_of([run_id, noun])[:20]
    folder = JobFolder(Storage.open().jobs / key)
    (folder.path / "attempts" / "1").mkdir(parents=True)
    spec = JobSpec(key=key, command=("x",), config_digest="")
    write_json(folder.spec, spec.model_dump(mode="json"))
    end = End(status="completed", reason="", checkpoint=None, ended_at=ended_at, ran_s=60.0)
    attempt = AttemptRecord(attempt=1, backend="local", intended_at=ended_at - 60, end=end)
    write_json(folder.attempt_record(1), attempt.model_dump(mode="json"))
    lease = {"schema_version": 1, "host": "x", "beat": ended_at, "asset_key": f"waves/{noun}"}
    write_json(folder.lease, {**lease, "dagster_run_id": run_id})
    record = RunRecord(experiment="roma/waves", name=noun, tags={}, params={}, status="FINISHED")
    write_json(folder.mlflow_record, record.model_dump(mode="json"))
    write_json(folder.mlflow_run, {"schema_version": 1, "run_id": "r", "sent": record.digest})
    for path in (folder.lease, folder.path / "attempts", folder.path):
        os.utime(path, (ended_at, ended_at))


def measure(
    n_runs: int, folder: Path, n_ticks: int
) -> tuple[dict[str, tuple[float, float, float]], float]:
    """Name -> median and slowest tick, and the median of their CPU time, ms; growth of memory, MB.

    The first tenth of the ticks, which import, open and read what later ones need not, is left out.
    """
    os.environ["ROMA_STORAGE_ROOT"] = str(folder / "root")
    os.environ.pop("DAGSTER_HOME", None)
    prepare_instance(Storage.open())
    definitions, version, fingerprint = experiment(folder)
    repository = definitions.get_repository_def()
    tickers = [*repository.sensor_defs, *repository.schedule_defs]
    cursors: dict[str, str | None] = {}
    times: dict[str, list[tuple[float, float]]] = {one.name: [] for one in tickers}
    process, first = psutil.Process(), 0.0
    with dg.DagsterInstance.get() as instance:
        fill(instance, n_runs, version, fingerprint)
        for tick in range(n_ticks):
            if tick == n_ticks // 10:
                times = {name: [] for name in times}
                gc.collect()
                first = process.memory_info().rss
            one = tickers[tick % len(tickers)]
            start = time.perf_counter(), time.process_time()
            if isinstance(one, dg.SensorDefinition):
                context = dg.SensorEvaluationContext(  # as a code server makes it
                    instance_ref=instance.get_ref(),
                    repository_def=repository,
                    cursor=cursors.get(one.name),
                )
                cursors[one.name] = one.evaluate_tick(context).cursor
            else:
                one.evaluate_tick(
                    dg.build_schedule_context(instance=instance, repository_def=repository)
                )
            times[one.name].append(_since(start))
        gc.collect()
        grown = (process.memory_info().rss - first) / 1e6
    return {name: _ms(found) for name, found in times.items()}, grown


def _since(start: tuple[float, float]) -> tuple[float, float]:
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _ms(times: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Median, slowest and median CPU."""
    wall, cpu = ([1000 * one[k] for one in times] for k in (0, 1))
    return statistics.median(wall), max(wall), statistics.median(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--ticks", type=int, default=140)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as few, tempfile.TemporaryDirectory() as many:
        before, _ = measure(10, Path(few), 140)
        after, grown = measure(options.runs, Path(many), options.ticks)
    print(f"{'tick of, median (slowest), CPU':<32} {'10 runs':>26} {f'{options.runs} runs':>26}")
    for name, found in after.items():
        shown = ["{:.1f} ({:.1f}), {:.1f} ms".format(*one) for one in (before[name], found)]
        print(f"{name:<32} {shown[0]:>26} {shown[1]:>26}")
    print(f"memory: {grown:+.1f} MB over the last nine tenths of {options.ticks} ticks")


if __name__ == "__main__":
    main()
