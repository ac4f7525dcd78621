"""Series with defects are refused by name or repaired and counted; drops take exactly their fraction."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_core.data import DataError, StoredDataset
from roma_core.data.cleaning import check_dropped, keep_mask, n_to_drop
from roma_core.data.manifest import Repairs
from tests.core.hand_made import HandMade, built, series

GOOD = series("good", 8, "x", seed=1)
OTHER = series("other", 8, "y", seed=2)


def at(positions, name="odd", **changes):
    n = len(positions)
    column = np.array(positions, dtype=float)[:, None]
    return series(name, n, "x", seed=3, positions=column, **changes)


def stored(folder, *odd, **repair):
    dataset = StoredDataset(built(folder, GOOD, OTHER, *odd, repair=repair))
    return dataset, dataset.manifest.repairs


def test_observations_out_of_order_are_sorted_and_counted(tmp_path):
    odd = at([3, 1, 2])

    dataset, repairs = stored(tmp_path, odd)

    assert repairs == Repairs(series_sorted=1)
    positions, values = dataset.raw(2)
    assert positions[:, 0].tolist() == [1, 2, 3]
    assert np.array_equal(values, odd.values[[1, 2, 0]])
    kept, none = stored(tmp_path / "kept", odd, unsorted="keep")
    assert kept.raw(2)[0][:, 0].tolist() == [3, 1, 2] and none is None
    with pytest.raises(DataError, match="'odd': observation 1 comes before the one it follows"):
        stored(tmp_path / "refused", odd, unsorted="refuse")


def test_equal_positions_are_refused_or_made_one(tmp_path):
    odd = at([5, 0, 5, 5])

    with pytest.raises(DataError, match="'odd' repeats a position, 2 times in all, the first at"):
        stored(tmp_path, odd)
    first, repairs = stored(tmp_path / "first", odd, duplicates="first")
    assert repairs == Repairs(series_sorted=1, duplicate_observations=2)
    assert np.array_equal(first.raw(2)[1], odd.values[[1, 0]])
    mean, _ = stored(tmp_path / "mean", odd, duplicates="mean")
    np.testing.assert_allclose(mean.raw(2)[1][1], odd.values[[0, 2, 3]].mean(axis=0), rtol=1e-6)
    assert len(stored(tmp_path / "all", odd, duplicates="keep")[0].raw(2)[1]) == 4


def test_one_time_in_two_bands_is_no_copy(tmp_path):
    axes = (*HandMade().axes, HandMade().axes[0].model_copy(update={"name": "band"}))
    both = series("s", 4, positions=np.array([[0.0, 1], [0, 0], [1, 0], [1, 1]]))
    source = HandMade(series=(both,), axes=axes, classes=("x",))

    path = built(tmp_path, source=source)

    assert StoredDataset(path).manifest.repairs is None


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_numbers_that_are_none_are_refused_or_left_out(tmp_path, bad):
    values = GOOD.values.copy()
    values[2, 1] = bad
    odd = series("odd", 8, "x", seed=4, values=values)

    with pytest.raises(DataError, match=r"'odd': values hold .* at observation 2, column 1"):
        stored(tmp_path, odd)
    dataset, repairs = stored(tmp_path / "dropped", odd, not_finite="drop")
    assert repairs == Repairs(observations_not_finite=1)
    assert np.array_equal(dataset.raw(2)[1], np.delete(values, 2, axis=0))


def test_an_empty_series_is_refused_or_left_out(tmp_path):
    nothing = series("nothing", 0)
    only_nan = series("only-nan", 2, values=np.full((2, 2), np.nan, np.float32))

    with pytest.raises(DataError, match="'nothing' has no observations"):
        stored(tmp_path, nothing)
    dataset, repairs = stored(tmp_path, nothing, only_nan, empty="drop", not_finite="drop")
    assert dataset.ids == ["good", "other"]
    assert repairs == Repairs(empty_series_dropped=2, observations_without_values=2)


def test_options_without_repairs_keep_the_version(tmp_path):
    plain, repairs = stored(tmp_path / "a")
    allowed, _ = stored(tmp_path / "b", not_finite="drop", duplicates="mean", empty="drop")

    assert repairs is None and plain.path.name == allowed.path.name


def test_a_series_of_one_and_one_of_100_000_points_are_stored(tmp_path):
    dataset, _ = stored(tmp_path, series("long", 100_000, seed=5), series("single", 1, seed=6))

    assert dataset.lengths.tolist() == [8, 8, 100_000, 1]
    assert dataset.sample(2)["values"].shape == (100_000, 2, 1, 1)


def test_groups_come_with_all_series_or_with_none(tmp_path):
    grouped = StoredDataset(
        built(tmp_path, series("a", group="g1"), series("b", label="y", group="g2", seed=1))
    )
    assert grouped.groups == ["g1", "g2"]
    assert stored(tmp_path / "none")[0].groups is None
    with pytest.raises(DataError, match="series 'b' has the group None, others are different"):
        built(tmp_path, series("a", group="g1"), series("b", label="y"))


@given(
    n=st.integers(1, 500),
    percent=st.integers(0, 99),
    seed=st.integers(0, 2**40),
    name=st.text(min_size=1, max_size=20),
)
def test_a_drop_takes_exactly_its_fraction_and_never_all(n, percent, seed, name):
    stays = keep_mask(n, percent / 100, seed, name)

    assert stays.shape == (n,)
    assert (~stays).sum() == Fraction(percent, 100) * n // 1
    assert stays.any()
    assert np.array_equal(stays, keep_mask(n, percent / 100, seed, name))


def test_every_observation_is_dropped_equally_often():
    stays = np.array([keep_mask(10, 0.3, 0, f"object-{k}") for k in range(4000)])  # (4000, 10)

    dropped = 1 - stays.mean(axis=0)

    assert np.abs(dropped - 0.3).max() < 0.03  # 4 standard errors
    together = (~stays[:, 0] & ~stays[:, 1]).mean()
    assert abs(together - 3 / 10 * 2 / 9) < 0.02  # pairs too: uniform without replacement


def test_seed_and_id_both_choose():
    first = keep_mask(100, 0.5, 0, "a")

    assert not np.array_equal(first, keep_mask(100, 0.5, 1, "a"))
    assert not np.array_equal(first, keep_mask(100, 0.5, 0, "b"))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_outside_the_unit_interval_is_refused(rate):
    with pytest.raises(ValueError, match="drop rate must be in"):
        n_to_drop(10, rate)


def test_a_drop_that_drops_nothing_is_an_error():
    with pytest.raises(DataError, match="drops nothing: the longest series has 3"):
        check_dropped(0.3, np.array([3, 2, 1]), 6)


def test_a_drop_of_another_count_is_an_error():
    assert check_dropped(0.3, np.array([10, 20]), 21) == 9
    with pytest.raises(DataError, match="should drop 9 observations, it dropped 0"):
        check_dropped(0.3, np.array([10, 20]), 30)
