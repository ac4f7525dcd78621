"""Equal content in two splits: exactly equal, long enough not to be so by chance, and a setting."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data import StoredDataset
from roma_core.data.manifest import read_manifest
from roma_core.data.quality import check_dataset
from roma_core.evaluation.leakage import LeakageReport, check_leakage
from tests.core.hand_made import built, series

CONTENT = "equal content in two splits"


def some(n=40, length=20):
    return [series(f"s{k}", length, "xy"[k % 2], None, seed=k) for k in range(n)]


def twins(values, **changes):
    """A series of train and one of test with equal values."""
    values = np.asarray(values, np.float32).reshape(-1, 1).repeat(2, axis=1)
    return [
        series(name, len(values), "x", name, values=values, **changes) for name in ("train", "test")
    ]


def found_in(path):
    return {f.check: f for f in check_dataset(path)}


def test_values_that_differ_in_the_fourth_decimal_are_not_equal(tmp_path):
    one, other = twins(np.random.default_rng(0).normal(size=20))
    other = dataclasses.replace(other, values=other.values + np.float32(1e-4))

    assert CONTENT not in found_in(built(tmp_path, *some(), one, other))
    assert CONTENT in found_in(built(tmp_path, *some(), *twins(one.values[:, 0])))


@pytest.mark.parametrize(
    "values",
    [[1.5], [0, 1, 1, 0, 1], np.zeros(200), np.repeat([0, 1], 50), [3, 1, 4, 1, 5, 9, 2]],
    ids=["one", "short", "flat", "a step", "seven"],
)
def test_short_and_flat_series_may_be_equal_by_chance(tmp_path, values):
    path = built(tmp_path, *some(), *twins(values))

    found = found_in(path)

    assert CONTENT not in found
    assert found["equal short or flat series"].severity == "warning"
    assert check_leakage(StoredDataset(path), []) == LeakageReport((), ())


def test_hundreds_of_quantised_visits_are_no_error(tmp_path):
    rng = np.random.default_rng(0)
    visits = [
        series(f"p{k}", 3, "xy"[k % 2], None, values=rng.integers(0, 2, (3, 2)).astype("f4"))
        for k in range(400)
    ]

    result = CliRunner().invoke(main, ["data", "validate", str(built(tmp_path, *visits))])

    assert result.exit_code == 0, result.output
    assert "equal short or flat series" in result.output and "sound" in result.output


@pytest.mark.parametrize(
    ("leakage", "exit_code", "severity"),
    [(None, 1, "error"), ("error", 1, "error"), ("warn", 0, "warning"), ("ignore", 0, None)],
)
def test_leakage_is_what_the_configuration_says(tmp_path, leakage, exit_code, severity):
    options = {} if leakage is None else {"leakage": leakage}
    rng = np.random.default_rng(0)
    grouped = [dataclasses.replace(s, group=f"g{k // 2}") for k, s in enumerate(some())]
    leaks = [dataclasses.replace(s, group="one") for s in twins(rng.normal(size=20))]
    path = built(tmp_path, *grouped, *leaks, **options)

    result = CliRunner().invoke(main, ["data", "validate", "--json", str(path)])

    assert result.exit_code == exit_code
    found = {f["check"]: f["severity"] for f in json.loads(result.stdout)}
    assert found.get(CONTENT) == found.get("group in two splits") == severity
    leakage = check_leakage(StoredDataset(path), [])
    assert bool(leakage.refused) == (severity == "error")
    assert bool(leakage.allowed) == (severity == "warning"), "a report still names it"


def test_the_setting_is_part_of_the_version_only_where_it_is_set(tmp_path):
    default, same, warned = (
        built(tmp_path, *some(), **options)
        for options in ({}, {"leakage": "error"}, {"leakage": "warn"})
    )

    assert default == same != warned
    assert "leakage" not in json.loads((default / "manifest.json").read_text())
    assert read_manifest(warned).leakage == "warn"


def test_the_message_names_both_ways_out(tmp_path):
    path = built(tmp_path, *some(), *twins(np.random.default_rng(0).normal(size=20)))

    (text,) = found_in(path)[CONTENT].examples

    assert "series 'train' (train) and 'test' (test) have equal content" in text
    assert "remove one of them, or set leakage to 'warn'" in text
