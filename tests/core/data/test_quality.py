"""What is found in a data set: leaks, oddities, and what changed since the version before."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from roma_core.cli import main
from roma_core.data import DatasetConfig, StoredDataset, build_dataset
from roma_core.data.manifest import read_manifest, record_of
from roma_core.data.quality import _recurring, check_dataset
from roma_core.data.versions import compare_versions, previous_version, stability_index
from roma_core.files import write_json
from roma_core.schema import Covariate, PositionAxis
from tests.core import hand_made
from tests.core.data.test_layout import BAND, CHANNELS, NAN, gappy
from tests.core.hand_made import SOME, HandMade, errors_in, series

LAYOUTS = pytest.mark.parametrize("layout", ["joint", "per_channel"])


def built(folder, *all_series, **options):
    return hand_made.built(folder, *all_series, **{"validation_fraction": 0.25, **options})


def some(n=60, **changes):
    return [series(f"s{k}", 20, "xy"[k % 2], None, seed=k, **changes) for k in range(n)]


def found_in(path):
    return {f.check: f for f in check_dataset(path)}


def test_a_plain_set_has_no_finding(tmp_path):
    assert check_dataset(built(tmp_path, *some())) == []


def test_a_group_in_two_splits_is_an_error(tmp_path):
    grouped = [dataclasses.replace(s, group=f"g{k // 4}") for k, s in enumerate(some())]
    path = built(tmp_path, *grouped)

    (finding,) = check_dataset(path)

    assert (finding.check, finding.severity) == ("group in two splits", "error")
    assert "set split.by to 'group'" in finding.examples[0] and "(train)" in finding.examples[0]
    assert check_dataset(built(tmp_path, *grouped, split={"by": "group"})) == []


def test_equal_content_is_an_error_between_splits_and_a_warning_within(tmp_path):
    first = series("first", 20, "x", "train", 99)
    inside = dataclasses.replace(first, id="again")
    outside = dataclasses.replace(first, id="asked", recorded_split="test")

    found = found_in(built(tmp_path, *some(), first, inside, outside))

    assert found["equal content in two splits"].severity == "error"
    assert "'first' (train) and 'asked' (test)" in found["equal content in two splits"].examples[0]
    assert found["equal content in one split"].severity == "warning"


def test_a_near_copy_in_another_split_is_shown_with_its_distance(tmp_path):
    first = series("first", 20, "x", "train", 99)
    blurred = first.values + np.float32(0.01)
    copy = series("copy", 20, "x", "test", values=blurred)

    found = found_in(built(tmp_path, *some(), first, copy))

    assert set(found) == {"near duplicates in two splits"}
    text = found["near duplicates in two splits"].examples[0]
    assert "'copy' (test) is 0.0" in text and "from 'first' (train)" in text


@pytest.mark.filterwarnings("ignore:no series of the classes")
def test_oddities_are_warnings_with_a_count_and_an_example(tmp_path):
    unsorted = series("unsorted", 3, "x", positions=np.array([[2.0], [1], [1]]))
    far = series(
        "far", 3, "x", values=np.float32([[1e6, 2e6], [3e6, 4e6], [5e6, 6e6]]), split="test"
    )
    odd = [unsorted, far, series("single", 1, seed=7), series("long", 20_000, seed=8)]
    source = HandMade(
        series=(*some(), *odd),
        classes=("x", "y", "never"),
        channels=(HandMade().channels[0], HandMade().channels[1].model_copy(update={"unit": ""})),
    )

    found = found_in(
        built(tmp_path, source=source, repair={"unsorted": "keep", "duplicates": "keep"})
    )

    assert all(f.severity == "warning" for f in found.values())
    counts = {name: f.count for name, f in found.items()}
    assert counts == {
        "order": 1,
        "duplicates": 1,
        "single": 1,
        "long": 1,
        "far": 6,
        "units": 1,
        "classes": 1,
        "splits": 2,
    }
    assert found["classes"].examples[0] == "class 'never' has 0 series in train and 0 in all"
    assert "'b' has no unit" in found["units"].examples[0]
    assert "'far'" in found["far"].examples[0]


def test_positions_that_turn_the_rotation_too_far_are_found(tmp_path):
    dates = [dataclasses.replace(s, positions=s.positions + 2_460_000.5) for s in some()]

    assert "set its anchor to 'first'" in found_in(built(tmp_path, *dates))["reach"].examples[0]
    anchored = built(tmp_path, *dates, axes={"t": {"anchor": "first"}})
    assert check_dataset(anchored) == []


def version(folder, *all_series, at, **options):
    """A version that was built at a given second."""
    path = built(folder, *all_series, **options)
    os.utime(path / "manifest.json", (at, at))
    return path


def test_a_version_is_compared_with_the_one_before_it(tmp_path):
    paths = [version(tmp_path, *some(n), at=n) for n in (40, 50, 60)]

    assert [previous_version(path) for path in paths] == [None, paths[0], paths[1]]
    assert compare_versions(StoredDataset(paths[2]), StoredDataset(paths[1])) == []


def test_an_object_that_moved_is_an_error_others_a_warning(tmp_path):
    before = StoredDataset(built(tmp_path, *some()))
    later = some()
    was = "test" if before.splits[3] != 2 else "train"
    later[3] = dataclasses.replace(later[3], recorded_split=was)
    later[4] = series("s4", 19, "y", None, seed=4)
    after = StoredDataset(built(tmp_path, *later[:-1], series("new", 20, "y", None, seed=99)))

    found = {f.check: f for f in compare_versions(after, before)}

    assert {name: (f.severity, f.count) for name, f in found.items()} == {
        "moved to another split": ("error", 1),
        "gone": ("warning", 1),
        "changed": ("warning", 1),
    }
    assert "'s3' was in" in found["moved to another split"].examples[0]
    assert "'s59'" in found["gone"].examples[0]
    assert "19, and another label" in found["changed"].examples[0]


def test_drift_names_what_drifted(tmp_path):
    before = StoredDataset(built(tmp_path, *some(200)))
    louder = [dataclasses.replace(s, values=s.values * [1, 3], id=f"n{s.id}") for s in some(200)]
    after = StoredDataset(
        built(tmp_path, *[dataclasses.replace(s, values=s.values.astype("f4")) for s in louder])
    )

    (drift,) = [f for f in compare_versions(after, before) if f.check == "drift"]

    assert drift.count == 1 and drift.examples[0].startswith("channel 'b' drifted")


def test_another_schema_is_reported_and_nothing_else(tmp_path):
    before = StoredDataset(built(tmp_path, *some()))
    channels = (HandMade().channels[0], HandMade().channels[1].model_copy(update={"unit": "mV"}))
    after = StoredDataset(built(tmp_path, source=HandMade(series=tuple(some()), channels=channels)))

    (finding,) = compare_versions(after, before)

    assert finding.check == "schema changed" and "('b', 'mV')" in finding.examples[0]


def test_the_stability_index_is_nought_for_equal_and_large_for_shifted():
    numbers = np.random.default_rng(0).normal(size=5000)

    assert stability_index(numbers, numbers) == 0
    assert stability_index(numbers, np.random.default_rng(1).normal(size=5000)) < 0.02
    assert stability_index(numbers, numbers + 1) > 0.5
    assert stability_index(np.array([0.0, 0, 1]), np.array([0.0, 1, 1])) > 0


def test_validate_as_a_step_of_ci(tmp_path):
    run = CliRunner().invoke
    path = built(tmp_path, *some())
    odd = built(tmp_path, *some(), series("single", 1, split="train"))
    moved = [dataclasses.replace(s, recorded_split="test") for s in some()[:5]] + some()[5:]
    other = built(tmp_path, *moved)

    assert run(main, ["data", "validate", str(path), "--strict"]).stdout == f"{path}: sound\n"
    warned = run(main, ["data", "validate", str(odd)])
    assert warned.exit_code == 0 and "warning: series 'single' has one" in warned.stdout
    assert run(main, ["data", "validate", str(odd), "--strict"]).exit_code == 1
    (as_json,) = json.loads(run(main, ["data", "validate", str(odd), "--json"]).stdout)
    assert (as_json["check"], as_json["count"]) == ("single", 1)
    against = run(main, ["data", "validate", str(other), "--against", str(path)])
    assert against.exit_code == 1 and "error: object 's0' was in" in against.stdout
    out = tmp_path / "out.parquet"
    assert run(main, ["data", "export", str(path), str(out)]).stdout == f"{out}: 60 series\n"
    clash = HandMade(
        series=(series("a", 9, "x"), series("b", 9, "y", seed=1)),
        channels=(HandMade().channels[0], HandMade().channels[1].model_copy(update={"name": "id"})),
    )
    refused = run(main, ["data", "export", str(built(tmp_path, source=clash)), str(out)])
    assert refused.exit_code == 1 and "two columns would be called 'id'" in refused.stderr


def test_the_findings_of_a_generated_set_are_few(tmp_path):
    source = {"kind": "synthetic", "process": "spirals", "n_series": 300}
    config = DatasetConfig.model_validate({"name": "spirals", "source": source})

    path = build_dataset(config, tmp_path, tmp_path, progress=False)

    assert errors_in(path) == []


def rewritten(path, name, array):
    """Replace a column and make size, sha256 and digest fit, as a foreign writer might."""
    np.save(path / name, array)
    manifest = read_manifest(path)
    files = {**manifest.files, name: record_of(path / name)}
    manifest = manifest.model_copy(update={"files": files})
    manifest = manifest.model_copy(update={"digest": manifest.computed_digest()})
    write_json(path / "manifest.json", manifest.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("offsets.npy", lambda a: a[[0, 2, 1, 3, 4]], "give every series at least one"),
        ("offsets.npy", lambda a: a[:-1], "offsets.npy: int64 of shape"),
        ("labels.npy", lambda a: a + 1, "labels.npy: holds other numbers"),
        ("splits.npy", lambda a: a + 3, "splits.npy: holds other numbers"),
        ("splits.npy", lambda a: a[::-1], "manifest.json: counts"),
        ("values.npy", lambda a: a.astype(np.float64), "values.npy: float64"),
        ("values.npy", lambda a: np.where(a == a[0, 0], np.inf, a), "'train-1' holds numbers that"),
        ("values.npy", lambda a: np.where(a == a[0, 0], np.nan, a), "'train-1' holds numbers that"),
    ],
)
def test_columns_that_contradict_each_other_are_found(sound, tmp_path, name, change, message):
    copy = tmp_path / "set"
    shutil.copytree(sound, copy)

    rewritten(copy, name, change(np.load(copy / name)))

    assert any(message in problem for problem in errors_in(copy))


def test_equal_content_in_two_splits_is_found(tmp_path):
    first = series("train-1", seed=1)
    copy = series("copy", split="test", values=first.values.copy())
    path = built(tmp_path, first, SOME[1], copy, series("other", split="test", seed=9))

    (problem,) = errors_in(path)

    assert "'train-1' (train) and 'copy' (test) have equal content" in problem


def gappy_set(folder, *more, n=60, values=lambda x: x, **options):
    """Series with gaps, a categorical axis and covariates, in a layout."""
    all_series = []
    for k in range(n):
        one = gappy(f"s{k}", 12, seed=k, split=None, label="xy"[k % 2], missing=0.3)
        at = np.column_stack([one.positions, np.arange(12) % 2])
        covariates = np.float32([NAN if k % 9 == 0 else 30 + 7 * k % 40, k // 2 % 2])
        changes = {"values": values(one.values), "positions": at, "covariates": covariates}
        all_series.append(dataclasses.replace(one, **changes))
    source = HandMade(
        series=(*all_series, *more),
        channels=CHANNELS,
        axes=(PositionAxis(name="t", unit="s"), BAND),
        covariates=(Covariate(name="age", unit="y"), Covariate(name="sex", categories=("f", "m"))),
    )
    return built(folder, source=source, **options)


@LAYOUTS
def test_gaps_categories_and_covariates_are_no_finding(tmp_path, layout):
    path = gappy_set(tmp_path, layout=layout)

    assert check_dataset(path) == []
    assert compare_versions(StoredDataset(path), StoredDataset(path)) == []
    assert "near duplicates" not in str(found_in(gappy_set(tmp_path, n=200, layout=layout)))


@LAYOUTS
def test_a_sentinel_is_named_with_its_number_and_the_setting_that_removes_it(tmp_path, layout):
    def with_sentinels(values):
        values[3:5, 1] = -999
        return values

    (finding,) = check_dataset(gappy_set(tmp_path, values=with_sentinels, layout=layout))

    assert finding.examples == (
        "channel 'lab' is exactly -999 in 120 observations, far from its other values: if that stands "
        "for a missing value, set missing_values: [-999] in the source (or write NaN there)",
    )


NORMAL = np.random.default_rng(0).normal(20, 2, 500).astype(np.float32)


@pytest.mark.parametrize(
    ("numbers", "sentinels"),
    [
        ([*NORMAL, *[-999] * 3], [-999]),
        ([*NORMAL, *[-999] * 2], []),  # does not recur
        (
            [*NORMAL, *[-999] * 300, *[-9999] * 300, *[np.float32(99.999)] * 9],
            [-9999, -999, 99.999],
        ),
        ([*np.round(NORMAL + 30), *[0] * 40], [0]),
        (NORMAL.clip(18, 22), []),  # a sensor's limits
        ([*[0] * 400, *[1] * 50, *[100] * 9], []),  # an indicator, doses
        (np.exp(NORMAL), []),
        ([], []),
    ],
)
def test_a_value_that_recurs_far_outside_may_stand_for_a_missing_one(numbers, sentinels):
    assert sorted(_recurring(np.array(numbers, np.float32))) == pytest.approx(sentinels)


@LAYOUTS
def test_equal_sparse_series_may_be_equal_by_chance(tmp_path, layout):
    values = np.full((12, 3), NAN, np.float32)
    values[:, 0], values[0] = 1, [1, 900, 5]
    values[3:, 1], values[3:, 2] = 900, 5
    at = np.column_stack([np.arange(12.0), np.zeros(12)])
    shared = {"values": values, "positions": at, "covariates": np.float32([50, 1])}
    one, other = (
        dataclasses.replace(gappy(name, split=split), **shared)
        for name, split in (("one", "train"), ("other", "test"))
    )

    found = found_in(gappy_set(tmp_path, one, other, layout=layout))

    assert "equal short or flat series" in found and "equal content in two splits" not in found


def test_splits_without_a_class_and_useless_covariates_are_warnings(tmp_path):
    covariates = tuple(Covariate(name=name, unit="y") for name in ("age", "rare", "fixed"))
    ages = np.float32([*np.random.default_rng(0).uniform(20, 60, 57), 999, 999, 999])
    all_series = [
        series(
            f"s{k}", 20, "xy"[k % 2 if k < 50 else 0], "train" if k < 50 else "test", k,
            covariates=np.float32([ages[k], k if k in (1, 2) else NAN, 4]),
        )
        for k in range(60)
    ]  # fmt: skip
    source = HandMade(series=tuple(all_series), covariates=covariates)

    with pytest.warns(UserWarning, match="'fixed' never changes"):
        found = found_in(built(tmp_path, source=source, validation_fraction=0))

    assert found["splits"].examples == (
        "validation has no series, so nothing can be measured on it",
        "class 'y' has no series in test, so that its recall there is unknown",
    )
    assert found["covariates"].examples == (
        "covariate 'rare' is known for 2 of 50 objects of train",
        "covariate 'fixed' is the same for all objects of train that have it",
    )
    assert "'age' is exactly 999 in 3 objects" in found["sentinels of covariates"].examples[0]


@LAYOUTS
def test_drift_of_a_version_is_that_of_channels_and_of_what_is_observed(tmp_path, layout):
    def changed(values):
        values[:, 0] *= 3
        values[2::2, 1] = NAN
        return values

    before, after = (
        StoredDataset(gappy_set(tmp_path, values=change, layout=layout, n=200))
        for change in (lambda x: x, changed)
    )
    (drift,) = [f for f in compare_versions(after, before) if f.check == "drift"]

    assert [text.split(" drifted")[0] for text in drift.examples] == [
        "channel 'hr'",
        "presence of channel 'lab'",
    ]
    other = StoredDataset(gappy_set(tmp_path / "o", layout="joint"))
    if layout == "per_channel":
        (finding,) = compare_versions(before, other)
        assert finding.examples[0].startswith("layout were joint, now they are per_channel")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("positions.npy", lambda a: a + np.array([0, 2]), "no index of a category"),
        ("positions.npy", lambda a: a + np.array([0, 0.5]), "no index of a category"),
        ("values.npy", lambda a: a * [[NAN, NAN, NAN]], "holds numbers that are not finite"),
        (
            "covariates.npy",
            lambda a: a + np.float32([0, 1]),
            "'sex' holds no finite numbers, or no",
        ),
        ("covariates.npy", lambda a: a[:, :1], "covariates.npy: float32 of shape"),
    ],
)
def test_categories_and_covariates_that_cannot_be_are_found(tmp_path, name, change, message):
    path = gappy_set(tmp_path, layout="joint")

    rewritten(path, name, change(np.load(path / name)).astype(np.load(path / name).dtype))

    assert any(message in problem for problem in errors_in(path))
