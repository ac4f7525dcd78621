"""Missing values, the two layouts, categories and covariates, from a source to samples."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core.data import DataError, StoredDataset
from roma_core.data.layout import Grid, choose_layout, grid_of, melt, pivot
from roma_core.schema import Channel, Covariate, Normaliser, PositionAxis
from roma_core.sources.base import RawSeries
from tests.core.hand_made import HandMade, built, series

NAN = np.nan
CHANNELS = tuple(Channel(name=name, unit="V") for name in ("hr", "lab", "flag"))
BAND = PositionAxis(name="band", unit="index of g, r", categories=("g", "r"))


def gappy(name, n=12, missing=0.5, seed=0, split="train", **changes):
    """A series of three channels of very different scales, of which many values are missing."""
    g = np.random.default_rng([seed, n])
    values = g.normal(size=(n, 3)) * [1, 200, 0.01] + [0, 1000, 5]
    values[g.random((n, 3)) < missing] = NAN
    values[0] = [0.5, 900, 5.01]
    empty = np.isnan(values).all(1)
    values[empty, 0] = g.normal(size=empty.sum())  # an observation has a value
    fields = {"positions": np.arange(n, dtype=float)[:, None], "values": values.astype(np.float32)}
    return RawSeries(name, **{**fields, "label": "x", "recorded_split": split, **changes})


def some(n=8, **changes):
    splits = ("train", "train", "test")
    return [gappy(f"s{k}", 10 + k, seed=k, split=splits[k % 3], **changes) for k in range(n)]


def stored(folder, rows=None, **options):
    source = {
        name: options.pop(name)
        for name in ("channels", "axes", "layout_of_source", "covariates")
        if name in options
    }
    source["layout"] = source.pop("layout_of_source", "joint")
    made = HandMade(**{"series": tuple(rows or some()), "channels": CHANNELS, **source})
    return StoredDataset(built(folder, source=made, **options))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_melting_and_pivoting_are_inverse(seed, n, n_channels):
    g = np.random.default_rng(seed)
    values = g.normal(size=(n, n_channels)).astype(np.float32)
    values[g.random(values.shape) < 0.4] = NAN
    values[np.isnan(values).all(1), 0] = 1.0  # an observation has a value
    positions = np.column_stack([np.sort(g.permutation(n)), g.integers(0, 3, n)]).astype(float)
    at, melted, rows = melt(positions, values)
    assert len(melted) == (~np.isnan(values)).sum()
    np.testing.assert_array_equal(at[:, :-1], positions[rows])
    back = pivot(at, melted, n_channels)
    np.testing.assert_array_equal(back[0], positions)
    np.testing.assert_array_equal(back[1], values)


@pytest.mark.parametrize("wanted", ["joint", "per_channel"])
def test_both_layouts_hold_the_same_observed_values(tmp_path, wanted):
    rows = some()
    dataset = stored(tmp_path, rows, layout=wanted)
    assert dataset.schema.layout == wanted
    assert dataset.schema.missing_values == (wanted == "joint")
    for i, one in enumerate(rows):
        at, values = dataset.raw(i)
        if wanted == "per_channel":
            assert at[:, -1].max() <= 2
            at, values, _ = pivot(at, values, 3)
        np.testing.assert_array_equal(at, one.positions)
        np.testing.assert_array_equal(values, one.values)


def test_a_source_of_either_layout_gives_the_same_data_set(tmp_path):
    wide = some()
    long = []
    for one in wide:
        at, values, _ = melt(one.positions, one.values)
        long.append(RawSeries(one.id, at, values, one.label, one.recorded_split))
    for layout in ("joint", "per_channel"):
        sets = [
            stored(tmp_path / f"{layout}-{k}", rows, layout=layout, layout_of_source=delivered)
            for k, (rows, delivered) in enumerate(((wide, "joint"), (long, "per_channel")))
        ]
        assert sets[0].manifest.digest == sets[1].manifest.digest


@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_every_channel_has_a_normalisation_of_its_own(tmp_path, layout):
    dataset = stored(tmp_path, layout=layout)
    normalised = []
    for i in np.flatnonzero(dataset.splits == 0):
        at, values = dataset.raw(i)
        x = Normaliser(dataset.schema).normalise(values, at)
        sample = dataset.sample(int(i))
        np.testing.assert_array_equal(sample["values"][:, :, 0, 0], x)
        normalised.append(pivot(at, x, 3)[1] if layout == "per_channel" else x)
    observed = np.concatenate(normalised)
    np.testing.assert_allclose(np.nanmean(observed, axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(np.nanstd(observed, axis=0), 1, atol=1e-4)


@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_gathering_equals_single_samples(tmp_path, layout):
    covariates = (Covariate(name="age", unit="y"), Covariate(name="sex", categories=("f", "m")))
    rows = [gappy(f"s{k}", 9, seed=k, covariates=np.float32([40 + k, k % 2])) for k in range(6)]
    dataset = stored(tmp_path, rows, layout=layout, covariates=covariates)
    batch = dataset.gather(np.array([4, 1, 3]))
    for k, i in enumerate((4, 1, 3)):
        sample = dataset.sample(i)
        rows = slice(batch.starts[k], batch.starts[k] + batch.lengths[k])
        np.testing.assert_array_equal(batch.values[rows], sample["values"][:, :, 0, 0])
        np.testing.assert_array_equal(batch.positions[rows].T, sample["positions"])
        np.testing.assert_array_equal(batch.covariates[k], sample["covariates"])
    ages = dataset.gather(np.arange(6)).covariates[:, 0]
    assert ages.mean() == pytest.approx(0, abs=1e-6)
    assert batch.covariates[:, 1].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("n_channels", "missing", "layout", "reason"),
    [
        (3, 0.0, "joint", "every observation has all 3 channels"),
        (3, 0.8, "joint", "of 3 channels are observed at a time"),
        (60, 0.98, "per_channel", "of 60 channels are observed at a time"),
    ],
)
def test_auto_chooses_the_layout_by_what_is_observed_at_a_time(n_channels, missing, layout, reason):
    g, rows = np.random.default_rng(0), []
    for k in range(5):
        values = g.normal(size=(40, n_channels))
        values[g.random(values.shape) < missing] = np.nan
        values = values[~np.isnan(values).all(1)]
        rows.append(series(f"s{k}", len(values), values=values))
    channels = [Channel(name=f"c{k}", unit="1") for k in range(n_channels)]
    chosen, why = choose_layout("auto", HandMade(series=tuple(rows), channels=channels), rows)
    assert chosen == layout
    assert reason in why


def test_values_dropped_by_channel_are_the_same_in_both_layouts(tmp_path):
    sets = [
        stored(tmp_path / name, layout=name, drop_rate=0.5, drop_by="value")
        for name in ("joint", "per_channel")
    ]
    for i in range(len(sets[0])):
        (at, joint), long = sets[0].raw(i), sets[1].raw(i)
        np.testing.assert_array_equal(melt(at, joint)[0], long[0])
        np.testing.assert_array_equal(melt(at, joint)[1], long[1])
    irregularity = sets[0].manifest.irregularity
    assert irregularity.n_dropped == pytest.approx(
        0.5 * irregularity.n_observations_before, rel=0.1
    )
    assert irregularity == sets[1].manifest.irregularity


def test_an_axis_of_categories_gets_an_embedding_unless_rotary_is_chosen(tmp_path):
    rows = [
        series(f"s{k}", 6, positions=np.column_stack([np.arange(6.0), np.arange(6.0) % 2]))
        for k in range(4)
    ]
    axes = (PositionAxis(name="t", unit="s"), BAND)
    channels = HandMade().channels
    dataset = stored(tmp_path / "e", rows, axes=axes, channels=channels)
    assert [axis.encoding for axis in dataset.schema.axes] == ["rotary", "embedding"]
    source = HandMade(series=tuple(rows), axes=axes)
    rotary = StoredDataset(
        built(tmp_path / "r", source=source, axes={"band": {"encoding": "rotary"}})
    )
    assert [axis.encoding for axis in rotary.schema.axes] == ["rotary", "rotary"]
    per_band = stored(tmp_path / "n", rows, axes=axes, channels=channels, normalise_by="band")
    assert len(per_band.schema.normalisation) == 4
    normalised = np.concatenate([per_band.sample(i)["values"][:, :, 0, 0] for i in range(4)])
    bands = np.concatenate([per_band.raw(i)[0][:, 1] for i in range(4)])
    for band in (0, 1):
        np.testing.assert_allclose(normalised[bands == band].mean(0), 0, atol=1e-5)


def test_what_train_cannot_teach_is_one_sentence_before_training(tmp_path):
    never = [gappy(f"s{k}", seed=k, split="train" if k < 3 else "test") for k in range(5)]
    for one in never[:3]:
        one.values[:, 1] = NAN
    for layout in ("joint", "per_channel"):
        with pytest.raises(
            DataError, match="channel 'lab': no value is observed in the train split"
        ):
            stored(tmp_path, never, layout=layout)
    covariates = (Covariate(name="age"),)
    absent = [gappy(f"s{k}", seed=k, covariates=np.float32([NAN])) for k in range(3)]
    with pytest.raises(DataError, match="covariate 'age' is missing for every object of the train"):
        stored(tmp_path, absent, covariates=covariates)
    constant = [gappy(f"s{k}", seed=k, covariates=np.float32([3])) for k in range(3)]
    for one in constant:
        one.values[:, 2] = 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stored(tmp_path, constant, covariates=covariates, layout="per_channel")
    texts = [str(w.message) for w in caught]
    assert "channel 'flag' never changes in the train split; its std is set to 1" in texts
    assert "the covariate 'age' never changes in the train split; its std is set to 1" in texts


def test_missing_values_can_be_dropped_or_refused(tmp_path):
    rows = some()
    complete = sum(int((~np.isnan(one.values)).all(1).sum()) for one in rows)
    dataset = stored(tmp_path / "drop", rows, repair={"missing": "drop"})
    assert int(dataset.lengths.sum()) == complete
    assert not dataset.schema.missing_values
    repairs = dataset.manifest.repairs
    assert repairs.observations_without_values == sum(map(len, (o.values for o in rows))) - complete
    with pytest.raises(
        DataError, match=r"values hold nan .*set repair.missing to 'keep' or 'drop'"
    ):
        stored(tmp_path / "refuse", rows, repair={"missing": "refuse"})
    rows[1].values[3, 1] = np.inf
    with pytest.raises(DataError, match=r"values hold inf .*set repair.not_finite to 'drop'"):
        stored(tmp_path / "inf", rows)


def test_pivoting_loses_no_repeated_value_and_no_target():
    at = np.array([[1.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    values = np.arange(5, dtype=np.float32)[:, None]

    positions, joint, rows = pivot(at, values, 2)
    apart = pivot(at, values, 2, np.float32([[0], [0], [9], [0], [0]]))

    assert positions[:, 0].tolist() == [1, 1, 0] and rows.tolist() == [0, 1, 3]
    np.testing.assert_array_equal(joint, [[0, 2], [1, NAN], [4, 3]])
    np.testing.assert_array_equal(apart[1], [[0, NAN], [1, NAN], [NAN, 2], [4, 3]])


def banded(*bands, sex=0, split="train", **changes):
    n = len(bands)
    at = np.column_stack([np.arange(n), bands]).astype(float)
    values = np.random.default_rng(n).normal(size=(n, 2)).astype(np.float32)
    covariates = np.float32([sex])
    return series(f"s{n}{split}", n, "x", split, positions=at, values=values, covariates=covariates)


def bands_of(folder, *rows, axis=None, **options):
    axis = axis or PositionAxis(name="band", unit="-", categories=("g", "r", "i"))
    axes = (PositionAxis(name="t", unit="s"), axis)
    sex = (Covariate(name="sex", categories=("f", "m")),)
    return stored(folder, rows, axes=axes, covariates=sex, channels=HandMade().channels, **options)


def test_a_category_that_train_lacks_is_an_error_or_unknown(tmp_path):
    rows = banded(0, 2, 0, 2), banded(0, 1, 2, 1, 2, split="test")
    for normalise_by in (None, "band"):
        with pytest.raises(
            DataError, match=r"axis 'band': .* train split lacks, r; it has g, i: leave"
        ):
            bands_of(tmp_path, *rows, normalise_by=normalise_by)
    learned = PositionAxis(
        name="band", unit="-", categories=("g", "r", "i"), encoding="embedding", unknown=True
    )
    with pytest.warns(UserWarning, match="no observation of band r .*; they count as unknown"):
        dataset = bands_of(tmp_path, *rows, axis=learned, normalise_by="band")
    assert dataset.schema.axes[1].categories == ("g", "i")
    assert dataset.raw(1)[0][:, 1].tolist() == [0, 2, 1, 2, 1]
    assert len(dataset.schema.normalisation) == 2 * 3  # of g, i and unknown
    assert np.isfinite(dataset.sample(1)["values"]).all()
    with pytest.warns(UserWarning, match="the model cannot learn about it"):  # and need not
        assert bands_of(tmp_path, rows[0]).schema.axes[1].categories == ("g", "r", "i")
    with pytest.raises(
        DataError, match=r"covariate 'sex': .* train split lacks, m; it has f: leave"
    ):
        bands_of(tmp_path, banded(0, 1, 2), banded(0, 1, 2, sex=1, split="test"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "joint", "normalise_by": "t"}, "normalise_by: 't' is no axis with categories"),
        (
            {"layout": "per_channel", "normalise_by": "band"},
            "leave it out, or set layout to 'joint'",
        ),
        ({"axes": {"t": {"encoding": "embedding"}}}, "axes.t: .*'embedding' but no categories"),
        ({"axes": {"band": {"scale": 2}}}, "axes.band: .* leave anchor, offset and scale out"),
    ],
)
def test_settings_of_axes_that_cannot_be_are_one_sentence(tmp_path, options, message):
    rows = [gappy("s", positions=np.column_stack([np.arange(12.0), np.arange(12) % 2]))]
    axes = (PositionAxis(name="t", unit="s"), BAND)
    with pytest.raises(DataError, match=message):
        built(
            tmp_path, source=HandMade(series=tuple(rows), channels=CHANNELS, axes=axes), **options
        )
    fine = HandMade(series=tuple(rows), channels=CHANNELS, axes=axes)
    StoredDataset(built(tmp_path, source=fine, axes={"band": {"scale": "auto"}}))


def test_an_axis_of_the_user_cannot_be_that_of_channels(tmp_path):
    axes = (PositionAxis(name="channel", unit="s"),)
    with pytest.raises(DataError, match=r"the axis 'channel' has the name of .*another name"):
        stored(tmp_path, axes=axes, layout="per_channel")
    assert stored(tmp_path, axes=axes, layout="joint").schema.axes[0].name == "channel"


@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_series_and_rows_without_any_value(tmp_path, layout):
    nothing, one = gappy("nothing"), gappy("one")
    nothing.values[:] = NAN
    one.values[:] = NAN
    one.values[4, 1] = 7
    gaps = gappy("gaps")
    gaps.values[5:9] = NAN
    with pytest.raises(DataError, match="'nothing' has no observations with a value; omit it"):
        stored(tmp_path, [*some(), nothing], layout=layout)

    dataset = stored(
        tmp_path, [*some(), nothing, one, gaps], layout=layout, repair={"empty": "drop"}
    )

    assert dataset.ids[-2:] == ["one", "gaps"] and dataset.lengths[-2] == 1
    assert dataset.manifest.repairs.empty_series_dropped == 1
    assert dataset.manifest.repairs.observations_without_values == 12 + 11 + 4
    np.testing.assert_array_equal(dataset.joint(len(dataset) - 2)[1], [[NAN, 7, NAN]])
    assert len(dataset.joint(len(dataset) - 1)[0]) == 8


@pytest.mark.parametrize("layout", ["joint", "per_channel"])
def test_parts_in_the_joint_layout_are_the_series_one_by_one(tmp_path, layout):
    dataset = stored(tmp_path, layout=layout)

    parts = list(dataset.joint_parts(20, every=3))

    assert np.concatenate([part.ids for part in parts]).tolist() == [0, 3, 6]
    found = [one for part in parts for one in zip(part.ids, *part.split(), strict=True)]
    for i, values, positions in found:
        at, expected = dataset.joint(int(i))
        np.testing.assert_array_equal(positions, at)
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("step", [1.0, 0.01, 1 / 3, 86_400.0])
def test_a_grid_is_found_whatever_is_left_out_and_wherever_a_series_begins(step):
    g = np.random.default_rng(0)
    times = [
        np.sort(g.permutation(400)[:120]) * step * (1 + 1e-7 * k) + k * 0.37 * step
        for k in range(5)
    ]
    grid = grid_of(times)
    assert grid.step == pytest.approx(step, rel=1e-5)
    assert grid.fill == pytest.approx(0.3, abs=0.02)


def test_a_grid_is_found_from_a_limited_number_of_times():
    def times():
        yield np.arange(1.5e6)
        yield np.arange(1.5e6)
        raise AssertionError("no more are read")

    assert grid_of(times()) == Grid(1.0, 1.0)


def test_irregular_times_are_on_no_grid():
    g = np.random.default_rng(0)
    assert grid_of([np.sort(g.uniform(0, 50, 60)) for _ in range(4)]) is None
    assert grid_of([np.arange(50.0), np.append(np.arange(50.0), 20.5)[[*range(20), 50]]]) is None
    # two times that rounding alone tells apart are no step
    assert grid_of([np.append(np.arange(50.0), 20 + 1e-12)]) is None
    assert grid_of([np.zeros(1), np.ones(1)]) is None and grid_of([]) is None
