"""Batches of series and of tokens: pure functions of seed, epoch and lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.sampler import (
    SeriesBatchSampler,
    TokenBatchSampler,
    lengths_of,
    make_sampler,
)
from tests.core.trainer.training_runs import Waves

LENGTHS = np.random.default_rng(0).integers(1, 60, 500)


def plan(tokens=600, lengths=LENGTHS, micro=600):
    return TokenBatchSampler(lengths, tokens, seed=3, micro_batch_size=micro)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=80),
    tokens=st.integers(60, 300),
    epoch=st.integers(0, 3),
)
def test_every_sample_is_in_one_batch_and_no_batch_is_empty_or_too_large(lengths, tokens, epoch):
    lengths = np.array(lengths)

    batches = plan(tokens, lengths).batches(epoch) if fits(lengths, tokens) else []

    if batches:
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
        assert len(batches) == plan(tokens, lengths).batches_per_epoch
        assert min(map(len, batches)) >= plan(tokens, lengths).min_samples >= 1
        assert max(lengths[b].sum() for b in batches) <= tokens + lengths.max()


def fits(lengths, tokens):
    try:
        plan(tokens, lengths)
    except ValueError:
        return False
    return True


def test_the_order_is_a_function_of_seed_and_epoch():
    first = [b.tolist() for b in plan().batches(1)]

    assert first == [b.tolist() for b in plan().batches(1)]
    assert first != [b.tolist() for b in plan().batches(2)]
    assert first != [b.tolist() for b in TokenBatchSampler(LENGTHS, 600, 4, 600).batches(1)]


def test_batches_hold_about_equally_many_tokens_of_similar_lengths():
    batches = plan().batches(0)

    tokens = np.array([LENGTHS[b].sum() for b in batches])
    assert np.abs(tokens - tokens.mean()).max() <= LENGTHS.max()
    inside = np.mean([LENGTHS[b].std() for b in batches])
    assert inside < 0.2 * LENGTHS.std()
    mean_lengths = [LENGTHS[b].mean() for b in batches]
    assert mean_lengths != sorted(mean_lengths)  # short and long batches take turns


def test_batches_of_a_model_that_normalises_over_them_have_all_lengths():
    sampler = plan()
    assert sampler.sorts
    sampler.sorts = False
    batches = sampler.batches(0)

    assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
    tokens = np.array([LENGTHS[b].sum() for b in batches])
    assert np.abs(tokens - tokens.mean()).max() <= LENGTHS.max()
    inside = np.mean([LENGTHS[b].std() for b in batches])
    assert inside > 0.8 * LENGTHS.std()
    assert [b.tolist() for b in batches] != [b.tolist() for b in sampler.batches(1)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_number_of_processes_shares_a_batch_exactly(world_size):
    some = plan(micro=150)
    for batch in some.batches(0):
        if len(batch) < world_size:
            with pytest.raises(ValueError, match="cannot be shared by"):
                some.shard(batch, 0, world_size)
            continue
        shares = [some.shard(batch, rank, world_size) for rank in range(world_size)]
        assert sorted(np.concatenate([np.concatenate(s) for s in shares])) == sorted(batch)
        tokens = [sum(LENGTHS[m].sum() for m in share) for share in shares]
        assert max(tokens) - min(tokens) <= 2 * LENGTHS.max()
        assert max(LENGTHS[m].sum() for s in shares for m in s) <= 1.5 * 150 + LENGTHS.max()


def test_a_series_longer_than_a_batch_is_refused_with_a_way_out():
    lengths = np.array([5, 5, 5000, 5])

    with pytest.raises(ValueError, match=r"longest series has 5,000 tokens.*augment_crop_tokens"):
        plan(100, lengths)
    with pytest.raises(ValueError, match="too few for 40 processes"):
        make_sampler(TrainerConfig(tokens_per_batch=50), Lengths(LENGTHS), 40)
    few = TrainerConfig(tokens_per_batch=30, augment_crop_tokens=10)
    assert make_sampler(few, Lengths(lengths), 1).batches_per_epoch == 1


class Lengths:
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)


def test_the_plan_follows_the_settings_and_freezes():
    by_series = make_sampler(TrainerConfig(batch_size=8), Lengths(LENGTHS), 2)
    by_tokens = TrainerConfig(tokens_per_batch=300, gradient_accumulation_steps=2)

    assert isinstance(by_series, SeriesBatchSampler) and by_series.global_batch_size == 16
    assert (
        make_sampler(
            TrainerConfig(batch_size=8), Lengths(LENGTHS), 2, global_batch_size=5
        ).batches_per_epoch
        == 100
    )
    assert make_sampler(by_tokens, Lengths(LENGTHS), 3).global_batch_size == 1800
    again = make_sampler(by_tokens, Lengths(LENGTHS), 1, global_batch_size=1800)
    first = make_sampler(by_tokens, Lengths(LENGTHS), 3)
    assert [b.tolist() for b in again.batches(4)] == [b.tolist() for b in first.batches(4)]


def test_lengths_are_counted_where_the_set_does_not_say_them():
    assert lengths_of(Waves()).tolist() == [4 + 3 * (i % 13) for i in range(40)]


def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own():
    sampler = SeriesBatchSampler(n_samples=43, global_batch_size=10, seed=3)
    epochs = [np.concatenate(sampler.batches(e)) for e in range(3)]
    assert all(sorted(e) == list(range(43)) for e in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert [len(b) for b in sampler.batches(0)] == [9, 9, 9, 8, 8]
    assert sampler.batches(0)[0].tolist() == SeriesBatchSampler(43, 10, 3).batches(0)[0].tolist()


@pytest.mark.parametrize("world_size, micro", [(1, 9), (2, 4), (3, 1), (4, 8)])
def test_processes_and_micro_batches_share_a_step_exactly(world_size, micro):
    sampler = SeriesBatchSampler(43, 10, 3, micro)
    batch = sampler.batches(0)[0]
    shares = [sampler.shard(batch, rank, world_size) for rank in range(world_size)]
    flat = [i for share in shares for part in share for i in part]
    assert sorted(flat) == sorted(batch)
    assert max(len(part) for share in shares for part in share) <= micro


def test_more_processes_than_samples_is_refused():
    with pytest.raises(ValueError, match="2 samples cannot be shared by 3 processes"):
        SeriesBatchSampler(43, 10, 3, 8).shard(np.array([4, 5]), 0, 3)
