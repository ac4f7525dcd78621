"""A file of series, scored in parts by a package in a folder."""

import json
import os
import random
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roma_core.serving import batch as scoring
from roma_core.serving import pyfunc_model
from roma_core.serving.batch import assumed_units, read_series
from roma_core.serving.job import Predictions
from tests.core.serving import toy

LINEAGE = {"model": "toy", "model_version": "3", "model_sha256": "abc"}
LENGTHS = [3, 40, 1, 7, 20, 2, 9, 11, 5, 30]


def score_file(package, lineage, source, split, output, **options):
    predictions = Predictions(source, split, lineage, output)
    assert predictions.run(package, **options)
    return sum(predictions.counts.values())


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages") / "toy"
    toy.build_toy(folder)
    package = pyfunc_model.open_package(folder)
    package.module = pyfunc_model
    return package


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    rows = [toy.series(n, seed=n).model_dump_json() for n in LENGTHS]
    path.write_text("\n".join(rows) + "\n")
    return path


def test_rows_come_out_in_order_with_their_lineage(package, source, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SERIES_PER_PART", 4)
    seen = []
    assert (
        score_file(package, LINEAGE, source, "test", tmp_path / "out", progress=seen.append) == 10
    )
    rows = pq.read_table(tmp_path / "out").to_pylist()
    expected = package.predict(
        [pyfunc_model.Series(**toy.series(n, seed=n).model_dump()) for n in LENGTHS]
    )
    assert [row["id"] for row in rows] == [one.id for one in expected]
    assert [row["label"] for row in rows] == [one.label for one in expected]
    for row, one in zip(rows, expected, strict=True):
        assert dict(row["probabilities"]) == pytest.approx(one.probabilities, abs=1e-6)
        assert row.items() >= LINEAGE.items()
    assert seen == [0, 4, 8, 10]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_an_interrupted_call_is_continued_unless_model_or_input_changed(
    package, source, tmp_path, monkeypatch
):
    monkeypatch.setattr(scoring, "SERIES_PER_PART", 4)
    scored = []
    real = scoring.score

    def dies_in_the_third(package, rows, lineage):
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(rows))
        return real(package, rows, lineage)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score", dies_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            score_file(package, LINEAGE, source, "test", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    seen = []
    score_file(package, LINEAGE, source, "test", tmp_path / "out", progress=seen.append)
    assert seen == [8, 10]
    assert [r["id"] for r in pq.read_table(tmp_path / "out").to_pylist()] == [
        f"s{n}" for n in LENGTHS
    ]

    with monkeypatch.context() as patch:
        scored.clear()
        patch.setattr(scoring, "score", dies_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            score_file(package, LINEAGE, source, "test", tmp_path / "out")
    seen = []
    other = LINEAGE | {"model_version": "4"}
    score_file(package, other, source, "test", tmp_path / "out", progress=seen.append)
    assert seen == [0, 4, 8, 10]


def test_parts_of_an_earlier_version_or_another_model_are_not_resumed(package, source, tmp_path):
    score_file(package, LINEAGE, source, "test", tmp_path / "before")
    (tmp_path / "out.parts").mkdir()
    (tmp_path / "before").rename(tmp_path / "out.parts" / "00000.parquet")
    (tmp_path / "out.parts" / "state.json").write_text("{}")
    other = Predictions(source, "test", LINEAGE, tmp_path / "out")
    other.write(package, other.missing())
    (tmp_path / "out.parts" / f".{other.path(0).name}.x1").write_text("killed while writing")
    (tmp_path / "out.parts" / "notes.txt").write_text("not ours")
    score_file(package, LINEAGE | {"model_version": "4"}, source, "test", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.parts").iterdir()] == ["notes.txt"]
    assert pq.read_table(tmp_path / "out")["model_version"].to_pylist() == ["4"] * len(LENGTHS)


WRITER = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from roma_core.serving import batch, pyfunc_model
from roma_core.serving.job import RANK, Predictions

def outputs(series):
    time.sleep(0.02)
    return np.tile([0.25, 0.75], (len(series), 1))

batch.SERIES_PER_PART = 5
package = SimpleNamespace(
    axes=[{"name": "time"}], channels=[{"name": "flux"}], units={}, classes=["a", "b"],
    golden_field="probabilities", outputs=outputs, module=pyfunc_model,
)
source, output = sys.argv[1:]
predictions = Predictions(source, "test", {}, Path(output), one_file=False)
numbers = [k for k in predictions.missing() if k % 2 == RANK]
print("begins", flush=True)
predictions.run(package, numbers=numbers)
"""


def test_after_kills_of_two_processes_every_series_is_there_once(tmp_path):
    lists = {name: [[1.0, 2.0]] * 200 for name in ("time", "flux")}
    source, output = tmp_path / "in.parquet", tmp_path / "out"
    pq.write_table(pa.table({"id": np.arange(200), **lists}), source)

    def start(rank):
        command = [sys.executable, "-c", WRITER, str(source), str(output)]
        environment, pipe = os.environ | {"RANK": str(rank)}, subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment)
        assert process.stdout.readline() == b"begins\n", process.stderr.read()
        return process

    written = {}
    for _ in range(3):
        processes = [start(rank) for rank in range(2)]
        time.sleep(random.uniform(0.05, 0.15))
        for process in processes:
            process.kill()
            process.communicate()
        parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.parts").glob("[!.]*")}
        assert parts.items() >= written.items() and 0 < len(parts) < 40
        written = parts
    for process in [start(1), start(0)]:
        assert process.communicate() == (b"", b"") and process.returncode == 0

    found = sorted(output.iterdir())
    assert len(found) == 40 and not (tmp_path / "out.parts").exists()
    assert {output / path.name: stamp for path, stamp in written.items()}.items() <= {
        path: path.stat().st_mtime_ns for path in found
    }.items()
    assert pq.read_table(output)["id"].to_pylist() == [str(k) for k in range(200)]


def test_two_processes_write_what_one_does_and_nothing_before_the_model_is_accepted(
    package, tmp_path, monkeypatch
):
    toy.build_toy(tmp_path / "toy")
    one, n = toy.series(3, seed=0), 2 * scoring.SERIES_PER_PART + 1
    columns = {name: [numbers] * n for name, numbers in (one.positions | one.values).items()}
    pq.write_table(pa.table({"id": np.arange(n), **columns}), tmp_path / "in.parquet")
    predictions = Predictions(tmp_path / "in.parquet", "test", LINEAGE, tmp_path / "out")
    with pytest.raises(ValueError, match="refused"), predictions.others(tmp_path / "toy", 2):
        raise ValueError("refused")
    assert not predictions.folder.exists()

    def fails(process):
        raise OSError("no memory for a process")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no memory"):
        patch.setattr(SpawnProcess, "start", fails)
        with predictions.others(tmp_path / "toy", 3):
            pass
    seen = []

    with predictions.others(tmp_path / "toy", 2) as run:
        run(package, seen.append)

    assert pq.read_table(tmp_path / "out")["id"].to_pylist() == [str(k) for k in range(n)]
    assert seen[0] == 0 and seen[-1] == n
    assert not predictions.folder.exists()


@pytest.mark.parametrize("place", ["folder", "memory://predictions/in"])
def test_all_parquet_files_of_a_folder_or_a_bucket_are_read_in_order(
    package, tmp_path, monkeypatch, place
):
    monkeypatch.setattr(scoring, "SERIES_PER_PART", 2)
    rows = [toy.series(n, seed=n) for n in LENGTHS]
    place = str(tmp_path / place) if place == "folder" else place
    fs, root = fsspec.core.url_to_fs(place)
    for name, part in (("a/2.parquet", rows[:3]), ("b.parquet", rows[3:])):
        fs.makedirs(f"{root}/a", exist_ok=True)
        columns = [{"id": one.id, **one.positions, **one.values} for one in part]
        with fs.open(f"{root}/{name}", "wb") as file:
            pq.write_table(pa.Table.from_pylist(columns), file, row_group_size=3)
    with fs.open(f"{root}/readme.txt", "wb") as file:
        file.write(b"not ours")
    predictions = Predictions(place, "test", LINEAGE, tmp_path / "out", one_file=False)
    asked = []
    monkeypatch.setattr(package, "outputs", asked.append, raising=False)  # rows are not needed

    assert predictions.run(package) and predictions.run(package) and not asked

    monkeypatch.undo()
    table = pq.read_table(tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 6
    assert table["id"].to_pylist() == [one.id for one in rows]
    expected = [one.probabilities for one in package.predict(rows)]
    for found, one in zip(table["probabilities"].to_pylist(), expected, strict=True):
        assert dict(found) == pytest.approx(one, abs=1e-6)
    (tmp_path / "out" / "other.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and holds something else"):
        predictions.run(package)
    with pytest.raises(ValueError, match="holds no Parquet files"):
        Predictions(str(tmp_path / "empty"), "test", LINEAGE, tmp_path / "o").run(package)


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
def test_only_the_row_groups_from_the_first_wanted_part_on_are_read(
    package, tmp_path, monkeypatch, rows
):
    monkeypatch.setattr(scoring, "SERIES_PER_PART", 3)
    series, path = [toy.series(n, seed=n) for n in LENGTHS], tmp_path / "in.parquet"
    columns = [{"id": one.id, **one.positions, **one.values} for one in series]
    pq.write_table(pa.Table.from_pylist(columns), path, row_group_size=rows)
    metadata = pq.read_metadata(path)
    for wanted in ([0, 1, 2, 3], [1, 3], [2], [3]):
        if wanted[0] * 3 >= rows:  # the first group is not touched
            ends = [metadata.row_group(k).column(0) for k in range(2)]
            start, end = (one.dictionary_page_offset or one.data_page_offset for one in ends)
            content = path.read_bytes()
            path.write_bytes(content[:start] + bytes(end - start) + content[end:])
        found = scoring.read_chunks(str(path), "test", package, wanted)
        assert {k: chunk["id"].to_pylist() for k, chunk in found} == {
            k: [one.id for one in series[k * 3 :][:3]] for k in wanted
        }


def test_a_bad_row_is_named_by_its_place(package, source, tmp_path):
    row = toy.series(3, seed=0).model_dump()
    row["values"]["flux"][1] = None
    with source.open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows 0 to 10 of .*: series 10.*'flux' has no number"):
        score_file(package, LINEAGE, source, "test", tmp_path / "out")
    source.write_text(toy.series(51, seed=0).model_dump_json() + "\n")
    with pytest.raises(ValueError, match=r"rows 0 to 0 of .*1 to 50 observations, got 51"):
        score_file(package, LINEAGE, source, "test", tmp_path / "out")
    source.write_text("")
    with pytest.raises(ValueError, match="holds no series"):
        score_file(package, LINEAGE, source, "test", tmp_path / "out")
    source.write_text('{"positions": {"time": [0.0]}, "values": {"flux": ["x"]}}')
    expected = r"line 1: values: 'flux' must hold finite numbers, got 'x' at index 0; null [^\n]*$"
    with pytest.raises(ValueError, match=expected):
        score_file(package, LINEAGE, source, "test", tmp_path / "out")
    source.write_text('{"positions": {"time": [0.0]}, "values": {}, "unit": {}}')
    with pytest.raises(ValueError, match="line 1: unit: no field of a series; it has id, pos"):
        score_file(package, LINEAGE, source, "test", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_table_with_a_row_per_observation_is_refused(package, tmp_path):
    numbers = {"object_id": [7, 7], "time": [1.0, 2.0], "band": [0.0, 1.0], "flux": [2.0, 3.0]}
    path = tmp_path / "long.parquet"
    pq.write_table(pa.table(numbers), path)
    with pytest.raises(ValueError, match=r"long\.parquet: expected one row .* time, band, flux"):
        score_file(package, LINEAGE, path, "test", tmp_path / "out")
    lists = {name: [[1.0, 2.0]] for name in ("time", "band", "flux", "ratio")}
    pq.write_table(pa.table({**lists, "star_id": [7]}), path)
    with pytest.raises(ValueError, match="neither an axis nor a channel of the model: star_id"):
        score_file(package, LINEAGE, path, "test", tmp_path / "out")
    pq.write_table(pa.table({**lists, "ratio": [["a", "b"]]}), path)
    with pytest.raises(ValueError, match=r"rows 0 to 0 .*values: 'ratio' must hold .* got 'a' at"):
        score_file(package, LINEAGE, path, "test", tmp_path / "out")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"long\.parquet cannot be read as Parquet"):
        score_file(package, LINEAGE, path, "test", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["long.parquet"]


@pytest.mark.parametrize(
    ("unit", "error"), [("mJy", None), ("Jy", "'flux' must be in 'mJy'"), (None, None)]
)
def test_units_of_parquet_columns_are_checked_or_assumed_aloud(package, tmp_path, unit, error):
    one = toy.series(3, seed=0)
    columns = {**one.positions, **one.values}
    fields = [
        pa.field(
            name,
            pa.list_(pa.float64()),
            metadata={"unit": unit} if unit and name == "flux" else None,
        )
        for name in columns
    ]
    path = tmp_path / "in.parquet"
    table = pa.table(
        [pa.array([numbers]) for numbers in columns.values()], schema=pa.schema(fields)
    )
    pq.write_table(table, path)
    assert assumed_units(path, package) == ({"time": "d"} if unit else {"time": "d", "flux": "mJy"})
    if error is None:
        assert score_file(package, LINEAGE, path, "test", tmp_path / "out") == 1
    else:
        with pytest.raises(ValueError, match=error):
            score_file(package, LINEAGE, path, "test", tmp_path / "out")


@pytest.mark.parametrize("role", ["target", None])
def test_targets_of_an_exported_data_set_are_no_input(package, tmp_path, role):
    numbers = {name: [[1.0, 2.0]] for name in ("time", "band", "flux", "ratio", "clean")}
    roles = {"clean": {"role": role} if role else None}
    fields = [pa.field(n, pa.list_(pa.float64()), metadata=roles.get(n)) for n in numbers]
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table(numbers, schema=pa.schema(fields)), path)
    if role == "target":
        assert score_file(package, LINEAGE, path, "test", tmp_path / "out") == 1
    else:
        with pytest.raises(ValueError, match="unknown 'clean'"):
            score_file(package, LINEAGE, path, "test", tmp_path / "out")


def test_lines_of_observations_are_read_as_lists(package, tmp_path):
    rows = [{"time": 0.5, "flux": 1, "ratio": 2}, {"time": 2, "flux": 3, "ratio": 4}]
    line = {"observations": [{"band": 1, **row} for row in rows]}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))

    (row,) = read_series(tmp_path / "in.jsonl", "test", package)

    assert row["positions"] == {"time": [0.5, 2], "band": [1, 1]} and row["observations"] is None
    assert row["values"] == {"flux": [1, 3], "ratio": [2, 4]}
