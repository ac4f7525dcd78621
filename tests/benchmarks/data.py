"""Data: reading at random, building, and memory, beside NumPy, Parquet and Hugging Face datasets.

    python -m tests.benchmarks.data            # about two minutes
    python -m tests.benchmarks.data --large 20 # instead, a set 20 times as large, 4 gigabytes on disk

Made-up light curves: 40,000 series of log-normal lengths (mean 177), time and band, flux and its
error. Every figure is measured in this run; reading is timed in turns on a warm page cache, and each
build runs in a process of its own, whose peak memory is counted from before the build.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from roma_core.data.build import build_dataset
from roma_core.data.config import DatasetConfig
from roma_core.data.store import StoredDataset
from roma_core.schema import Channel, PositionAxis
from roma_core.sources.base import RawSeries, SourceConfig

_ROUNDS = 5
_BATCH = 40  # series, about the 8,192 tokens of the PLAsTiCC experiment
_TOGETHER = f"this store, normalised, {_BATCH} at once"  # what training does
_AT_ONCE = 2_000  # series made at a time
COLUMNS = {
    "object": "object",
    "axes": [{"column": "time", "unit": "d"}, {"column": "band"}],
    "channels": [{"column": "flux"}, {"column": "flux_err"}],
}


class MadeUp(SourceConfig):
    """Light curves drawn while they are read, so that a set of any size needs no input file."""

    kind: str = "made_up"
    n_series: int
    axes: tuple[PositionAxis, ...] = (
        PositionAxis(name="time", unit="d"),
        PositionAxis(name="band", unit="1"),
    )
    channels: tuple[Channel, ...] = (
        Channel(name="flux", unit="1"),
        Channel(name="flux_err", unit="1"),
    )
    classes: tuple[str, ...] = ()
    files: dict[str, str] = Field({})

    def open(self, cache: Path) -> Any:
        return self

    def tables(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Lengths of some series, and the rows of all of them."""
        for start in range(0, self.n_series, _AT_ONCE):
            g = np.random.default_rng([7, start])
            n = min(_AT_ONCE, self.n_series - start)
            lengths = np.clip(g.lognormal(4.93, 0.7, n), 5, 2000).astype(np.int64)
            objects = np.repeat(np.arange(start, start + n), lengths)
            times = g.uniform(0, 1000, len(objects))
            yield (
                lengths,
                {
                    "object": objects,
                    "time": times[np.lexsort((times, objects))],
                    "band": g.integers(0, 6, len(objects)).astype(np.int8),
                    "flux": g.normal(size=len(objects)).astype(np.float32),
                    "flux_err": g.random(len(objects), dtype=np.float32),
                },
            )

    def read(self) -> Iterator[RawSeries]:
        for lengths, rows in self.tables():
            positions = np.stack([rows["time"], rows["band"]], axis=1)
            values = np.stack([rows["flux"], rows["flux_err"]], axis=1)
            for a, b in zip(np.cumsum(lengths) - lengths, np.cumsum(lengths), strict=True):
                yield RawSeries(str(rows["object"][a]), positions[a:b], values[a:b])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--series", type=int, default=40_000)
    parser.add_argument("--large", type=int, default=0, help="Only this: so many times as large.")
    parser.add_argument("--build", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.build:
        _build_here(json.loads(arguments.build))
        return
    with tempfile.TemporaryDirectory(prefix="roma-bench-") as name:
        folder = Path(name)
        print(f"{arguments.series:,} series", flush=True)
        if arguments.large:
            _large(folder, arguments.series, arguments.large)
            return
        _write_tables(folder, arguments.series)
        path = _builds(folder)
        _random_access(StoredDataset(path, verify=False), folder)


def _write_tables(folder: Path, n_series: int) -> None:
    """``sorted.parquet``, and ``shuffled.parquet`` with the same rows in any order."""
    tables = [pa.table(rows) for _, rows in MadeUp(n_series=n_series).tables()]
    with pq.ParquetWriter(folder / "sorted.parquet", tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    whole = pa.concat_tables(tables)
    order = np.random.default_rng(0).permutation(len(whole))
    pq.write_table(whole.take(pa.array(order)), folder / "shuffled.parquet")


def _builds(folder: Path) -> Path:
    print("\nbuilding")
    path = Path()
    for name in ("sorted", "shuffled"):
        source = {
            "kind": "table",
            "files": [str(folder / f"{name}.parquet")],
            "columns": COLUMNS,
        }
        found = _build_apart(folder / "sets", name, source)
        path = Path(found["path"]) if name == "sorted" else path
        print(
            f"  long Parquet table, {name:9} {found['rate'] / 1e6:5.2f} M observations/s   peak "
            f"{found['peak'] / 2**20:4.0f} MiB",
            flush=True,
        )
    return path


def _build_apart(root: Path, name: str, source: dict[str, Any]) -> dict[str, Any]:
    task = {"root": str(root), "name": name, "source": source}
    command = [sys.executable, "-m", "tests.benchmarks.data", "--build", json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _build_here(task: dict[str, Any]) -> None:
    """Warm up on a small set, then build; prints path, rate and peak memory above the start."""
    root, source = Path(task["root"]), task["source"]

    def config(values: dict[str, Any], name: str) -> DatasetConfig:
        made_up = values.pop("kind") == "made_up" if values["kind"] == "made_up" else False
        return DatasetConfig(name=name, source=MadeUp(**values) if made_up else values)  # type: ignore[arg-type]

    if source["kind"] == "table":  # everything imported, and the allocator's first pages taken
        small = root.parent / "small.parquet"
        pq.write_table(pa.table(next(MadeUp(n_series=500).tables())[1]), small)
        warm = {**source, "files": [str(small)]}
    else:
        warm = {"kind": "made_up", "n_series": 500}
    build_dataset(config(dict(warm), "warm"), root, root, progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmHWM")
    started = time.perf_counter()
    path = build_dataset(config(dict(source), task["name"]), root, root, progress=False)
    seconds = time.perf_counter() - started
    peak = _memory("VmHWM") - before
    n = int(np.load(path / "offsets.npy", mmap_mode="r")[-1])
    found = {"path": str(path), "rate": n / seconds, "peak": peak, "n": n, "seconds": seconds}
    if source["kind"] == "made_up":
        found |= _iterated(path)
    print(json.dumps(found))


def _iterated(path: Path) -> dict[str, float]:
    """Every sample once, in random order: rate, and the most memory that is not page cache."""
    dataset = StoredDataset(path, verify=False)
    order = np.random.default_rng(0).permutation(len(dataset))
    before = most = _memory("RssAnon")
    started = time.perf_counter()
    for k, i in enumerate(order):
        dataset.sample(int(i))
        if k % 5_000 == 0:
            most = max(most, _memory("RssAnon"))
    seconds = time.perf_counter() - started
    return {"samples_per_s": len(order) / seconds, "iterating": most - before}


def _memory(what: str) -> int:
    """Bytes of this process, from the kernel's account."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(what)))


def _random_access(dataset: StoredDataset, folder: Path) -> None:
    """One series at a time, at random; every reader copies the numbers out."""
    offsets = dataset.offsets
    part = next(dataset.parts())  # one file holds it all
    positions, values = part.positions, part.values

    def slice_of(i: int) -> None:
        a, b = offsets[i], offsets[i + 1]
        positions[a:b].copy()
        values[a:b].copy()

    def raw(i: int) -> None:
        for part in dataset.raw(i):
            part.copy()

    dataset.to_parquet(folder / "rows.parquet")
    pq.write_table(
        pq.read_table(folder / "rows.parquet"), folder / "hundreds.parquet", row_group_size=100
    )
    readers: dict[str, tuple[Callable[[int], Any], int]] = {
        "bare NumPy slice": (slice_of, 4_000),
        "this store, as delivered": (raw, 4_000),
        "this store, normalised sample": (dataset.sample, 4_000),
        _TOGETHER: (lambda rows: dataset.gather(np.array(rows)), 4_000),
        "Parquet as exported": (_parquet_reader(folder / "rows.parquet"), 10),
        "Parquet, 100 series a row group": (_parquet_reader(folder / "hundreds.parquet"), 100),
    }
    if importlib.util.find_spec("datasets"):
        readers["Hugging Face datasets, NumPy format"] = (_hub_reader(folder), 400)
    times: dict[str, list[float]] = {name: [] for name in readers}
    g = np.random.default_rng(1)
    for k in range(_ROUNDS + 1):
        for name, (read, n) in readers.items():
            rows: list[Any] = g.integers(0, len(dataset), n).tolist()
            if name == _TOGETHER:
                rows = [rows[a : a + _BATCH] for a in range(0, n, _BATCH)]
            started = time.perf_counter()
            for i in rows:
                read(i)
            if k:  # the first round warms the cache
                times[name].append((time.perf_counter() - started) / n * 1e6)
    bare = statistics.median(times["bare NumPy slice"])
    print(f"\none series at random out of {len(dataset):,}; {len(values):,} observations, warm")
    for name, each in times.items():
        middle = statistics.median(each)
        spread = f"{min(each):,.1f}–{max(each):,.1f}"
        print(f"  {name:38} {middle:10,.1f} µs ({spread:>17}) {middle / bare:10,.1f} ×")
    parquet = statistics.median(times["Parquet, 100 series a row group"])
    print(
        f"  against the faster Parquet: {parquet / statistics.median(times['this store, as delivered']):,.0f} × faster as delivered, {parquet / statistics.median(times[_TOGETHER]):,.0f} × normalised, {_BATCH} at once"
    )
    if len(readers) == 6:
        print("  Hugging Face datasets is not installed; pip install datasets puts it beside")


def _parquet_reader(path: Path) -> Callable[[int], Any]:
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
    starts = np.concatenate([[0], np.cumsum(sizes)])

    def read(i: int) -> Any:
        group = int(np.searchsorted(starts, i, side="right")) - 1
        row = file.read_row_group(group, ["time", "band", "flux", "flux_err"]).slice(
            i - int(starts[group]), 1
        )
        return [column.chunk(0).values.to_numpy() for column in row.columns]

    return read


def _hub_reader(folder: Path) -> Callable[[int], Any]:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    columns = ["time", "band", "flux", "flux_err"]
    hub = Dataset.from_parquet(
        str(folder / "rows.parquet"), columns=columns, cache_dir=str(folder / "hub")
    ).with_format("numpy")
    return lambda i: hub[i]


def _large(folder: Path, n_series: int, times: int) -> None:
    print("\nmade-up series, drawn while they are read")
    found = {}
    for k in (1, times):
        source = {"kind": "made_up", "n_series": k * n_series}
        found[k] = f = _build_apart(folder / "sets", f"x{k}", source)
        print(
            f"  {k:3} ×: {f['n']:12,} observations, built at {f['rate'] / 1e6:.2f} M/s with a peak of "
            f"{f['peak'] / 2**20:.0f} MiB; {f['samples_per_s']:,.0f} samples/s at random with "
            f"{f['iterating'] / 2**20:.0f} MiB",
            flush=True,
        )
    more = (found[times]["peak"] - found[1]["peak"]) / (n_series * (times - 1))
    print(f"  memory grows by {more:.0f} bytes a series while building")


if __name__ == "__main__":
    main()
