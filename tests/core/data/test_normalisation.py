"""Values and positions on their way to the model and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma_core.data import StoredDataset
from roma_core.schema import (
    AxisScaleFit,
    Channel,
    ChannelFit,
    ChannelTransform,
    DataError,
    DataSchema,
    Normaliser,
    PositionAxis,
)
from tests.core.hand_made import HandMade, built, config_of, series

CHANNELS = (Channel(name="flux", unit="mJy"), Channel(name="angle", unit="rad"))
TRANSFORMS = (ChannelTransform(transform="arcsinh", transform_scale=10), ChannelTransform())


def normalise_positions(positions, axes):
    schema = DataSchema(channels=(), axes=tuple(axes), normalisation=())
    return Normaliser(schema).normalise_positions(positions)


def fit(chunks):
    fit = ChannelFit([repr(channel.name) for channel in CHANNELS], TRANSFORMS, n_values=2)
    for chunk in chunks:
        fit.add(chunk, np.empty((len(chunk), 0)))
    return fit.result()


def fitted_on(*chunks):
    normalisation = fit(chunks)
    axes = (PositionAxis(name="time", unit="day"),)
    return DataSchema(channels=CHANNELS, axes=axes, normalisation=normalisation)


def some_values(n=500, seed=0):
    values = np.random.default_rng(seed).normal([100, -3], [1000, 0.5], size=(n, 2))
    return values.astype(np.float32)


def test_the_fitted_split_has_zero_mean_and_unit_spread():
    values = some_values()

    normalised = Normaliser(fitted_on(values)).normalise(values)

    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.std(axis=0), 1, atol=1e-6)


def test_the_transform_is_what_its_formula_says():
    values = np.array([[0, 1], [20, 3]], dtype=np.float32)

    schema = fitted_on(values)

    high = np.arcsinh(20 / 10)
    assert schema.normalisation[0].mean == pytest.approx(high / 2)
    assert schema.normalisation[0].std == pytest.approx(high / 2)
    assert schema.normalisation[1].mean == pytest.approx(2)
    np.testing.assert_allclose(Normaliser(schema).normalise(values), [[-1, -1], [1, 1]], rtol=1e-6)


@given(cuts=st.lists(st.integers(0, 500), max_size=6))
def test_chunks_do_not_matter(cuts):
    values = some_values()

    assert fit(np.split(values, sorted(cuts))) == fit([values])


def test_denormalise_is_the_way_back():
    values = some_values()
    schema = fitted_on(values)

    back = Normaliser(schema).denormalise(Normaliser(schema).normalise(values))

    np.testing.assert_allclose(back, values, rtol=1e-4, atol=1e-3)


def test_a_constant_channel_gets_unit_spread_and_a_warning():
    values = some_values()
    values[:, 1] = 0.1

    with pytest.warns(UserWarning, match="'angle' never changes"):
        schema = fitted_on(values[:100], values[100:])

    assert schema.normalisation[1].std == 1
    np.testing.assert_allclose(Normaliser(schema).normalise(values)[:, 1], 0, atol=1e-6)


def test_nothing_to_fit_on_is_an_error():
    with pytest.raises(DataError, match="train split has no observations"):
        fit([])


def test_anchored_dates_keep_their_fraction():
    days = np.array([[60000.001], [60000.0015], [60100.25]])  # float32 resolves 0.004 here

    anchored = normalise_positions(days, [PositionAxis(name="mjd", unit="d", anchor="first")])

    assert anchored.dtype == np.float32
    np.testing.assert_allclose(anchored[:, 0], [0, 0.0005, 100.249], rtol=1e-5)


def test_axes_are_offset_and_scaled_each_for_itself():
    axes = [
        PositionAxis(name="time", unit="d", anchor="first", offset=1, scale=10),
        PositionAxis(name="band", unit="1", offset=2, scale=0.5),
    ]

    anchored = normalise_positions(np.array([[30.0, 3.0], [20.0, 2.0]]), axes)

    np.testing.assert_allclose(anchored, [[0.9, 2.0], [-0.1, 0.0]], rtol=1e-6)


@given(shift=st.floats(-1e6, 1e6))
def test_an_anchored_series_does_not_notice_a_shift(shift):
    positions = np.array([[3.5], [1.25], [9.0]])
    axes = [PositionAxis(name="time", unit="d", anchor="first")]

    np.testing.assert_allclose(
        normalise_positions(positions + shift, axes),
        normalise_positions(positions, axes),
        atol=1e-6,
    )


def test_a_scale_is_the_usual_gap_or_what_spans_the_series():
    gaps, spans = AxisScaleFit(), AxisScaleFit()
    for start in range(9):
        gaps.add(start + np.array([4.0, 0, 2, 2, 6]))  # gaps of 2, in any order
        spans.add(np.array([0, 1, 2, 3, 60_000.0]))  # gaps of 1, but a long way

    assert gaps.scale() == 2
    assert spans.scale() == 10
    assert AxisScaleFit().scale() == 1


def test_an_automatic_scale_stands_in_the_manifest(tmp_path):
    far = series("far", 8, "x", "test", 2, positions=1000 * np.arange(8.0)[:, None])
    config = {"axes": {"t": {"scale": "auto", "anchor": "first"}}}
    near = series("near", 8, seed=3, positions=0.25 * np.arange(8.0)[:, None])

    source = HandMade(series=(near, far), classes=("x",))
    dataset = StoredDataset(built(tmp_path, source=source, **config))

    assert dataset.schema.axes[0].scale == 0.25  # of train alone
    with pytest.raises(ValueError, match="greater than 0"):
        config_of(near, axes={"t": {"scale": 0}})
