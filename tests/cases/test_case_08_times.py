"""Times as text, dates and durations, in CSV and in Parquet, become numbers of the declared unit."""

import datetime as dt
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from roma_core.data import DataError
from roma_core.data.infer_schema import ColumnRoles, infer_source
from tests.cases.commands import build, error_of, new_experiment

START = dt.datetime(2024, 3, 31, 0, 30, tzinfo=dt.UTC)  # summer time begins
STEP = dt.timedelta(minutes=37)
HOUR = 3600.0
FORMS = {
    "2024-03-31T00:30:00Z": (lambda t: f"{t:%Y-%m-%dT%H:%M:%SZ}", STEP, 0.0),
    "2024-03-31T00:30:00+00:00": (lambda t: t.isoformat(), STEP, 0.0),
    "2024-03-31T00:30:00+02:00": (lambda t: f"{t:%Y-%m-%dT%H:%M:%S}+02:00", STEP, -2 * HOUR),
    "2024-03-31 00:30:00": (lambda t: f"{t:%Y-%m-%d %H:%M:%S}", STEP, 0.0),
    "2024-03-31 00:30:00.250": (lambda t: f"{t:%Y-%m-%d %H:%M:%S}.250", STEP, 0.25),
    "2024-03-31": (lambda t: f"{t:%Y-%m-%d}", dt.timedelta(days=2), -0.5 * HOUR),
    "31.03.2024": (lambda t: f"{t:%d.%m.%Y}", dt.timedelta(days=2), -0.5 * HOUR),
    "31.03.2024 00:30": (lambda t: f"{t:%d.%m.%Y %H:%M}", STEP, 0.0),
}


def rows(form, step):
    return pd.DataFrame(
        [
            (f"s{i}", form(START + k * step), float(i + k), "ab"[i % 2])
            for i in range(30)
            for k in range(8)
        ],
        columns=["sensor_id", "timestamp", "temperature", "label"],
    )


@pytest.mark.parametrize("name", FORMS)
def test_times_in_csv_are_seconds_since_1970(tmp_path, name):
    form, step, shift = FORMS[name]
    rows(form, step).to_csv(tmp_path / "a.csv", index=False)

    config, output = new_experiment(tmp_path / "a.csv", "--object", "sensor_id")

    assert "positions: timestamp" in output
    dataset = build(tmp_path, config | {"name": "case"})
    (axis,) = dataset.schema.axes
    assert (axis.name, axis.unit) == ("timestamp", "s")
    expected = START.timestamp() + shift + np.arange(8) * step.total_seconds()
    for i in range(len(dataset)):
        assert dataset.raw(i)[0][:, 0].tolist() == expected.tolist()


def test_parquet_and_csv_give_the_same_positions(tmp_path):
    form, step, _ = FORMS["2024-03-31T00:30:00Z"]
    rows(form, step).to_csv(tmp_path / "a.csv", index=False)
    pq.write_table(pa.csv.read_csv(tmp_path / "a.csv"), tmp_path / "a.parquet")

    found = []
    for file in ("a.csv", "a.parquet"):
        config, _ = new_experiment(tmp_path / file, "--object", "sensor_id")
        dataset = build(tmp_path, config | {"name": "case"})
        found.append([dataset.raw(i)[0].tolist() for i in range(len(dataset))])

    assert found[0] == found[1]


@pytest.mark.parametrize("text", ["03/31/2024", "31 Mar 2024", "2024-13-45", "soon"])
def test_a_time_in_another_form_is_refused_with_the_forms_that_are_read(tmp_path, text):
    rows(lambda t: text, STEP).to_csv(tmp_path / "a.csv", index=False)
    columns = {"object": "sensor_id", "axes": [{"column": "timestamp"}]}
    columns |= {"channels": [{"column": "temperature"}]}
    source = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": columns}

    message = error_of(tmp_path, {"name": "x", "source": source})

    assert f"column 'timestamp' holds '{text}' in row 1, expected numbers, or dates like" in message


UNITS = {
    "s": 86400.0,
    "ms": 86400e3,
    "min": 1440.0,
    "h": 24.0,
    "d": 1.0,
    "days": 1.0,
    "hours": 24.0,
}
RESOLUTIONS = ["s", "ms", "us", "ns"]


def daily(path, column, axis):
    """Ten objects with an observation a day, and the configuration that reads them."""
    ids = np.repeat(np.arange(10), 5)
    pq.write_table(pa.table({"id": ids, "t": column, "v": np.random.rand(50)}), path)
    columns = {"object": "id", "axes": [{"column": "t", **axis}], "channels": [{"column": "v"}]}
    return {"name": "x", "source": {"kind": "table", "files": [str(path)], "columns": columns}}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("unit", UNITS)
def test_case_09_dates_are_given_in_the_declared_unit(tmp_path, unit, resolution):
    days = pd.to_datetime("2024-01-01", utc=True) + pd.to_timedelta(np.tile(range(5), 10), "D")
    column = pa.array(days).cast(pa.timestamp(resolution, tz="UTC"))

    dataset = build(tmp_path, daily(tmp_path / "a.parquet", column, {"unit": unit}))

    assert dataset.schema.axes[0].unit == unit
    np.testing.assert_allclose(np.diff(dataset.raw(0)[0][:, 0]), UNITS[unit])


