"""Items of a data set on their way into a batch: labels per token, dates, padding; augmentation as a
pure function of seed, epoch and sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    Trainer,
    TrainerConfig,
)
from roma_core.data.store import RaggedBatch
from roma_core.schema import (
    Channel,
    ChannelNormalisation,
    DataSchema,
    Normaliser,
    PositionAxis,
)
from roma_core.trainer.dataloader import (
    ChannelDrop,
    Collate,
    Crop,
    CustomAugmentation,
    Drop,
    Jitter,
    UnknownDrop,
    augmentations_of,
)
from roma_core.trainer.evaluator import classify
from tests.core.trainer.training_runs import Waves


def config(**changes):
    values = {
        "encoder_config": EncoderConfig(d_model=24, nhead=2, depth=1),
        "tubelet_size": (1, 1, 1),
        "n_channels": 1,
        "n_pos_dims": 1,
        "dim_output": 2,
    }
    return RoMAForClassificationConfig(**values | changes)


def item(n, label, positions=None, pad_mask=None):
    return {
        "values": np.arange(n, dtype=np.float32)[:, None, None, None],
        "positions": np.arange(n, dtype=np.float32)[None] if positions is None else positions,
        "label": label,
    } | ({} if pad_mask is None else {"pad_mask": pad_mask})


def test_labels_of_tokens_stay_with_their_tokens_and_padding_goes():
    collate = Collate(config(pooling="token"), seed=0)
    items = [
        (0, 0, item(4, np.array([10, 11, 12, 13]))),
        (0, 1, item(3, np.array([20, 21, 22]), pad_mask=np.array([False, True, False]))),
    ]
    batch = collate(items)
    assert batch.labels.tolist() == [20, 22, 10, 11, 12, 13]  # the shortest series first
    assert batch.tokens[:, 0].tolist() == [0, 2, 0, 1, 2, 3]
    with pytest.raises(
        ValueError, match="sample 7: label must have one entry for each of 3 tokens"
    ):
        collate([(0, 7, item(3, 1))])


def test_labels_of_tokens_stay_with_their_tokens_when_some_are_dropped_or_cropped():
    chosen = (Crop(0.5), Drop(0.6))
    batch = Collate(config(pooling="token"), 0, chosen)(
        [(3, k, item(40, 100 * k + np.arange(40))) for k in range(4)]
    )
    assert batch.labels.shape[0] == batch.tokens.shape[0] < 4 * 40
    owner = batch.sample_ids[batch.segments.ids]
    assert torch.equal(batch.labels, 100 * owner + batch.tokens[:, 0].long())

    own = CustomAugmentation(lambda tokens, positions, random: (tokens, positions))
    with pytest.raises(ValueError, match="the data set's own augmentations"):
        Collate(config(pooling="token"), 0, (own,))


def test_own_augmentations_keep_the_covariates():
    own = CustomAugmentation(lambda tokens, positions, random: (tokens, positions))
    batch = Collate(config(covariates=(0,)), 0, (own,))([(0, 0, item(3, 1) | {"covariates": [2]})])
    assert batch.covariates.tolist() == [[2.0]]


def test_a_label_vector_of_a_series_is_left_whole_by_padding():
    batch = Collate(config(problem_type="regression"), seed=0)(
        [(0, 0, item(3, np.array([0.5, 1.5]), pad_mask=np.array([False, False, True])))]
    )
    assert batch.labels.tolist() == [[0.5, 1.5]]


def test_dates_are_anchored_exactly_or_refused():
    dates = 60_000.001 + np.array([[0.0, 0.004, 0.25]])
    axis = PositionAxis(name="time", unit="d", anchor="first", scale=0.5)
    batch = Collate(config(position_axes=(axis,)), seed=0)([(0, 0, item(3, 0, dates))])
    expected = torch.from_numpy((dates - dates[0, 0]).T / 0.5)
    torch.testing.assert_close(batch.positions.double(), expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="position_axes"):
        Collate(config(), seed=0)([(0, 0, item(3, 0, dates))])


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_head_on_every_token_trains_and_is_evaluated_token_by_token(tmp_path, batch_size):
    """Position reconstruction without values: the label of each token is where it stands."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    items = []
    for n in random.integers(3, 9, 24):
        at = random.uniform(0, 3, (1, n)).astype(np.float32)
        items.append(
            item(n, (at[0] > 1.5).astype(np.int64), at) | {"values": np.ones((n, 1, 1, 1))}
        )
    model = RoMAForClassification(config(pooling="token"))
    settings = {"epochs": 60, "base_lr": 3e-3, "batch_size": 8, "checkpoint_dir": tmp_path / "run"}
    trainer = Trainer(TrainerConfig(**settings, log_wandb=False))

    end = trainer.train(train_dataset=items[:16], test_dataset=items[16:], model=model)

    assert end.metrics["eval/accuracy"] > 0.9
    outputs = classify(model, items[16:], Collate(model.config, 0), batch_size)
    expected = np.concatenate([one["label"] for one in items[16:]])
    assert (outputs.labels == expected).all() and len(outputs.logits) == len(expected)
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(outputs.logits), torch.from_numpy(outputs.labels)
    )
    assert outputs.loss == pytest.approx(float(loss), rel=1e-5)


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


