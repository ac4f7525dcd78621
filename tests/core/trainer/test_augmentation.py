"""Augmentation: a pure function of seed, epoch and sample."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roma_core import EncoderConfig, RoMAForClassificationConfig
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
from tests.core.trainer.training_runs import Waves

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