def test_without_a_unit_it_is_seconds_and_another_one_is_refused(tmp_path):
    days = pa.array([dt.date(2024, 1, k + 1) for _ in range(10) for k in range(5)])
    dataset = build(tmp_path, daily(tmp_path / "a.parquet", days, {}))

    assert dataset.schema.axes[0].unit == "s"
    assert np.diff(dataset.raw(0)[0][:, 0]).tolist() == [86400.0] * 4
    message = error_of(tmp_path, daily(tmp_path / "a.parquet", days, {"unit": "MJD"}))
    assert "dates, which cannot be given in 'MJD'; set its unit to one of ns, us, ms, s" in message


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_durations_are_not_taken_for_numbers_of_nanoseconds(tmp_path, resolution):
    hours = pa.array(pd.to_timedelta(np.tile(range(5), 10), "h")).cast(pa.duration(resolution))

    seconds = build(tmp_path, daily(tmp_path / "a.parquet", hours, {}))
    minutes = build(tmp_path, daily(tmp_path / "a.parquet", hours, {"unit": "min"}))

    assert seconds.schema.axes[0].unit == "s"
    assert np.diff(seconds.raw(0)[0][:, 0]).tolist() == [3600.0] * 4
    assert np.diff(minutes.raw(0)[0][:, 0]).tolist() == [60.0] * 4


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_lists_of_dates_and_durations_are_seconds(tmp_path, resolution):
    hours = pd.to_timedelta(range(5), "h")
    times = {
        "since": [pa.array(hours).cast(pa.duration(resolution)).to_pylist()] * 20,
        "at": [[START + hour for hour in hours]] * 20,
    }
    types = {"since": pa.duration(resolution), "at": pa.timestamp(resolution, tz="UTC")}
    columns = {name: pa.array(times[name], pa.list_(types[name])) for name in times}
    values = [np.random.default_rng(k).normal(size=5) for k in range(20)]
    table = pa.table({"id": [str(k) for k in range(20)], "v": values, **columns})
    pq.write_table(table, tmp_path / "a.parquet")
    for name in times:
        source = {
            "kind": "parquet",
            "files": [str(tmp_path / "a.parquet")],
            "axes": [{"column": name}],
        }
        config = {"name": "x", "source": source | {"channels": [{"column": "v"}]}}

        dataset = build(tmp_path, config)

        assert dataset.schema.axes[0].unit == "s"
        assert np.diff(dataset.raw(0)[0][:, 0]).tolist() == [3600.0] * 4


@pytest.mark.parametrize("file", ["a.csv", "a.parquet"])
def test_dates_as_numbers_are_refused_as_a_time_and_left_out_as_a_value(tmp_path, file):
    frame = rows(lambda t: int(f"{t:%Y%m%d}"), dt.timedelta(days=9))

    def write(frame):
        frame.to_csv(tmp_path / file) if file == "a.csv" else frame.to_parquet(tmp_path / file)

    write(frame)
    with pytest.raises(
        DataError, match="'timestamp' holds dates as numbers; convert them to 2024-"
    ):
        infer_source([tmp_path / file], ColumnRoles(object="sensor_id"))
    write(frame.rename(columns={"timestamp": "night"}).assign(time=np.tile(np.arange(8.0), 30)))
    config, output = new_experiment(tmp_path / file, "--object", "sensor_id")
    assert "not used: dates as numbers in 'night'" in output
    assert [c["column"] for c in config["source"]["columns"]["channels"]] == ["temperature"]


def test_dates_in_one_file_and_numbers_in_the_next_are_refused(tmp_path):
    days = pa.array([dt.date(2024, 1, k + 1) for _ in range(10) for k in range(5)])
    config = daily(tmp_path / "b.parquet", days, {})
    daily(tmp_path / "a.parquet", pa.array(np.tile(np.arange(5.0), 10)), {})
    config["source"]["files"] = [str(tmp_path / "*.parquet")]

    message = error_of(tmp_path, config)

    assert re.search(r"'t' holds numbers in \S*a\.parquet, and dates in \S*b\.parquet", message)


def test_a_channel_of_dates_has_a_unit(tmp_path):
    days = pa.array([dt.date(2024, 1, k + 1) for _ in range(10) for k in range(5)])
    config = daily(tmp_path / "a.parquet", days, {})
    config["source"]["columns"]["channels"] = [{"column": "t", "name": "when"}]

    assert build(tmp_path, config).schema.channels[0].unit == "s"


def test_case_09_dates_in_csv_are_given_in_days(tmp_path):
    form, step, _ = FORMS["31.03.2024"]
    rows(form, step).to_csv(tmp_path / "a.csv", index=False)
    columns = {"object": "sensor_id", "axes": [{"column": "timestamp", "unit": "d"}]}
    columns |= {"channels": [{"column": "temperature"}]}
    source = {"kind": "table", "files": [str(tmp_path / "a.csv")], "columns": columns}

    dataset = build(tmp_path, {"name": "x", "source": source})

    assert dataset.schema.axes[0].unit == "d"
    assert dataset.raw(0)[0][:, 0].tolist() == [19813.0 + 2 * k for k in range(8)]