def test_a_dropped_channel_is_missing_where_values_may_be():
    values = np.float32([[1, 2], [3, np.nan], [np.nan, 4], [5, 6]])
    batch = RaggedBatch.of([values], [np.arange(4.0)[:, None]], [3])
    dropped = ChannelDrop(0.9, 2, missing_values=True)(batch, seed=0, epoch=0).values
    (gone,) = np.flatnonzero(np.isnan(dropped[[0, 3]]).all(0))
    assert np.isnan(dropped[:, gone]).sum() == 3  # but for the observation that had no other value
    np.testing.assert_array_equal(dropped[:, 1 - gone], values[:, 1 - gone])


def test_a_dropped_channel_of_single_values_loses_its_tokens():
    positions = np.column_stack([np.arange(6.0), [0, 1, 2, 0, 1, 2]])
    batch = RaggedBatch.of([np.ones((6, 1), np.float32)], [positions], [3])
    for epoch in range(20):
        left = ChannelDrop(0.6, 3, channel_axis=1)(batch, seed=0, epoch=epoch).positions
        for channel in np.unique(left[:, 1]):
            assert (left[:, 1] == channel).sum() == 2
        assert len(left) >= 2


def test_categories_become_unknown_and_covariates_missing_whole():
    ward = {"unit": "1", "categories": ("a", "b"), "encoding": "embedding", "unknown": True}
    axes = (PositionAxis(name="t", unit="s"), PositionAxis(name="ward", **ward))
    scales = [ChannelNormalisation(mean=m, std=s) for m, s in ((10, 2), (100, 5), (40, 50))]
    schema = DataSchema(
        channels=(Channel(name="x", unit="1"),),
        axes=axes,
        normalise_by="ward",
        normalisation=tuple(scales),
    )
    n = 500
    positions = np.tile([[0.0, 0], [1, 1], [2, 0]], (n, 1))
    delivered = np.tile(np.float32([[11], [105], [9]]), (n, 1))
    values = Normaliser(schema).normalise(delivered, positions)
    batch = RaggedBatch(
        values, positions, np.full(n, 3), np.arange(n), covariates=np.ones((n, 2), np.float32)
    )
    drop = UnknownDrop(0.2, schema)
    dropped = drop(batch, 0, 1)
    wards = dropped.positions[:, 1].reshape(n, 3)
    assert np.array_equal(wards[:, 0], wards[:, 2])  # both observations of ward a
    for found in ((wards[:, :2] == 2).mean(0), np.isnan(dropped.covariates).mean(0)):
        assert np.abs(found - 0.2).max() < 5 * np.sqrt(0.16 / n)
    back = Normaliser(schema).denormalise(dropped.values, dropped.positions)
    np.testing.assert_allclose(back, delivered, rtol=1e-5)
    kept = dropped.positions[:, 1] != 2
    np.testing.assert_array_equal(dropped.values[kept], values[kept])
    assert batch.positions[:, 1].max() == 1 and not np.isnan(batch.covariates).any()
    alone = drop(batch.reorder(np.array([7])), 0, 1)
    np.testing.assert_array_equal(alone.positions, dropped.positions[21:24])
    np.testing.assert_array_equal(alone.covariates, dropped.covariates[7:8])
    assert not np.array_equal(drop(batch, 0, 2).positions, dropped.positions)


def test_settings_and_the_data_set_choose_the_augmentations():
    class Own(Waves):
        augmentations = (lambda tokens, positions, random: (tokens[:0], positions[:0]),)

    stack = EncoderConfig(d_model=16, nhead=2, depth=1)
    config = RoMAForClassificationConfig(
        encoder_config=stack, tubelet_size=(1, 1, 1), n_channels=2, n_pos_dims=1, dim_output=2
    )
    assert augmentations_of(TrainerConfig(), config) == ()
    with_covariates = config.model_copy(update={"covariates": (0,)})
    assert augmentations_of(TrainerConfig(), with_covariates) == (UnknownDrop(0.05),)
    chosen = augmentations_of(
        TrainerConfig(augment_drop_rate=0.1, augment_crop_tokens=9, augment_jitter_position=1),
        config,
        Own(),
    )
    assert chosen == (Crop(0, 9), Drop(0.1), Jitter(0, 1), CustomAugmentation(Own.augmentations[0]))
    with pytest.raises(ValueError, match="left 0 tokens and 0 positions of sample 7"):
        Collate(config, 0, chosen)([(0, 7, Own()[7])])
