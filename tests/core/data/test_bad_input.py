"""What a user brings that is not as it should be, through the command: one clear sentence, or a repair."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data import StoredDataset
from roma_core.data.manifest import read_manifest

COLUMNS = {"object": "star", "axes": [{"column": "t"}], "channels": [{"column": "v"}]}
SOUND = [f"s{k},{i},{k + i / 2}" for k in range(40) for i in range(5)]


def build(folder, source, **options):
    config = folder / "config.yaml"
    config.write_text(json.dumps({"name": "stars", "source": source, **options}))
    arguments = ["data", "build", str(config), "--out", str(folder / "out"), "--cache", str(folder)]
    result = CliRunner().invoke(main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


def table(folder, lines, header="star,t,v", file="stars.csv", columns=COLUMNS, **options):
    (folder / file).write_text("\n".join([header, *lines, ""]), encoding="utf-8")
    source = {"kind": "table", "files": [str(folder / file)], "columns": columns}
    return build(folder, source, **options)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x,1,low"], "stars.csv: column 'v' holds 'low' in row 201, expected numbers"),
        (["x,1"], r"stars.csv cannot be read: line 202, 'x,1': .*Columns: 3 Found: 2"),
        (["x,1,2", "x,1,3"], "series 'x' of stars.csv repeats a position, 1 times in all"),
        (["x,1,nan"], "series 'x' of stars.csv has no observations"),
        (["x,nan,1"], "series 'x' of stars.csv: positions hold nan at observation 0, column 0 (t)"),
        (["x,1,1e300"], "values hold inf at observation 0, column 0 (v), but all must be finite"),
        ([",1,2"], "stars.csv: column 'star' has an empty id"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_place_and_nothing_is_left(tmp_path, lines, message):
    result = table(tmp_path, [*SOUND, *lines])

    assert result.exit_code == 1
    pattern = message if ".*" in message else re.escape(message)
    (text,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert re.search(pattern, text), text
    assert not (tmp_path / "out" / "stars").exists()


@pytest.mark.parametrize(
    ("lines", "options", "repairs"),
    [
        (["x,3,1", "x,1,2"], {}, {"series_sorted": 1}),
        (["x,1,2", "x,1,3"], {"duplicates": "mean"}, {"duplicate_observations": 1}),
        (["x,1,nan", "x,2,3"], {}, {"observations_without_values": 1}),
        (["x,nan,1", "x,2,3"], {"not_finite": "drop"}, {"observations_not_finite": 1}),
        (
            ["x,1,"],
            {"empty": "drop"},
            {"observations_without_values": 1, "empty_series_dropped": 1},
        ),
    ],
)
def test_a_repair_is_counted_and_reported(tmp_path, lines, options, repairs):
    result = table(tmp_path, [*SOUND, *lines], repair=options)

    assert result.exit_code == 0, result.output
    *_, sizes, repaired, path = result.output.splitlines()
    made = read_manifest(tmp_path / path).repairs.model_dump()
    assert {name: count for name, count in made.items() if count} == repairs
    assert repaired.startswith("repaired: ") and sizes.startswith("train ")


def test_series_of_one_and_of_100_000_points_and_names_in_any_script_are_kept(tmp_path):
    lines = ["星-é ☃,1,2", *[f"long,{i},{i % 7}" for i in range(100_000)]]

    result = table(tmp_path, [*SOUND, *lines])

    assert result.exit_code == 0, result.output
    dataset = StoredDataset(result.output.splitlines()[-1])
    length_of = dict(zip(dataset.ids, dataset.lengths.tolist(), strict=True))
    assert length_of["星-é ☃"] == 1 and length_of["long"] == 100_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_fraction": 1.5}, "config.yaml: test_fraction: must be less than 1, got 1.5"),
        (
            {"valdation_fraction": 0},
            "valdation_fraction: not a setting; the closest one is validation_fraction",
        ),
        ({"split": {"by": "obect"}}, "split.by: must be 'object', 'group' or 'time', got 'obect'"),
        (
            {"columns": {"chanels": []}},
            "source: columns.chanels: not a setting; the closest one is columns.channels",
        ),
        ({"columns": {"object": None}}, "source: columns.object: must be a valid string, got None"),
        (
            {"axes": {"t": {"scale": -1}}},
            "axes.t.scale: must be greater than 0 or must be 'auto', got -1",
        ),
        ({"name": "a b"}, "name: must match pattern"),
    ],
)
def test_a_mistake_in_the_configuration_is_one_sentence(tmp_path, changes, message):
    columns = COLUMNS | changes.pop("columns", {})

    result = table(tmp_path, SOUND, columns=columns, **changes)

    assert result.exit_code == 1 and message in result.output, result.output
    assert "pydantic" not in result.output and "type=" not in result.output


@pytest.mark.parametrize(
    ("name", "header"), [("stars.csv", "star;t;v"), ("stars.tsv", "star\tt\tv")]
)
def test_another_separator_is_recognised(tmp_path, name, header):
    lines = [line.replace(",", header[4]) for line in SOUND]

    result = table(tmp_path, lines, header=header, file=name)

    assert result.exit_code == 0, result.output
    assert len(StoredDataset(result.output.splitlines()[-1])) == 40


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("star:t:v", r"stars.csv has no column 'star'; it has \['star:t:v'\]"),
        ("star,time,v", r"stars.csv has no column 't'; it has \['star', 'time', 'v'\]"),
    ],
)
def test_another_column_is_named(tmp_path, header, message):
    lines = [line.replace(",", header[4]) for line in SOUND]

    result = table(tmp_path, lines, header=header)

    assert result.exit_code == 1 and re.search(message, result.output), result.output


def test_a_source_without_series_and_an_undeclared_class_are_named(tmp_path):
    result = table(tmp_path, [])
    assert "(table) has no series; look into its files: stars.csv" in result.output

    columns = COLUMNS | {"metadata": {"label": "c", "classes": ["a", "b"]}}
    lines = [f"{line},{'abz'[k == 7]}" for k, line in enumerate(SOUND)]
    result = table(tmp_path, [*lines[:5], "x,1,1,zz"], header="star,t,v,c", columns=columns)
    assert "series 'x' of stars.csv has the label 'zz', which is none of its 2 classes a, b" in (
        result.output
    )


def test_a_class_that_training_never_sees_is_a_warning_without_code(tmp_path):
    columns = COLUMNS | {"metadata": {"label": "c", "split": "part"}}
    lines = [f"{line},{'ab'[k % 10 < 5]},train" for k, line in enumerate(SOUND)]
    lines += ["x,1,1,rare,test"]

    result = table(tmp_path, lines, header="star,t,v,c,part", columns=columns)

    assert result.exit_code == 0, result.output
    assert "warning: no series of the classes ['rare'] is in the train split" in result.output
    assert ".py" not in result.output


def test_lists_that_differ_and_a_file_cut_short_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    lists = {"t": pa.array([[1.0, 2.0], [1.0]]), "v": pa.array([[1.0, 2.0], []])}
    pq.write_table(pa.table({"star": ["a", "b"]} | lists), path)
    source = {"kind": "parquet", "files": [str(path)], "id": "star"}
    source |= {name: COLUMNS[name] for name in ("axes", "channels")}

    assert "series 'b' has 1 numbers in 't' and 0 in 'v'" in build(tmp_path, source).output
    path.write_bytes(path.read_bytes()[:200])
    assert "rows.parquet cannot be read: " in build(tmp_path, source).output


def test_a_corrupted_byte_is_found_before_training_starts(tmp_path):
    folder = tmp_path / table(tmp_path, SOUND).output.splitlines()[-1]
    content = bytearray((folder / "values.npy").read_bytes())
    content[-3] ^= 1
    (folder / "values.npy").write_bytes(content)

    out = tmp_path / "run"
    result = CliRunner().invoke(main, ["pretrain", "--data", str(folder), "--run-dir", str(out)])

    assert result.exit_code == 1
    assert "is damaged: values.npy: sha256" in result.output
    assert not (out / "metrics.jsonl").exists() and not (out / "checkpoints").exists()


def test_duplicates_in_one_split_are_no_leak(tmp_path):
    same = [f"{name},{i},{i * i}" for name in ("one", "two") for i in range(9)]
    columns = COLUMNS | {"metadata": {"split": "part"}}

    def found(parts):
        lines = [f"{line},train" for line in SOUND]
        lines += [f"{line},{parts[k // 9]}" for k, line in enumerate(same)]
        result = table(
            tmp_path, lines, header="star,t,v,part", columns=columns, validation_fraction=0
        )
        path = result.output.splitlines()[-1]
        return CliRunner().invoke(main, ["data", "validate", path])

    together, apart = found(["train", "train"]), found(["train", "test"])
    assert together.exit_code == 0
    assert "warning: series 'one' (train) and 'two' (train) have equal content" in together.output
    assert apart.exit_code == 1
    assert "error: series 'one' (train) and 'two' (test) have equal content" in apart.output
