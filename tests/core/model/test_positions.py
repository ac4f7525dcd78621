"""Rotary embedding and position axes: where positions change the outputs, and where they do not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core import EncoderConfig
from roma_core.model.positions import RotaryEmbedding, pairs_per_axis, rotate
from roma_core.schema import DataSchema, Normaliser, PositionAxis
from tests.core.model import small_models

WIDTH = 24


def classifier(**changes):
    return small_models.classifier(**{"n_pos_dims": 1} | changes)


def scores(q, k, positions, rotation):
    turned = [rotate(x, rotation(positions)) for x in (q, k)]
    return torch.einsum("qhw,khw->hqk", *turned)


@settings(max_examples=25, deadline=None)
@given(
    n_axes=st.integers(1, 3), shift=st.floats(-100, 100), p=st.sampled_from([0.25, 0.5, 0.75, 1.0])
)
def test_attention_scores_do_not_change_when_an_axis_shifts(n_axes, shift, p):
    q, k = torch.randn(2, 5, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    positions = torch.rand(5, n_axes, generator=torch.Generator().manual_seed(1)) * 10
    rotation = RotaryEmbedding(WIDTH, range(n_axes), p)
    moved = positions.clone()
    moved[:, n_axes - 1] += shift
    torch.testing.assert_close(
        scores(q, k, positions, rotation), scores(q, k, moved, rotation), rtol=0, atol=3e-4
    )


@pytest.mark.parametrize("n_axes", [1, 2, 3])
@pytest.mark.parametrize("width", [WIDTH, 64, 42])
def test_an_axis_turns_its_own_fastest_pairs_and_no_others(n_axes, width):
    rotation = RotaryEmbedding(width, range(n_axes), 0.75)
    x = torch.randn(1, 1, width, generator=torch.Generator().manual_seed(0))
    start = 0
    for axis, pairs in enumerate(pairs_per_axis(width, n_axes)):
        at = torch.zeros(1, n_axes)
        assert torch.equal(rotate(x, rotation(at)), x)  # position 0 turns nothing
        at[0, axis] = 1.0
        turned = rotate(x, rotation(at))
        moved = (turned != x).view(-1, 2).any(1)  # of each pair
        rotating = int(0.75 * 2 * pairs) // 2
        expected = torch.zeros(width // 2, dtype=torch.bool)
        expected[start : start + rotating] = True
        assert torch.equal(moved, expected)
        norms = [y.view(-1, 2).norm(dim=1) for y in (x, turned)]
        torch.testing.assert_close(*norms)
        assert torch.equal(rotation.timescales[start], torch.ones(()))  # 1 radian per unit
        start += pairs


def test_without_rotating_pairs_positions_have_no_influence():
    model = classifier(p_rope_val=0.0)
    values = torch.randn(1, 6, 2, 1, 1)
    here, there = (model(values, torch.rand(1, 1, 6) * 50)[0] for _ in range(2))
    assert torch.equal(here, there)


def test_permuting_tokens_with_their_positions_changes_no_classification():
    model = classifier()
    values, positions = torch.randn(2, 7, 2, 1, 1), torch.rand(2, 1, 7) * 30
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    here = model(values, positions)[0]
    there = model(values[:, order], positions[:, :, order])[0]
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


def test_positions_of_any_number_type_agree():
    model = classifier()
    values, positions = torch.randn(2, 7, 2, 1, 1), torch.arange(14).view(2, 1, 7)
    logits = [
        model(values, positions.to(t))[0]
        for t in (torch.int64, torch.int16, torch.float32, torch.float64)
    ]
    assert all(torch.equal(logits[0], other) for other in logits)


def test_tables_keep_their_precision_in_a_16_bit_network():
    rotation = RotaryEmbedding(WIDTH, [0], 0.75)
    at = torch.tensor([[1001.0]])
    exact = rotation(at)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rotation(at), exact)
    halved = rotation.to(torch.bfloat16)  # a user casts the whole model
    torch.testing.assert_close(halved(at), exact, rtol=0, atol=1e-6)


MJD = 60_000.001 + torch.tensor([[0.0, 0.004, 0.25, 1.5, 300.125]], dtype=torch.float64)
TIME = PositionAxis(name="time", unit="d", anchor="first", scale=0.1)


def test_mjd_sized_times_lose_nothing():
    model = classifier(position_axes=(TIME,))
    values = torch.randn(1, 5, 2, 1, 1)

    batch, _, _ = model.pack(values, MJD[:, None], None)

    elapsed = (MJD - MJD[:, :1])[0] / 0.1
    torch.testing.assert_close(batch.positions[:, 0].double(), elapsed, rtol=1e-7, atol=1e-7)
    schema = DataSchema(channels=(), axes=(TIME,), normalisation=())
    by_data = Normaliser(schema).normalise_positions(MJD.T.numpy())  # as stored data sets do
    assert (batch.positions.numpy() == by_data).all()


def test_anchor_offset_and_scale_are_those_of_each_series_real_tokens():
    axes = (TIME.model_copy(update={"offset": 2.0}), PositionAxis(name="band", unit="1"))
    model = classifier(n_pos_dims=2, position_axes=axes)
    positions = torch.tensor([[[7.0, 5.0, 9.0], [2, 0, 1]], [[-1.0, 4.0, 8.0], [1, 1, 0]]])
    pad_mask = torch.tensor([[False, False, False], [True, False, False]])

    batch, order, _ = model.pack(torch.randn(2, 3, 2, 1, 1), positions, pad_mask)

    assert order.tolist() == [1, 0]
    expected = torch.tensor([[-20.0, 1], [20, 0], [0, 2], [-20, 0], [20, 1]])
    torch.testing.assert_close(batch.positions, expected)


def test_dates_that_float32_cannot_hold_are_refused():
    with pytest.raises(ValueError, match=r"axis 0 reach 60,300.*anchor='first'"):
        classifier()(torch.randn(1, 5, 2, 1, 1), MJD[:, None])


def test_axes_must_be_as_many_as_positions_have():
    with pytest.raises(ValueError, match=r"describes 2 axes \(time, time\), but n_pos_dims=1"):
        classifier(position_axes=(TIME, TIME))


@pytest.mark.parametrize("width, axes", [(64, 3), (42, 2), (30, 2), (15, 1)])
def test_any_head_width_can_be_shared_out_over_the_axes(width, axes):
    pairs = pairs_per_axis(width, axes)
    assert sum(pairs) == width // 2 and max(pairs) - min(pairs) <= 1
    stack = EncoderConfig(d_model=2 * width, nhead=2, depth=1)
    model = classifier(encoder_config=stack, n_pos_dims=axes)
    values, positions, pad_mask = small_models.padded_batch([7, 4], 8, axes)
    assert model(values, positions, pad_mask)[0].isfinite().all()
