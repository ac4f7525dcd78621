"""Reconstructions are judged by what was hidden, all of it and nothing else."""

import numpy as np
import pytest
import torch

from roma_core.data import StoredDataset, build_dataset
from roma_core.evaluation.job import embed
from roma_core.evaluation.reconstruction import (
    clean_columns,
    evaluate_reconstruction,
    joint_values,
    linear_interpolation,
    mask_all_but,
    mask_as_trained,
    reconstruct,
    reconstruct_examples,
    train_mean,
)
from roma_core.model.config import EncoderConfig, RoMAForPreTrainingConfig
from roma_core.model.pretraining import RoMAForPreTraining
from roma_core.schema import Channel
from roma_core.trainer.job import data_fields
from tests.core.evaluation.tables import reconstruction_table
from tests.core.hand_made import HandMade, config_of, series

STACK = EncoderConfig(d_model=16, nhead=2, depth=1)
MIXTURE = {"channel": 1, "window": 1, "value": 1}
CLEAN = (Channel(name="clean_a", unit="V"), Channel(name="clean_b", unit="V"))


def model_of(**changes):
    torch.manual_seed(0)
    shape = {"tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1, "mask_ratio": 0.5}
    return RoMAForPreTraining(
        RoMAForPreTrainingConfig(
            **{"encoder_config": STACK, "decoder_config": STACK, **shape, **changes}
        )
    )


def made(folder, *all_series, targets=CLEAN):
    source = HandMade(series=all_series, targets=targets)
    built = build_dataset(config_of(source=source), folder, folder, progress=False)
    return StoredDataset(built).split("test")


def noisy(name, n, seed, split="test", label="x"):
    one = series(name, n, label, split, seed)
    clean = np.round(one.values)
    return series(name, n, label, split, seed, targets=clean)


@pytest.mark.parametrize("hide", ["mask_as_trained", "mask_all_but"])
def test_what_is_hidden_is_what_the_mask_says_and_is_told_as_it_was_observed(tmp_path, hide):
    test = made(
        tmp_path, *(noisy(f"s{n}", n, n) for n in (3, 12, 7, 30)), noisy("t", 9, 0, "train")
    )
    model = model_of()

    table = reconstruct(
        model,
        test,
        mask_as_trained(model.config, 0) if hide == "mask_as_trained" else mask_all_but(5, 0),
        2,
    )

    hidden = (
        {3: 2, 12: 6, 7: 4, 30: 15} if hide == "mask_as_trained" else {3: 0, 12: 7, 7: 2, 30: 25}
    )
    assert np.bincount(table.series, minlength=4).tolist() == [hidden[n] for n in test.lengths]
    for k, place, true, clean in zip(
        table.series, table.index, table.true, table.clean, strict=True
    ):
        assert np.array_equal(test.dataset.raw(int(test.indices[k]))[1][place], true)
        assert np.array_equal(test.dataset.targets(int(test.indices[k]))[place], clean)
    alone = reconstruct(model, test, mask_all_but(5, 0), 1)
    together = reconstruct(model, test, mask_all_but(5, 0), 64)
    assert np.allclose(alone.predicted, together.predicted, atol=1e-5)


def test_no_hidden_value_reaches_the_model(tmp_path):
    one, train = noisy("s", 20, 1), noisy("t", 20, 2, "train")
    model = model_of()
    first = reconstruct(model, made(tmp_path / "a", one, train), mask_all_but(6, 0), 8)
    changed = one.values.copy()
    changed[first.index] = 1e6
    other = series("s", 20, "x", "test", 1, values=changed, targets=one.targets)

    second = reconstruct(model, made(tmp_path / "b", other, train), mask_all_but(6, 0), 8)

    assert (second.true == 1e6).all()
    assert np.array_equal(first.index, second.index)
    assert np.array_equal(first.predicted, second.predicted)


def test_a_model_that_looks_is_caught(tmp_path):
    class Peeping(RoMAForPreTraining):
        def predict_hidden(self, batch, masked):
            return batch.tokens[masked.hidden_rows]

    model = model_of()
    model.__class__ = Peeping
    test = made(tmp_path, noisy("s", 20, 1), noisy("t", 20, 2, "train"))

    with pytest.raises(RuntimeError, match="reads hidden values"):
        reconstruct(model, test, mask_as_trained(model.config, 0), 8)


def test_what_cannot_be_judged_is_refused(tmp_path):
    test = made(tmp_path, noisy("s", 4, 1), noisy("t", 20, 2, "train"))

    with pytest.raises(ValueError, match="normalize_targets=False"):
        reconstruct(model_of(normalize_targets=True), test, mask_all_but(2, 0), 8)
    with pytest.raises(ValueError, match="with 3 channels and 0 position axes of its own"):
        reconstruct(model_of(n_channels=3), test, mask_all_but(2, 0), 8)
    with pytest.raises(ValueError, match="nothing is hidden in 1 series of 4 to 4 observations"):
        reconstruct(model_of(), test, mask_all_but(4, 0), 8)
    of_other_data = model_of()
    other = made(tmp_path, noisy("s", 4, 1), noisy("t", 20, 3, "train")).dataset.schema
    of_other_data.data_schema = other.model_dump(mode="json")
    with pytest.raises(
        ValueError,
        match="normalisation of this data set and of the data the model was trained on differ",
    ):
        reconstruct(of_other_data, test, mask_all_but(2, 0), 8)


def test_predictions_are_in_the_units_of_the_data_and_so_are_deviations(tmp_path):
    big = [series(f"s{k}", 20, "x", split, k) for k, split in ((0, "test"), (1, "train"))]
    for one in big:
        one.values[:] = 1000 + 50 * one.values
    test, model = made(tmp_path, *big, targets=()), model_of(predict_variance=True)
    torch.nn.init.zeros_(model.head.linear.weight)
    torch.nn.init.zeros_(model.head.linear.bias)  # mean 0, deviation 1, standardised

    table = reconstruct(model, test, mask_all_but(6, 0), 8)

    of_train = test.dataset.raw(1)[1] if test.indices[0] == 0 else test.dataset.raw(0)[1]
    assert table.clean is None
    assert np.allclose(table.predicted, of_train.mean(0), rtol=1e-5)
    assert np.allclose(table.std, of_train.std(0), rtol=1e-4)
    assert np.allclose(train_mean(table, test).predicted, table.predicted)


def test_straight_lines_join_what_was_seen(tmp_path):
    values = np.array([[0, 9], [5, 5], [20, 4], [5, 5], [40, 8]], np.float32)
    one = series("s", 5, "x", "test", values=values, targets=values)
    test = made(tmp_path, one, noisy("t", 20, 2, "train"))
    table = reconstruction_table(
        ids=["s"], series=np.zeros(2, int), index=np.array([1, 3]), true=values[[1, 3]]
    )

    assert linear_interpolation(table, test).predicted.tolist() == [[10, 6.5], [30, 6]]


def test_clean_values_are_known_by_the_names_of_the_targets(tmp_path):
    def columns(*names):
        targets = tuple(Channel(name=name, unit="V") for name in names)
        values = np.zeros((4, len(names)), np.float32)
        one = series("s", 4, split="train", targets=values if names else None)
        schema = made(tmp_path, one, targets=targets).dataset.schema
        assert clean_columns(schema.model_copy(update={"target_level": "series"})) is None
        return clean_columns(schema)

    assert columns("clean_b", "angle", "clean_a") == [2, 0]
    assert columns("clean_a") is None and columns("clean") is None and columns() is None


@pytest.mark.parametrize(
    ("layout", "strategy"),
    [
        ("joint", "random"),
        ("joint", MIXTURE),
        ("per_channel", "channel"),
    ],
)
def test_what_was_never_observed_is_not_compared_and_has_no_baseline(tmp_path, layout, strategy):
    def gappy(name, n, seed, split="test"):
        one = series(name, n, "x", split, seed)
        one.values[np.random.default_rng(seed).random((n, 2)) < 0.4] = np.nan
        one.values[0] = one.values[-1] = [1 + seed, 100 * seed]
        return one

    source = HandMade(
        series=[gappy(f"s{k}", 20, k, "train" if k > 3 else "test") for k in range(9)]
    )
    config = config_of(source=source, layout=layout)
    dataset = StoredDataset(build_dataset(config, tmp_path, tmp_path, progress=False))
    test = dataset.split("test")
    changes = {"predict_variance": True, "mask_strategy": strategy}
    model = model_of(**data_fields(dataset.schema) | changes)
    model.data_schema = dataset.schema.model_dump(mode="json")

    table = reconstruct(model, test, mask_as_trained(model.config, 0), 3)

    rows = np.arange(len(table.series))
    for k in range(len(test)):
        mine = rows[table.series == k]
        true = joint_values(dataset, int(test.indices[k]))[table.index[mine]]
        asked = ~np.isnan(table.true[mine])  # of some tokens only some numbers were hidden
        assert strategy == MIXTURE or np.array_equal(asked, ~np.isnan(true))
        np.testing.assert_array_equal(table.true[mine][asked], true[asked])
    for numbers in (table.predicted, table.std):
        np.testing.assert_array_equal(np.isnan(numbers), np.isnan(table.true))
    line = linear_interpolation(table, test).predicted
    at, values = dataset.raw(int(test.indices[0]))
    values = joint_values(dataset, int(test.indices[0]))
    hidden = table.index[table.series == 0]
    for c in (0, 1):
        known = ~np.isnan(values[:, c])
        asked = ~np.isnan(table.true[table.series == 0, c])
        known[hidden[asked]] = False
        if not known.any():
            continue  # the whole channel was hidden
        expected = np.interp(at[hidden, 0], at[known, 0], values[known, c])
        np.testing.assert_allclose(line[table.series == 0, c][asked], expected[asked], rtol=1e-6)
    found = evaluate_reconstruction(table, test)
    assert 0.45 < found.mean_hidden_fraction < 0.6
    metrics = found.overall
    assert {"mse", "linear_mse", "mean_mse", "coverage_95"} <= metrics.keys()
    constants = dataset.schema.normalisation
    mean, std = (np.array([getattr(c, name) for c in constants]) for name in ("mean", "std"))
    true = (table.true - mean) / std
    by_hand = [
        1 - np.nansum((true - (x - mean) / std) ** 2) / np.nansum(true**2)
        for x in (table.predicted, line)
    ]
    values = [metrics[name].value for name in ("r2", "linear_r2", "gain_r2")]
    np.testing.assert_allclose(values, [*by_hand, by_hand[0] - by_hand[1]], atol=1e-5)
    width = metrics["gain_r2"].high - metrics["gain_r2"].low  # paired
    assert width < sum(metrics[name].high - metrics[name].low for name in ("r2", "linear_r2"))
    assert all(np.isfinite(estimate.value) for estimate in metrics.values())
    others = model_of(**data_fields(dataset.schema), predict_variance=True)
    np.testing.assert_array_equal(embed(model, test, 3), embed(others, test, 3))
    examples = reconstruct_examples(model, test)
    assert examples[0].values.shape == examples[0].visible.shape == (len(examples[0].positions), 2)
    answers = model.reconstruct(
        torch.zeros(1, 2, model.config.n_channels, 1, 1),
        torch.zeros(1, model.config.n_pos_dims, 2),
        query_positions=torch.ones(model.config.n_pos_dims, 3),
    )
    assert answers.mean.shape == answers.std.shape == (1, 3, dataset.schema.n_values)
