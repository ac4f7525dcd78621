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
from roma_core.model.packing import Segments
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


def test_channel_masks_read_the_channel_from_its_axis():
    with pytest.raises(ValueError, match="channel_axis"):
        new_autoencoder(mask_strategy="channel")
    model = new_autoencoder(mask_strategy="channel", channel_axis=1, n_pos_dims=2, mask_ratio=0.5)
    positions = torch.stack((torch.arange(12.0), torch.arange(12.0) // 6))[None]
    packed, _, _ = model.pack(torch.randn(1, 12, 2, 1, 1), positions, None)
    hidden = draw_mask(packed, model.config, 0, 0).masked.hidden_rows.tolist()
    assert hidden in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])
