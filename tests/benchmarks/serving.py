"""What serving costs: load and verify, one series, a batch, and rollback.

    python -m tests.benchmarks.serving [--series 300] [--repeats 5] [--predict 200000]

The model has the shape of the PLAsTiCC experiment (width 64, 4 layers, 2 channels, 2 axes, 14
classes), its weights are random, its series 47…352 observations long. Packages are measured against
the bare model: `model.forward` on tensors that are made already, one series at a time, and packed
batches of the same series for throughput; what the package adds is validation, normalisation,
bucketing and padding, and attention over padding. CPU time of one thread, side by side in one
process. The registry is an embedded store with two champions. With --predict `roma predict` reads so
many series of 5 to 30 observations, by one process and by two, each with one thread.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.timing import Clock

CHANNELS, AXES, CLASSES = ("flux", "flux_err"), ("time", "band"), tuple(f"c{k}" for k in range(14))


def packaged(folder: Path) -> Any:
    """A bare model, whose package then is in ``folder``."""
    from roma_core.model import EncoderConfig, RoMAForClassification, RoMAForClassificationConfig
    from roma_core.schema import Channel, ChannelNormalisation, DataSchema, PositionAxis
    from roma_core.serving.client import Series
    from roma_core.serving.package import build_package

    torch.manual_seed(0)
    config = RoMAForClassificationConfig(
        encoder_config=EncoderConfig(d_model=64, nhead=4, depth=4),
        tubelet_size=(1, 1, 1),
        n_channels=len(CHANNELS),
        n_pos_dims=len(AXES),
        dim_output=len(CLASSES),
    )
    model = RoMAForClassification(config).eval()
    model.save_pretrained(folder / "weights")
    schema = DataSchema(
        channels=tuple(Channel(name=name, unit="1") for name in CHANNELS),
        axes=tuple(PositionAxis(name=name, unit="1") for name in AXES),
        classes=CLASSES,
        normalisation=tuple(ChannelNormalisation(mean=0.0, std=1.0) for _ in CHANNELS),
    )
    rng = np.random.default_rng(0)
    rows = [light_curve(rng) for _ in range(10)]
    build_package(
        folder / "package",
        model.export(),
        folder / "weights" / "model.safetensors",
        {},
        schema,
        [Series(**row) for row in rows],
        {},
        name="curves",
        card="# curves",
    )
    return model


def light_curve(rng: np.random.Generator) -> dict[str, Any]:
    n = int(rng.integers(47, 353))
    positions = {"time": np.sort(rng.uniform(0, 10, n)), "band": rng.integers(0, 6, n)}
    values = {name: rng.normal(size=n) for name in CHANNELS}
    return {
        "positions": {name: x.astype(float).tolist() for name, x in positions.items()},
        "values": {name: x.tolist() for name, x in values.items()},
    }


def tensors(row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """``(1, N, C, 1, 1)`` values and ``(1, D, N)`` positions."""
    values = torch.tensor([row["values"][name] for name in CHANNELS], dtype=torch.float32)
    positions = torch.tensor([row["positions"][name] for name in AXES], dtype=torch.float32)
    return values.T[None, :, :, None, None], positions[None]


def load(folder: Path) -> None:
    from roma_core.serving.package import smoke_test_package

    trials = [smoke_test_package(folder / "package") for _ in range(3)]
    seconds = [trial.load_s for trial in trials]
    print(
        f"verify, load and 10 golden rows, imports done: {statistics.median(seconds):.2f} s wall "
        f"({min(seconds):.2f}–{max(seconds):.2f}, a fresh process each)"
    )


def _packed(model: Any, given: list[tuple[torch.Tensor, torch.Tensor]], at_once: int) -> list[Any]:
    """Series as packed batches, ready for the model."""
    batches = []
    for start in range(0, len(given), at_once):
        part = given[start : start + at_once]
        longest = max(v.shape[1] for v, _ in part)
        values = torch.zeros(len(part), longest, len(CHANNELS), 1, 1)
        positions = torch.zeros(len(part), len(AXES), longest)
        padding = torch.ones(len(part), longest, dtype=torch.bool)
        for row, (v, p) in enumerate(part):
            values[row, : v.shape[1]], positions[row, :, : v.shape[1]] = v[0], p[0]
            padding[row, : v.shape[1]] = False
        batches.append(model.pack(values, positions, padding)[0])
    return batches


def measure_speed(folder: Path, model: Any, n: int, repeats: int) -> None:
    from roma_core.serving.pyfunc_model import Series, open_package

    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    rows = [light_curve(rng) for _ in range(n)]
    given = [tensors(row) for row in rows]
    batches = _packed(model, given, at_once=64)
    classifier = open_package(folder / "package")
    series = [Series(**row) for row in rows]
    clock = Clock("cpu", 1)
    few = range(20)

    @torch.inference_mode()
    def bare() -> None:
        for k in few:
            model(*given[k])

    @torch.inference_mode()
    def bare_batches() -> None:
        for batch in batches:
            model(batch)

    single = clock.interleaved(
        {"bare": bare, "package": lambda: [classifier.predict([series[k]]) for k in few]}, repeats
    )
    many = clock.interleaved(
        {"bare": bare_batches, "package": lambda: classifier.predict(series)}, repeats
    )
    times = {name: timing.median / len(few) * 1e3 for name, timing in single.items()}
    rates = {name: n / timing.median for name, timing in many.items()}
    opening = clock.interleaved({"open": lambda: open_package(folder / "package")}, 3)["open"]
    print(f"verify, load and 10 golden rows ({clock}): {opening.median:.2f} s")
    print(
        f"one series ({clock}): package {times['package']:.2f} ms, bare model.forward "
        f"{times['bare']:.2f} ms; {times['package'] / times['bare']:.2f} ×"
    )
    print(
        f"{n} series at once ({clock}): package {rates['package']:.0f} series/s, bare packed batches "
        f"of 64 {rates['bare']:.0f} series/s; {rates['bare'] / rates['package']:.2f} × the time"
    )


def predict_speed(folder: Path, n: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(2)
    ends = np.append(0, rng.integers(5, 31, n).cumsum()).astype(np.int32)
    numbers = {"time": rng.uniform(0, 10, ends[-1]), "band": rng.integers(0, 6, ends[-1])}
    numbers |= {name: rng.normal(size=ends[-1]) for name in CHANNELS}
    lists = {k: pa.ListArray.from_arrays(pa.array(ends), pa.array(x)) for k, x in numbers.items()}
    pq.write_table(pa.table({"id": np.arange(n), **lists}), folder / "in.parquet")
    walls = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "roma_core.cli", "predict", "--model", folder / "package"]
        command += ["--processes", str(processes), folder / "in.parquet", folder / "out.parquet"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - start)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert pq.read_table(folder / "out.parquet", columns=["id"])["id"].to_pylist() == [
            str(k) for k in range(n)
        ]
        print(f"roma predict, {processes} processes: {walls[-1]:.1f} s wall, {cpu:.1f} s CPU")
    print(f"{n} series of {ends[-1] / n:.0f} observations: 2 processes {walls[0] / walls[1]:.2f} ×")


def rollback_time(folder: Path) -> None:
    from roma_pipelines.registry.gate import GATE_TAG
    from roma_pipelines.registry.promotion import promote, rollback
    from roma_pipelines.registry.store import MlflowSettings, connect
    from roma_pipelines.registry.versions import COMPARED_TAG

    client = connect(MlflowSettings.from_values({}), folder / "store")
    client.create_registered_model("curves")
    for before in ("none", "1"):
        tags = {GATE_TAG: "passed", COMPARED_TAG: before}
        created = client.create_model_version("curves", "s3://nowhere", None, tags)
        promote(client, "curves", str(created.version), "measured", "benchmark", {})
    start = time.perf_counter()
    rollback(client, "curves", reason="measured", actor="benchmark")
    print(f"rollback: {time.perf_counter() - start:.2f} s wall")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--series", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--predict", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        bare_model = packaged(place)
        load(place)
        measure_speed(place, bare_model, options.series, options.repeats)
        rollback_time(place)
        if options.predict:
            predict_speed(place, options.predict)
