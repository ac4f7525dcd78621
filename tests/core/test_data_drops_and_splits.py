"""Which observations are dropped and where an object belongs: pure functions of what they name."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_core.data.dropping import assert_dropped, kept, n_dropped
from roma_core.data.errors import DataError
from roma_core.data.splits import split_of

ids = st.text(min_size=1, max_size=20)
recorded = st.sampled_from([None, "train", "test"])
shares = st.floats(0, 0.9)


@given(n=st.integers(1, 500), percent=st.integers(0, 99), seed=st.integers(0, 2**40), name=ids)
def test_a_drop_takes_exactly_its_share_and_never_all(n, percent, seed, name):
    stays = kept(n, percent / 100, seed, name)

    assert stays.shape == (n,)
    assert (~stays).sum() == Fraction(percent, 100) * n // 1
    assert stays.any()
    assert np.array_equal(stays, kept(n, percent / 100, seed, name))


def test_every_observation_is_dropped_equally_often():
    stays = np.array([kept(10, 0.3, 0, f"object-{k}") for k in range(4000)])  # (4000, 10)

    dropped = 1 - stays.mean(axis=0)

    assert np.abs(dropped - 0.3).max() < 0.03  # 4 standard errors
    together = (~stays[:, 0] & ~stays[:, 1]).mean()
    assert abs(together - 3 / 10 * 2 / 9) < 0.02  # pairs too: uniform without replacement


def test_seed_and_id_both_choose():
    first = kept(100, 0.5, 0, "a")

    assert not np.array_equal(first, kept(100, 0.5, 1, "a"))
    assert not np.array_equal(first, kept(100, 0.5, 0, "b"))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(ValueError, match="drop rate must be in"):
        n_dropped(10, rate)


def test_a_drop_that_drops_nothing_is_an_error():
    with pytest.raises(DataError, match="takes nothing: the longest series has 3"):
        assert_dropped(0.3, np.array([3, 2, 1]), 6)


def test_a_drop_of_another_count_is_an_error():
    assert assert_dropped(0.3, np.array([10, 20]), 21) == 9
    with pytest.raises(DataError, match="should take 9 observations, it took 0"):
        assert_dropped(0.3, np.array([10, 20]), 30)


@given(name=ids, split=recorded, validation=shares, test=shares)
def test_recorded_assignments_are_kept(name, split, validation, test):
    found = split_of("set", name, split, validation, test)

    assert (found == "test") == (split == "test") or split is None
    assert found == split_of("set", name, split, validation, test)


@given(names=st.lists(ids, unique=True, min_size=1, max_size=30), more=st.lists(ids, max_size=30))
def test_a_delivery_of_more_objects_moves_none(names, more):
    before = {name: split_of("set", name, None, 0.2, 0.3) for name in names}

    after = {name: split_of("set", name, None, 0.2, 0.3) for name in [*more, *names]}

    assert {name: after[name] for name in names} == before


@given(name=ids, low=shares, high=shares)
def test_a_larger_test_share_takes_nothing_out_of_test(name, low, high):
    low, high = sorted((low, high))
    if split_of("set", name, None, 0.1, low) == "test":
        assert split_of("set", name, None, 0.1, high) == "test"


def test_shares_are_met():
    splits = [split_of("set", f"object-{k}", None, 0.25, 0.2) for k in range(20_000)]

    assert splits.count("test") / 20_000 == pytest.approx(0.2, abs=0.012)
    assert splits.count("validation") / 20_000 == pytest.approx(0.8 * 0.25, abs=0.012)


def test_another_name_splits_anew():
    names = [f"object-{k}" for k in range(100)]

    assert [split_of("a", n, None, 0.5, 0) for n in names] != [
        split_of("b", n, None, 0.5, 0) for n in names
    ]
