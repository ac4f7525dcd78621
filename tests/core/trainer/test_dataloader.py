"""Batches by tokens and augmentation: pure functions of seed, epoch, lengths and sample."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core import EncoderConfig, RoMAForClassification, RoMAForClassificationConfig, Trainer
from roma_core.data.ragged import RaggedBatch
from roma_core.trainer.augmentation import (
    ChannelDrop,
    Crop,
    CustomAugmentation,
    Drop,
    Jitter,
    augmentations_of,
)
from roma_core.trainer.config import TrainerConfig
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.sampler import (
    SeriesBatchSampler,
    TokenBatchSampler,
    lengths_of,
    make_sampler,
)

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


class Waves(torch.utils.data.Dataset):
    """Two classes of waves of very different lengths."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        t = np.linspace(0, 6, 5 + 3 * (i % 13))
        values = np.stack([np.sin(t * (1 + i % 2)), np.cos(t)], 1).astype(np.float32)
        item = {"values": values[:, :, None, None], "positions": t[None].astype(np.float32)}
        return {**item, "label": i % 2, "pad_mask": np.arange(len(t)) == 0}


def test_lengths_are_counted_where_the_set_does_not_say_them():
    assert lengths_of(Waves()).tolist() == [4 + 3 * (i % 13) for i in range(40)]


def test_training_by_tokens_learns_and_goes_on_where_it_stopped(tmp_path):
    def train(folder, **changes):
        torch.manual_seed(0)
        stack = EncoderConfig(d_model=16, nhead=2, depth=1)
        shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1, "dim_output": 2}
        model = RoMAForClassification(RoMAForClassificationConfig(encoder_config=stack, **shape))
        options = {
            "epochs": 16,
            "tokens_per_batch": 100,
            "base_lr": 0.01,
            "eval_every": 30,
            "save_every": 5,
            "augment_drop_rate": 0.2,
            "augment_jitter_std": 0.02,
            "augment_channel_drop_rate": 0.1,
            "augment_crop_rate": 0.2,
            "checkpoint_dir": folder,
        }
        trainer = Trainer(TrainerConfig(**{**options, **changes}))
        return trainer.train(Waves(), Waves(), model), model

    whole, expected = train(tmp_path / "whole")
    assert whole.status == "completed" and whole.metrics["eval/accuracy"] > 0.9
    stop_at(tmp_path / "parts", lambda: train(tmp_path / "parts"), step=12)
    resumed, found = train(tmp_path / "parts", num_dataset_workers=2)
    assert resumed.step == whole.step
    for a, b in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(a, b)


def stop_at(folder, train, step):
    """Kill a training between two steps, as a power cut would: its newest checkpoint is older."""
    from roma_core.trainer import trainer as loop

    optimise = loop.Trainer._optimise

    def until(trainer, *arguments):
        if trainer.step == step:
            raise KeyboardInterrupt
        return optimise(trainer, *arguments)

    loop.Trainer._optimise = until
    try:
        with pytest.raises(KeyboardInterrupt):
            train()
    finally:
        loop.Trainer._optimise = optimise
    assert [p.name for p in sorted(folder.iterdir())][-1] == "step-00000010"


TOKENS = torch.arange(24.0).reshape(12, 2)  # (N, C)
POSITIONS = torch.arange(24.0).reshape(12, 2)  # (N, D)
EVERY = [
    Drop(0.5),
    Crop(0.5),
    ChannelDrop(0.5, 2),
    Jitter(0.1, 0.1),
    CustomAugmentation(lambda tokens, positions, random: (tokens * random.normal(), positions)),
]


def on_one(augmentation, tokens, positions, seed=0, epoch=0, name=0):
    """Of one series alone."""
    one = RaggedBatch.of([tokens.numpy()], [positions.numpy()], [name])
    batch = augmentation(one, seed, epoch)
    assert batch.lengths.tolist() == [len(batch.values)] == [len(batch.positions)]
    return torch.from_numpy(batch.values), torch.from_numpy(batch.positions)


@pytest.mark.parametrize("augmentation", EVERY, ids=lambda a: type(a).__name__)
def test_an_augmentation_is_a_function_of_seed_epoch_and_sample(augmentation):
    before = TOKENS.clone()
    first = on_one(augmentation, TOKENS, POSITIONS, 1, 2, 3)

    for a, b in zip(first, on_one(augmentation, TOKENS, POSITIONS, 1, 2, 3), strict=True):
        assert torch.equal(a, b)
    for keys in (
        [(k, 2, 3) for k in range(9)],
        [(1, k, 3) for k in range(9)],
        [(1, 2, k) for k in range(9)],
    ):
        drawn = {on_one(augmentation, TOKENS, POSITIONS, *key)[0].numpy().tobytes() for key in keys}
        assert len(drawn) > 1
    assert torch.equal(TOKENS, before)  # the data set's own numbers stay


