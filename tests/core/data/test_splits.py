"""Which split an object is in, for every rule, and that later deliveries move none."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_core.data.manifest import SPLITS
from roma_core.data.splits import SplitOptions, Splitter
from roma_core.data.store import StoredDataset
from roma_core.data.versions import compare_versions
from roma_core.schema import DataError
from roma_core.sources.base import RawSeries
from tests.core.hand_made import built, series

ids = st.text(min_size=1, max_size=20)
recorded = st.sampled_from([None, "train", "test"])
fractions = st.floats(0, 0.9)


def split_of(dataset, name, recorded, validation, test):
    one = series(name, 1, split=recorded)
    return Splitter(dataset, SplitOptions(), validation, test).assign(one)


@given(name=ids, split=recorded, validation=fractions, test=fractions)
def test_recorded_assignments_are_kept(name, split, validation, test):
    found = split_of("set", name, split, validation, test)

    assert (found == "test") == (split == "test") or split is None
    assert found == split_of("set", name, split, validation, test)


@given(names=st.lists(ids, unique=True, min_size=1, max_size=30), more=st.lists(ids, max_size=30))
def test_a_delivery_of_more_objects_moves_none(names, more):
    before = {name: split_of("set", name, None, 0.2, 0.3) for name in names}

    after = {name: split_of("set", name, None, 0.2, 0.3) for name in [*more, *names]}

    assert {name: after[name] for name in names} == before


@given(name=ids, low=fractions, high=fractions)
def test_a_larger_test_fraction_takes_nothing_out_of_test(name, low, high):
    low, high = sorted((low, high))
    if split_of("set", name, None, 0.1, low) == "test":
        assert split_of("set", name, None, 0.1, high) == "test"


def test_fractions_are_met():
    splits = [split_of("set", f"object-{k}", None, 0.25, 0.2) for k in range(20_000)]

    assert splits.count("test") / 20_000 == pytest.approx(0.2, abs=0.012)
    assert splits.count("validation") / 20_000 == pytest.approx(0.8 * 0.25, abs=0.012)


def test_another_name_splits_anew():
    names = [f"object-{k}" for k in range(100)]

    assert [split_of("a", n, None, 0.5, 0) for n in names] != [
        split_of("b", n, None, 0.5, 0) for n in names
    ]


def labelled(n, first=0, **changes):
    """Objects of two classes, one in ten rare."""
    return [
        RawSeries(
            f"o{k}",
            np.array([[float(k)]]),
            np.zeros((1, 1), np.float32),
            "rare" if k % 10 == 0 else "common",
            **changes,
        )
        for k in range(first, first + n)
    ]


def splits_by(objects, test=0.2, validation=0.1, **options):
    splitter = Splitter("set", SplitOptions(**options), validation, test)
    return {s.id: splitter.assign(s) for s in objects}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stratified": True},
        {"folds": 4, "fold": 1},
        {"by": "time", "test_from": 70, "validation_from": 50},
    ],
)
def test_a_new_delivery_moves_no_object_whatever_the_rule(options):
    before = splits_by(labelled(90), **options)

    after = splits_by(labelled(150), **options)

    assert {name: after[name] for name in before} == before
    assert set(before.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize("options", [{}, {"folds": 4, "fold": 1}])
def test_new_deliveries_never_move_an_object_to_another_split(tmp_path, options):
    def delivery(*numbers):
        everything = [series(f"o{k}", 2, "xy"[k % 3 == 0], None, seed=k) for k in range(120)]
        split = {"stratified": True, **options}
        shares = {"test_fraction": 0.2, "validation_fraction": 0.1}
        path = built(tmp_path, *[everything[k] for k in numbers], split=split, **shares)
        dataset = StoredDataset(path)
        return {name: SPLITS[k] for name, k in zip(dataset.ids, dataset.splits, strict=True)}, path

    first, path = delivery(*range(60))
    second, _ = delivery(*range(99, 59, -1), *range(0, 60, 2))  # new ones first, others gone
    shuffled = np.random.default_rng(0).permutation(120)
    third, last = delivery(*shuffled)

    assert {name: third[name] for name in first} == first
    assert {name: third[name] for name in second} == second
    for label in "xy":
        of_label = [third[f"o{k}"] for k in range(120) if "xy"[k % 3 == 0] == label]
        in_test = of_label.count("test") / len(of_label)
        assert abs(in_test - (0.25 if options else 0.2)) < 0.06
    moved = [
        f
        for f in compare_versions(StoredDataset(last), StoredDataset(path))
        if f.severity == "error"
    ]
    assert not moved
    assert delivery(*shuffled)[1] == last  # equal input is the version that is there


def test_a_damaged_earlier_version_is_an_error(tmp_path):
    some = [series(f"o{k}", 2, split=None, seed=k) for k in range(30)]
    path = built(tmp_path, *some, split={"stratified": True}, test_fraction=0.2)
    (path / "splits.npy").write_bytes(b"x")

    with pytest.raises(DataError, match=r"splits\.npy is damaged or missing; .*restore the file"):
        built(tmp_path, *some, split={"stratified": True}, test_fraction=0.2)


@given(n=st.integers(10, 400), test=st.sampled_from([0.1, 0.2, 0.5]))
def test_a_stratified_split_is_exact_in_every_class(n, test):
    objects = labelled(n)
    found = splits_by(objects, test, 0.1, stratified=True)

    for label in ("rare", "common"):
        ids = [s.id for s in objects if s.label == label]
        in_test = sum(found[name] == "test" for name in ids)
        assert abs(in_test - test * len(ids)) <= 2


def test_a_group_is_in_one_split():
    objects = [dataclasses.replace(s, group=f"g{k // 5}") for k, s in enumerate(labelled(500))]

    found = splits_by(objects, by="group")

    for k in range(100):
        assert len({found[f"o{i}"] for i in range(5 * k, 5 * k + 5)}) == 1
    with pytest.raises(DataError, match="'o0' has no group"):
        splits_by(labelled(1), by="group")


@pytest.mark.parametrize("stratified", [False, True])
def test_every_object_is_tested_in_exactly_one_fold(stratified):
    objects = labelled(200)
    folds = [splits_by(objects, folds=5, fold=k, stratified=stratified) for k in range(5)]

    for s in objects:
        assert [found[s.id] for found in folds].count("test") == 1
    sizes = [list(found.values()).count("test") for found in folds]
    assert max(sizes) - min(sizes) <= (4 if stratified else 30)


def test_forward_in_time_training_ends_before_the_test_begins():
    found = splits_by(labelled(100), by="time", validation_from=60, test_from=80)

    assert [found[f"o{k}"] for k in (0, 59, 60, 79, 80, 99)] == [
        "train",
        "train",
        "validation",
        "validation",
        "test",
        "test",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "time"}, "need each other"),
        ({"test_from": 3}, "need each other"),
        ({"by": "time", "test_from": 3, "validation_from": 4}, "must not come after"),
        ({"by": "time", "test_from": 3, "stratified": True}, "neither stratified nor folds"),
        ({"by": "group", "stratified": True}, "either by: group or stratified"),
        ({"folds": 3, "fold": 3}, "fold 3 is not among the 3 folds"),
    ],
)
def test_split_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SplitOptions(**options)


def test_the_text_of_the_rule():
    def words(**options):
        return Splitter("set", SplitOptions(**options), 0.1, 0.2).rule_text()

    assert words() == (
        "recorded test stays test; of recorded train, 0.1 goes to validation; without a record, 0.2 "
        "goes to test and 0.1 of the rest to validation; by sha256 of '<data set>:<id>'"
    )
    assert words(stratified=True).endswith("; by class and order of delivery")
    assert words(by="group").endswith("; by sha256 of '<data set>:<group>'")
    assert words(folds=5, fold=2).startswith("fold 2 of 5 is test, 0.1 of each other fold")
    assert words(by="time", test_from=8) == (
        "by the last observation: test from 8, validation from 8, train before"
    )
