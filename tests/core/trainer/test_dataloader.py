"""Items of a user's own data set on their way into a batch: labels per token, dates, padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    Trainer,
    TrainerConfig,
)
from roma_core.schema import PositionAxis
from roma_core.trainer.augmentation import Crop, CustomAugmentation, Drop
from roma_core.trainer.dataloader import Collate
from roma_core.trainer.evaluator import classify


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