@pytest.mark.parametrize("augmentation", EVERY, ids=lambda a: type(a).__name__)
def test_a_batch_is_augmented_as_its_series_alone(augmentation):
    lengths, names = [5, 1, 12, 7], [-4, 9, 2**40, 0]
    parts = [TOKENS[:n].numpy() for n in lengths], [POSITIONS[:n].numpy() for n in lengths]

    together = augmentation(RaggedBatch.of(*parts, names), 1, 2).split()

    for k, name in enumerate(names):
        n = lengths[k]
        alone = on_one(augmentation, TOKENS[:n], POSITIONS[:n], 1, 2, name)
        for found, expected in zip((together[0][k], together[1][k]), alone, strict=True):
            assert torch.equal(torch.from_numpy(found), expected)


@given(epoch=st.integers(0, 500), n=st.integers(1, 12), rate=st.floats(0, 0.99))
def test_drop_and_crop_leave_at_least_one_and_at_most_what_they_may_take(epoch, n, rate):
    for augmentation in (Drop(rate), Crop(rate)):
        tokens, positions = on_one(augmentation, TOKENS[:n], POSITIONS[:n], epoch=epoch)
        assert len(tokens) >= max(1, n - int(rate * n))
        assert torch.equal(tokens, positions)  # of the same observations
        assert (torch.diff(tokens[:, 0]) > 0).all()  # in their order
    kept, _ = on_one(Crop(rate, max_tokens=4), TOKENS[:n], POSITIONS[:n], epoch=epoch)
    assert len(kept) <= 4 and torch.equal(torch.diff(kept[:, 0]), torch.full((len(kept) - 1,), 2.0))


def test_every_token_is_dropped_equally_often():
    kept = [on_one(Drop(0.8), TOKENS, POSITIONS, name=k)[0][:, 0] for k in range(3000)]

    often = torch.bincount((torch.cat(kept) / 2).long(), minlength=12) / 3000
    assert (often - 0.62).abs().max() < 0.04  # a mean of two fifths goes, rounded down


def test_a_dropped_channel_is_zero_everywhere_and_one_stays():
    tokens = torch.ones(5, 6)  # two tubelet numbers of three channels
    dropped = torch.stack(
        [on_one(ChannelDrop(0.9, 3), tokens, tokens, epoch=e)[0] for e in range(300)]
    )

    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert torch.equal(dropped[:, :, :3], dropped[:, :, 3:])
    assert (dropped[:, 0, :3].sum(dim=1) >= 1).all()
    share = dropped[:, 0, :3].mean(dim=0)
    assert (share > 0.25).all() and (share < 0.55).all()  # a tenth, or the one that has to stay


def test_jitter_is_normal_and_leaves_other_axes_alone():
    noisy, shifted = on_one(Jitter(0.5, 0.25), torch.zeros(4000, 2), torch.zeros(4000, 2))

    assert noisy.std().item() == pytest.approx(0.5, rel=0.05)
    assert abs(noisy.mean().item()) < 0.02 and (noisy.abs() > 1.0).float().mean() < 0.06
    assert abs(np.corrcoef(noisy.T.numpy())[0, 1]) < 0.05
    assert shifted[:, 0].std().item() == pytest.approx(0.25, rel=0.05)
    assert (shifted[:, 1] == 0).all()


def test_settings_and_the_data_set_choose_the_augmentations():
    class Own(Waves):
        augmentations = (lambda tokens, positions, random: (tokens[:0], positions[:0]),)

    assert augmentations_of(TrainerConfig(), 2) == ()
    chosen = augmentations_of(
        TrainerConfig(augment_drop_rate=0.1, augment_crop_tokens=9, augment_jitter_position=1),
        2,
        Own(),
    )
    assert chosen == (Crop(0, 9), Drop(0.1), Jitter(0, 1), CustomAugmentation(Own.augmentations[0]))
    stack = EncoderConfig(d_model=16, nhead=2, depth=1)
    config = RoMAForClassificationConfig(
        encoder_config=stack, tubelet_size=(1, 1, 1), n_channels=2, n_pos_dims=1, dim_output=2
    )
    with pytest.raises(ValueError, match="left 0 tokens and 0 positions of sample 7"):
        Collate(config, 0, chosen)([(0, 7, Own()[7])])
