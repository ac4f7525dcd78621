"""Masks: pure functions of seed, epoch and sample, exact in number, fair."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from roma_core import (
    RoMAForPreTrainingConfig,
)
from roma_core.hashing import hash_ints
from roma_core.model.masking import draw_mask, hidden_count, sample_hidden
from roma_core.model.packing import PackedBatch, Segments
from tests.core.model.small_models import new_autoencoder


def test_hash_is_the_same_in_numpy_torch_and_python():
    ids = [0, 1, -1, 2**31, 2**40 + 5, -(2**63)]

    in_python = [hash_ints(7, i & (2**64 - 1), 3) for i in ids]

    assert hash_ints(7, np.array(ids), 3).tolist() == in_python
    assert hash_ints(7, torch.tensor(ids), 3).tolist() == in_python
    assert in_python == [
        2364050169,
        170808928,
        2524026660,
        3836744898,
        313326737,
        1119783607,
    ]  # pinned: masks and splits depend on it


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.15, 0.3, 0.5, 0.6, 0.75, 0.9])
def test_hidden_count_is_the_exact_ceiling(ratio):
    fraction = RoMAForPreTrainingConfig(mask_ratio=ratio).mask_fractions[0]
    lengths = np.arange(1, 3001)

    counts = hidden_count(lengths, fraction)

    exact = [min(math.ceil(n * Fraction(str(ratio))), n - 1) for n in lengths.tolist()]
    assert counts.tolist() == exact


@pytest.mark.parametrize("strategy", ["random", "block", "future"])
def test_a_series_has_the_same_mask_in_every_batch(strategy):
    lengths, ids = [5, 9, 1, 30], torch.tensor([3, 99, 7, 2**40])
    together = sample_hidden(Segments(lengths), ids, (Fraction(3, 10),) * 2, strategy, 1, 2)

    alone = [
        sample_hidden(Segments([n]), ids[b : b + 1], (Fraction(3, 10),) * 2, strategy, 1, 2)
        for b, n in enumerate(lengths)
    ]

    assert torch.equal(together, torch.cat(alone))
    assert [int(a.sum()) for a in alone] == [2, 3, 0, 9]


def test_a_range_of_ratios_hides_every_number_of_tokens_equally_often():
    lengths, ids = [50] * 2000 + [1, 2], torch.arange(2002)
    span = RoMAForPreTrainingConfig(mask_ratio=0.8, mask_ratio_max=0.94).mask_fractions

    hidden = sample_hidden(Segments(lengths), ids, span, "random", 0, 3)
    alone = sample_hidden(Segments([50]), ids[7:8], span, "random", 0, 3)
    next_epoch = sample_hidden(Segments(lengths), ids, span, "random", 0, 4)

    counts = hidden[: 2000 * 50].view(2000, 50).sum(1).bincount()
    assert counts[:40].sum() == 0 and len(counts) == 48  # 3 to 10 of 50 are seen
    assert (counts[40:] - 250).abs().max() < 5 * math.sqrt(2000 * 7 / 64)
    assert torch.equal(alone, hidden[7 * 50 : 8 * 50])
    assert hidden[-3:].tolist().count(True) == 1  # one token of each stays
    assert not torch.equal(counts, next_epoch[: 2000 * 50].view(2000, 50).sum(1).bincount())


def test_random_masks_are_fair_and_change_with_the_epoch():
    segments, ids = Segments([20] * 400), torch.arange(400)
    masks = [
        sample_hidden(segments, ids, (Fraction(1, 2),) * 2, "random", 0, epoch).view(400, 20)
        for epoch in (0, 1)
    ]
    assert (masks[0] != masks[1]).any(1).all()
    share = torch.stack(masks).float().mean((0, 1))  # of each place
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(800)


def test_channel_masks_hide_whole_channels_and_exactly_the_share():
    lengths = [12, 30, 1]
    segments, ids = Segments(lengths), torch.tensor([5, 6, 7])
    channel = torch.cat([torch.arange(n) % 3 for n in lengths])

    hidden = sample_hidden(segments, ids, (Fraction(1, 2),) * 2, "channel", 0, 0, channel)

    for b, n_hidden in enumerate((6, 15, 0)):
        mine, of = hidden[segments.ids == b], channel[segments.ids == b]
        assert int(mine.sum()) == n_hidden
        shares = [mine[of == c].float().mean() for c in of.unique()]
        assert sum(0 < s < 1 for s in shares) <= 1  # at most one channel is hidden in part
    again = sample_hidden(segments, ids, (Fraction(1, 2),) * 2, "channel", 0, 1, channel)
    assert not torch.equal(hidden, again)
    with pytest.raises(ValueError, match="each token's channel"):
        sample_hidden(segments, ids, (Fraction(1, 2),) * 2, "channel", 0, 0)


MIXTURE = {"random": 0.4, "channel": 0.2, "window": 0.2, "value": 0.2}
LAYOUTS = {
    "joint": {"n_channels": 3, "n_pos_dims": 1, "missing_values": True},
    "per_channel": {"n_channels": 1, "n_pos_dims": 2, "axis_categories": (0, 3)},
}


def visits(layout, ids, seed=0):
    """Series of 1 to 12 times, of which each has one to three of three channels."""
    tokens, positions, lengths = [], [], []
    for name in ids:
        g = np.random.default_rng([seed, name])
        values = g.normal(size=(1 + name % 12, 3))
        values[g.random(values.shape) < 0.3] = np.nan
        values[np.isnan(values).all(1), 0] = 0
        at = np.sort(g.uniform(0, 40, len(values)))
        rows, channels = np.nonzero(~np.isnan(values))
        joint = layout == "joint"
        tokens.append(values if joint else values[rows, channels][:, None])
        positions.append(at[:, None] if joint else np.stack([at[rows], channels], 1))
        lengths.append(len(tokens[-1]))
    return PackedBatch(
        torch.from_numpy(np.concatenate(tokens)).float(),
        torch.from_numpy(np.concatenate(positions)).float(),
        Segments(lengths),
        torch.tensor(ids),
    )


def hidden_numbers(batch, drawn):
    """``(T, P)`` bool of the batch before the draw, which must keep every number exactly once."""
    first = batch.segments.cu_seqlens[:-1].long()
    rows = first[drawn.segments.ids] + drawn.index_in_series
    observed = ~drawn.tokens.isnan()
    assert torch.equal(batch.positions[rows], drawn.positions)
    np.testing.assert_array_equal(drawn.tokens[observed], batch.tokens[rows][observed])
    times = torch.zeros(batch.tokens.shape, dtype=int).index_add(0, rows, observed.long())
    assert torch.equal(times == 1, ~batch.tokens.isnan()) and times.max() == 1
    assert observed.any(1).all()
    hidden = torch.zeros(batch.tokens.shape, dtype=bool)
    mine = drawn.masked.hidden_rows
    hidden[rows[mine]] = observed[mine]
    return hidden


@pytest.mark.parametrize("layout", ["joint", "per_channel"])
@pytest.mark.parametrize("strategy", ["random", "value", "channel", "window", MIXTURE])
def test_every_strategy_hides_exactly_its_share(layout, strategy):
    config = RoMAForPreTrainingConfig(
        **LAYOUTS[layout], tubelet_size=(1, 1, 1), mask_ratio=0.4, mask_strategy=strategy
    )
    batch = visits(layout, range(40))
    drawn = draw_mask(batch, config, 1, 2)
    hidden, observed = hidden_numbers(batch, drawn), ~batch.tokens.isnan()
    if layout == "joint":
        assert drawn.masked.n_targets == pytest.approx(int(hidden.sum()) / 3)
    for b, n_tokens in enumerate(batch.segments.lengths):
        mine = batch.segments.ids == b
        gone, there = hidden[mine], observed[mine]
        alone = visits(layout, [b])
        assert torch.equal(hidden_numbers(alone, draw_mask(alone, config, 1, 2)), gone)
        by_number = layout == "joint" and strategy in ("value", "channel")
        count = int(gone.sum()) if by_number else int(gone.any(1).sum())
        n = int(there.sum()) if by_number else n_tokens
        if strategy != MIXTURE:
            assert count == hidden_count(np.array([n]), Fraction(2, 5))[0]
        assert (there & ~gone).any()  # something stays visible, also of a single observation
        channels = batch.positions[mine][:, 1] if layout == "per_channel" else None
        at = batch.positions[mine][:, 0]
        if strategy == "channel":
            parts = gone.T if channels is None else [gone[channels == c] for c in range(3)]
            of = there.T if channels is None else [there[channels == c] for c in range(3)]
            pairs = zip(parts, of, strict=True)
            assert sum(0 < int(x.sum()) < int(y.sum()) for x, y in pairs) <= 1
        if strategy == "window":
            shares = [gone[at == t].sum() / there[at == t].sum() for t in at.unique()]
            assert sum(0 < share < 1 for share in shares) <= 1
        if strategy in ("random", "window") and layout == "joint":
            assert torch.equal(gone, there & gone.any(1, keepdim=True))  # whole tokens
    again = draw_mask(batch, config, 1, 3)
    assert not torch.equal(hidden_numbers(batch, again), hidden)


def test_series_draw_their_strategy_by_its_weight():
    segments, ids = Segments([12] * 2000), torch.arange(2000)
    batch = PackedBatch(torch.zeros(24_000, 1), torch.zeros(24_000, 1), segments, ids)
    shape = {"tubelet_size": (1, 1, 1), "n_pos_dims": 1, "mask_ratio": 0.5}
    mixture = RoMAForPreTrainingConfig(**shape, mask_strategy={"future": 3, "random": 1})
    hidden = torch.zeros(24_000, dtype=bool)
    hidden[draw_mask(batch, mixture, 0, 0).masked.hidden_rows] = True
    n_future = int(hidden.view(2000, 12)[:, 6:].all(1).sum())
    assert abs(n_future - 1500) < 5 * math.sqrt(2000 * 3 / 16)
    # without a span of time a window is a random token
    window = RoMAForPreTrainingConfig(**shape, mask_strategy="window")
    random = RoMAForPreTrainingConfig(**shape)
    rows = [draw_mask(batch, one, 0, 0).masked.hidden_rows for one in (window, random)]
    assert torch.equal(*rows)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_strategy": "channel", "n_channels": 2}, "needs channel_axis.* or else tokens with"),
        ({"mask_strategy": "channel", "channel_axis": 3}, "needs channel_axis.*got 3"),
        ({"mask_strategy": {"value": 1}, "n_channels": 2}, "these have 2, all observed"),
        ({"mask_strategy": {}}, "at least 1 item"),
        ({"mask_strategy": {"random": 0}}, "greater than 0"),
        ({"mask_strategy": {"some": 1}}, "mask_strategy"),
    ],
)
def test_strategies_that_the_tokens_do_not_allow_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RoMAForPreTrainingConfig(tubelet_size=(1, 1, 1), **fields)


def test_a_mixture_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("ROMA_PRETRAIN_MASK_STRATEGY", '{"random": 0.5, "window": 0.5}')
    assert RoMAForPreTrainingConfig().mask_strategies == {"random": 0.5, "window": 0.5}
    monkeypatch.setenv("ROMA_PRETRAIN_MASK_STRATEGY", "window")
    assert RoMAForPreTrainingConfig().mask_strategies == {"window": 1.0}


def test_channel_masks_read_the_channel_from_its_axis():
    model = new_autoencoder(mask_strategy="channel", channel_axis=1, n_pos_dims=2, mask_ratio=0.5)
    positions = torch.stack((torch.arange(12.0), torch.arange(12.0) // 6))[None]
    packed, _, _ = model.pack(torch.randn(1, 12, 2, 1, 1), positions, None)
    hidden = draw_mask(packed, model.config, 0, 0).masked.hidden_rows.tolist()
    assert hidden in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
