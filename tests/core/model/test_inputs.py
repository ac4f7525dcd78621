"""Missing values, categories and covariates as inputs of both models."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from roma_core import RoMAForClassificationConfig, RoMAForPreTrainingConfig
from roma_core.model.embedding import interpolated, with_observed_flags
from roma_core.model.masking import draw_mask
from roma_core.model.packing import pack
from roma_core.model.pretraining import PaddedReconstruction
from tests.core.model.small_models import autoencoder, classifier

CATEGORIES = {"n_pos_dims": 2, "axis_categories": (0, 3)}
COVARIATES = (0, 2)  # a number and a category of two
NAN = float("nan")


def batch(lengths=(6, 3), missing=False, seed=0):
    """Padded series on a time axis and an axis of three categories, with covariates."""
    g = torch.Generator().manual_seed(seed)
    n, longest = len(lengths), max(lengths)
    values = torch.randn(n, longest, 2, 1, 1, generator=g)
    if missing:
        hole = torch.rand(n, longest, generator=g) < 0.6
        values[:, :, 1, 0, 0] = values[:, :, 1, 0, 0].masked_fill(hole, NAN)
    time = torch.rand(n, 1, longest, generator=g) * 40
    category = torch.randint(3, (n, 1, longest), generator=g).float()
    pad_mask = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    covariates = torch.tensor([[0.7, 1.0], [NAN, NAN]])[:n]
    return values, torch.cat((time, category), dim=1), pad_mask, covariates


INPUTS = [
    {"missing_values": missing, "covariates": covariates, **categories}
    for missing, covariates, categories in itertools.product(
        (False, True), ((), COVARIATES), ({}, CATEGORIES)
    )
]


@pytest.mark.parametrize(("use_cls", "neighbours"), [(True, 0), (False, 2)])
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_exported_program_equals_the_model(inputs, use_cls, neighbours):
    model = classifier(
        **inputs, use_cls=use_cls, neighbours=neighbours, pooling="cls" if use_cls else "mean"
    )
    program = model.export().module()
    for lengths in ([6, 3], [4]):
        values, positions, pad_mask, covariates = batch(lengths, inputs["missing_values"])
        given = covariates if inputs["covariates"] else None
        with torch.no_grad():
            expected, _ = model(values, positions, pad_mask, covariates=given)
            arguments = (values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
            logits = program(*arguments, *(() if given is None else (given,)))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("neighbours", "predict_variance"), [(0, True), (2, False)])
@pytest.mark.parametrize("inputs", INPUTS)
def test_the_served_reconstruction_equals_that_of_training(inputs, neighbours, predict_variance):
    """Whole tokens are hidden, and with missing values single numbers too."""
    strategy = "value" if inputs["missing_values"] else "random"
    model = autoencoder(
        **inputs,
        neighbours=neighbours,
        predict_variance=predict_variance,
        use_cls=predict_variance,
        mask_strategy=strategy,
        mask_ratio=0.4,
    )
    program = PaddedReconstruction(model)
    if inputs == INPUTS[-1]:  # an export takes seconds
        program = model.export_reconstruction().module()
    for lengths in ([6, 3], [5]):
        values, positions, pad_mask, covariates = batch(lengths, inputs["missing_values"])
        given = covariates if inputs["covariates"] else None
        packed, order, _ = model.pack(values, positions, pad_mask, given)
        drawn = draw_mask(packed, model.config, 3, 0)
        masked = drawn.masked
        seen, hidden = (
            torch.nn.utils.rnn.pad_sequence(rows.split(segments.lengths), True, -1)
            for rows, segments in (
                (masked.visible_rows, masked.visible),
                (masked.hidden_rows, masked.hidden),
            )
        )
        arguments = [drawn.tokens[seen], drawn.positions[seen], seen >= 0]
        arguments[0][seen < 0] = 7.0  # padding may hold any number
        arguments += [drawn.positions[hidden], hidden >= 0]
        with torch.no_grad():
            expected = model.predict_hidden(drawn, masked)
            plain = model.reconstruct_hidden(drawn, masked)
            found = program(*arguments, *(() if given is None else (given[order],)))
        mean, variance = found if predict_variance else (found, None)
        torch.testing.assert_close(mean[hidden >= 0], plain, rtol=1e-5, atol=1e-5)
        if variance is not None:
            own = expected[:, 2:].clamp(-14, 14).exp()
            torch.testing.assert_close(variance[hidden >= 0], own, rtol=1e-5, atol=1e-5)


def test_a_missing_number_is_not_a_zero():
    model = classifier(missing_values=True)
    values, positions, pad_mask, _ = batch(missing=True)
    logits, _ = model(values, positions, pad_mask)
    zeros, _ = model(values.nan_to_num(0.0), positions, pad_mask)
    assert not torch.allclose(logits, zeros)


def test_missing_numbers_are_interpolated_between_observed_ones_of_the_same_series():
    values, positions, pad_mask, _ = batch([9, 7, 5], missing=True, seed=3)
    values[2, :, 1] = NAN  # a channel without any value
    valid = ~pad_mask
    series = torch.arange(3)[:, None].expand_as(valid)[valid]
    tokens, time = values.flatten(2)[valid], positions[:, 0][valid]
    shuffled = torch.randperm(len(time), generator=torch.Generator().manual_seed(0))
    filled = interpolated(
        with_observed_flags(tokens)[shuffled], time[shuffled, None], series[shuffled]
    )
    filled = torch.zeros_like(filled).index_copy(0, shuffled, filled)
    torch.testing.assert_close(filled[:, 2:], (~tokens.isnan()).float())
    for one in range(3):
        at = time[series == one].numpy()
        for channel in range(2):
            column = tokens[series == one, channel].numpy()
            seen = ~np.isnan(column)
            order = at[seen].argsort()
            expected = np.zeros(len(at))
            if seen.any():
                expected = np.interp(at, at[seen][order], column[seen][order])
            found = filled[series == one, channel].double().numpy()
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (filled[series == 2, 1] == 0).all()


@pytest.mark.parametrize("neighbours", [0, 2])
def test_what_is_hidden_does_not_show_through_what_is_missing(neighbours):
    model = autoencoder(missing_values=True, neighbours=neighbours).eval()
    values, positions, pad_mask, _ = batch(missing=True)
    mask = torch.zeros_like(pad_mask)
    mask[0, [1, 2, 4]] = mask[1, 0] = True
    expected, _ = model(values, positions, pad_mask, mask=mask)
    changed = torch.where(mask[..., None, None, None], values.nan_to_num(3.0) + 5, values)
    found, _ = model(changed, positions, pad_mask, mask=mask)
    torch.testing.assert_close(found, expected)


def test_the_reconstruction_loss_counts_observed_numbers_only():
    model = autoencoder(missing_values=True)
    values, positions, pad_mask, _ = batch(missing=True)
    mask = torch.zeros_like(pad_mask)
    mask[0, [1, 2, 4]] = mask[1, 0] = True
    logits, loss = model(values, positions, pad_mask, mask=mask)
    predicted = torch.cat((logits[0, :3], logits[1, :1]))
    true = values[mask][:, :, 0, 0]
    observed = true.isfinite()
    assert 0 < int(observed.sum()) < observed.numel()
    expected = ((predicted - true)[observed] ** 2).mean()
    torch.testing.assert_close(loss, expected)

    packed, _, rows = pack(values, positions, pad_mask, model.config)
    packed = packed.with_mask(mask.reshape(-1)[rows], missing_values=True)
    assert model.loss_count(packed) == pytest.approx(float(observed.sum()) / 2)


STRATEGIES = [
    ({"missing_values": True}, strategy) for strategy in ("random", "value", "channel", "window")
] + [(CATEGORIES, strategy) for strategy in ("channel", "window")]


@pytest.mark.parametrize(("inputs", "strategy"), STRATEGIES)
def test_no_hidden_number_shows_and_padding_does_not_count(inputs, strategy):
    model = autoencoder(**inputs, mask_strategy=strategy, mask_ratio=0.5, neighbours=2)
    values, positions, pad_mask, _ = batch(missing="missing_values" in inputs)
    packed, order, _ = model.pack(values, positions, pad_mask)
    drawn = draw_mask(packed, model.config, 0, 0)
    with torch.no_grad():
        answers = model.predict_hidden(drawn, drawn.masked)
        true = drawn.tokens[drawn.masked.hidden_rows]
        asked = ~true.isnan()
        _, loss = model(drawn)
        torch.testing.assert_close(loss, ((answers - true)[asked] ** 2).mean())

        # the same draw after the hidden numbers have changed
        first = packed.segments.cu_seqlens[:-1].long()
        rows = (first[drawn.segments.ids] + drawn.index_in_series)[drawn.masked.hidden_rows]
        changed = packed.tokens.clone()
        changed[rows] = torch.where(asked, true + 100, changed[rows])
        other = draw_mask(replace(packed, tokens=changed), model.config, 0, 0)
        assert (other.tokens[other.masked.hidden_rows] - true)[asked].min() > 99
        torch.testing.assert_close(model.predict_hidden(other, other.masked), answers)

        wide = [torch.nn.functional.pad(values, (0, 0) * 3 + (0, 3)), positions, pad_mask]
        wide[1] = torch.nn.functional.pad(positions, (0, 3))
        wide[2] = torch.nn.functional.pad(pad_mask, (0, 3), value=True)
        results = []
        for arguments in ((values, positions, pad_mask), wide, (packed,)):
            torch.manual_seed(3)
            results.append(model(*arguments))
    for _, loss in results:
        torch.testing.assert_close(loss, results[0][1])
    torch.testing.assert_close(results[0][0], results[1][0])
    by_row = results[0][0][order].flatten(0, 1)
    torch.testing.assert_close(by_row[by_row.abs().sum(1) > 0], results[2][0])


def test_gradients_are_finite_where_numbers_are_missing():
    for variance in (False, True):
        model = autoencoder(missing_values=True, predict_variance=variance).train()
        values, positions, pad_mask, _ = batch(missing=True)
        _, loss = model(values, positions, pad_mask)
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_decoder_knows_which_category_it_reconstructs():
    model = autoencoder(**CATEGORIES)
    values, positions, pad_mask, _ = batch([6])
    times = positions[:, :1, :3] + 0.5
    answers = [
        model.reconstruct(
            values,
            positions,
            pad_mask,
            query_positions=torch.cat((times, torch.full_like(times, category)), dim=1),
        ).mean
        for category in (0, 1, 2)
    ]
    for a, b in itertools.combinations(answers, 2):
        assert not torch.allclose(a, b)


def test_a_category_is_no_distance():
    """Renaming the categories in model and data alike changes nothing."""
    model = classifier(**CATEGORIES)
    values, positions, pad_mask, _ = batch()
    before, _ = model(values, positions, pad_mask)
    renamed = torch.tensor([2, 0, 1])
    with torch.no_grad():
        table = model.categories.tables[0].weight
        table.copy_(table[renamed.argsort()])
    positions[:, 1] = renamed[positions[:, 1].long()].float()
    after, _ = model(values, positions, pad_mask)
    torch.testing.assert_close(before, after)


def test_covariates_and_their_absence_change_the_answer():
    model = classifier(covariates=COVARIATES)
    values, positions, pad_mask, _ = batch([6])
    answers = [
        model(values, positions, pad_mask, covariates=torch.tensor([row]))[0]
        for row in ([0.7, 1.0], [0.7, 0.0], [1.4, 1.0], [NAN, 1.0], [0.7, NAN])
    ]
    for a, b in itertools.combinations(answers, 2):
        assert not torch.allclose(a, b)


def test_inputs_that_do_not_fit_are_refused():
    values, positions, pad_mask, covariates = batch(missing=True)
    with pytest.raises(ValueError, match="values must be finite at real tokens"):
        classifier()(values, positions, pad_mask)
    with pytest.raises(ValueError, match="must have a finite number, and NaN where"):
        classifier(missing_values=True)(torch.full_like(values, NAN), positions, pad_mask)
    values = values.nan_to_num(0.0)
    with pytest.raises(ValueError, match=r"indices of its 3 categories, 0 to 2; .* to 3"):
        classifier(**CATEGORIES)(values, positions + torch.tensor([[0.0], [1.0]]), pad_mask)
    with pytest.raises(
        ValueError, match="0 covariates of each series, but the model was built for 2"
    ):
        classifier(covariates=COVARIATES)(values, positions, pad_mask)
    with pytest.raises(
        ValueError, match="2 covariates of each series, but the model was built for 0"
    ):
        classifier()(values, positions, pad_mask, covariates=covariates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axis_categories": (0, 3), "n_pos_dims": 1}, "describes 2 axes"),
        ({"axis_categories": (3,), "n_pos_dims": 1}, "at least one, such as time, must be rotary"),
        ({"covariates": (0,), "pos_encoding": "absolute"}, "reproduces published models"),
    ],
)
def test_configurations_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RoMAForClassificationConfig(**changes)


def test_standardised_targets_need_whole_tubelets():
    with pytest.raises(ValueError, match="excludes missing_values"):
        RoMAForPreTrainingConfig(missing_values=True, normalize_targets=True, n_channels=4)
