"""Windows of a grid: tokens of several steps, whatever is missing, hidden, padded or out of order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roma_core import RoMAForClassification, RoMAForPreTraining, RoMAForPreTrainingConfig
from roma_core.model.masking import draw_mask
from roma_core.model.windows import BatchNorm, Stem, window_of
from roma_core.settings import SettingsError
from tests.core.model.small_models import autoencoder, classifier

GRID = {"n_pos_dims": 1, "window": 4, "grid_step": 0.5, "stem_width": 6, "stem_layers": 2}
GRID |= {"use_cls": False}
WITH_GAPS = {**GRID, "missing_values": True}


def series_on_a_grid(n_steps=23, gaps=True):
    """Values, positions and pad_mask: the third series lacks two windows and some steps."""
    g = torch.Generator().manual_seed(1)
    values = torch.randn(3, n_steps, 2, 1, 1, generator=g)
    positions = (torch.arange(n_steps) * 0.5 + 3).expand(3, 1, -1).clone()
    pad_mask = torch.zeros(3, n_steps, dtype=torch.bool)
    pad_mask[1, 9:] = True
    pad_mask[2, 4:13] = pad_mask[2, 15] = True
    if gaps:
        values[0, ::3, 0] = torch.nan
        values[2, 20:, 1] = torch.nan
    return values, positions, pad_mask


@pytest.mark.parametrize("changes", [{}, {"use_cls": True}, {"pooling": "token"}])
def test_packed_alone_shuffled_padded_and_exported_agree(changes):
    model = classifier(**WITH_GAPS | changes)
    values, positions, pad_mask = series_on_a_grid()
    padded = values.flatten(2).where(~pad_mask[..., None], torch.tensor(7.0))
    arguments = padded, positions.transpose(1, 2).contiguous(), ~pad_mask
    order = torch.randperm(values.shape[1])
    with torch.no_grad():
        expected, _ = model(values, positions, pad_mask)
        mixed, _ = model(values[:, order], positions[:, :, order], pad_mask[:, order])
        alone, _ = model(values[2:, ~pad_mask[2]], positions[2:, :, ~pad_mask[2]])
        outputs = {
            "padded": model.padded()(*arguments),
            "exported": model.export().module()(*arguments),
        }
    if model.config.pools == "token":
        real = (~pad_mask)[..., None]
        expected, mixed = expected * real, mixed[:, order.argsort()] * real
        outputs = {name: output * real for name, output in outputs.items()}
        torch.testing.assert_close(alone[0], expected[2, ~pad_mask[2]], rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(alone[0], expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)
    for name, output in outputs.items():
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_one_exported_program_takes_one_observation_and_many():
    model = classifier(**WITH_GAPS)
    program = model.export().module()
    for n in (1, 3, 40):
        values, positions = torch.randn(2, n, 2), torch.arange(n).expand(2, n)[..., None] * 0.5
        with torch.no_grad():
            expected, _ = model(values[..., None, None], positions.transpose(1, 2))
            logits = program(values, positions, torch.ones(2, n, dtype=torch.bool))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_reconstruction_agrees_packed_and_exported():
    model = autoencoder(**WITH_GAPS)
    values, positions, pad_mask = series_on_a_grid(gaps=False)
    queries = torch.tensor([[3.2, 5.0, 40.0]])
    with torch.no_grad():
        expected = model.reconstruct(values, positions, pad_mask, query_positions=queries).mean
        program = model.export_reconstruction().module()
        mean = program(
            values.flatten(2),
            positions.transpose(1, 2).contiguous(),
            ~pad_mask,
            queries.T.expand(3, -1, -1).contiguous(),
            torch.ones(3, 3, dtype=torch.bool),
        )
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)


def test_hidden_numbers_change_no_prediction():
    model = autoencoder(**WITH_GAPS)
    values, positions, pad_mask = series_on_a_grid()
    mask = torch.zeros_like(pad_mask)
    mask[0, 5:17] = mask[1, [0, 2]] = mask[2, 13] = True
    changed = values.where(~mask[..., None, None, None], torch.tensor(50.0))
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask, mask=mask)
        there, _ = model(changed, positions, pad_mask, mask=mask)
    assert torch.equal(here, there)


def test_the_first_convolution_of_a_dense_series_is_an_ordinary_one():
    config = classifier(**GRID | {"stem_layers": 0}).config
    stem = Stem(config).eval()
    values, positions, _ = series_on_a_grid(n_steps=24, gaps=False)
    tokens = values[0, :, :, 0, 0]
    with torch.no_grad():
        features, windows = stem(tokens, positions[0].T, torch.zeros(24, dtype=torch.int64))
        weight = stem.convolutions[0].weight
        own = (tokens - tokens.mean(0)) / tokens.std(0, correction=0)
        inputs = torch.cat((tokens, own, torch.ones_like(tokens)), dim=1).T[None]
        steps = F.silu(F.conv1d(inputs, weight, padding="same") * (1 + 1e-5) ** -0.5)
    # the series begins at 3.0, step 6, in the middle of a window, and ends in the middle of one
    grid = F.pad(steps[0].T, (0, 0, 2, 2)).unflatten(0, (-1, 4))
    torch.testing.assert_close(features, grid.mean(1), rtol=1e-5, atol=1e-6)
    assert windows.positions[:, 0].tolist() == [2.75 + 2 * k for k in range(7)]


def test_a_series_a_million_times_smaller_than_others_has_the_same_shape():
    """As the currents of PLAID, whose series differ by six orders of magnitude."""
    torch.manual_seed(0)
    stem = Stem(classifier(**GRID).config).eval()
    time, shape = torch.arange(40)[:, None] * 0.5, torch.randn(40, 2)
    shape[3::5] = torch.nan  # a number is missing, not zero
    tokens = torch.cat([shape * scale for scale in (1e-5, 1e-6, 1e-10, 0)])
    series = torch.arange(4).repeat_interleave(40)
    with torch.no_grad():
        features, windows = stem(tokens, time.repeat(4, 1), series)
    small, smaller, rounding, flat = (features[windows.series == k] for k in range(4))
    torch.testing.assert_close(small, smaller, rtol=0, atol=1e-3)
    torch.testing.assert_close(rounding, flat, rtol=0, atol=1e-2)  # it is not enlarged
    assert (smaller - flat).abs().max() > 0.1


def test_steps_between_observations_are_there_and_those_of_long_gaps_are_not():
    config = classifier(**WITH_GAPS | {"n_channels": 1}).config
    index = torch.tensor([0, 1, 3, 10, 80, 82])
    tokens = torch.tensor([[1.0], [2.0], [4.0], [5.0], [8.0], [torch.nan]])
    steps, windows = Stem(config)._gather(
        tokens, (index * 0.5)[:, None], torch.zeros(6, dtype=torch.int64)
    )
    assert windows.positions[:, 0].tolist() == [0.75, 4.75, 40.75]
    assert windows.of_row.tolist() == [0, 0, 0, 1, 2, 2]
    assert steps.observed.tolist() == [0, 2, 5]  # 1 fills a gap, 3 and 4 are blank
    assert steps.inside.tolist() == [1] * 12 + [0] * 8 + [1] * 3 + [0] * 9
    assert steps.inputs[:, 2].nonzero().flatten().tolist() == [0, 1, 3, 10, 20]
    expected = np.interp([*range(12), *range(80, 83)], index[:5], tokens[:5, 0])
    torch.testing.assert_close(steps.inputs[steps.inside > 0, 0].double(), torch.tensor(expected))


def test_two_observations_in_one_step_count_by_their_mean():
    config = classifier(**WITH_GAPS | {"n_channels": 1}).config
    tokens, time = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [2.04]])
    steps, _ = Stem(config)._gather(tokens, time, torch.zeros(2, dtype=torch.int64))
    assert steps.inputs[0].tolist() == [2, 0, 1]


def test_random_masks_hide_whole_windows_and_one_of_each_series_in_part():
    model = autoencoder(**WITH_GAPS, mask_ratio=0.5)
    values, positions, pad_mask = series_on_a_grid(n_steps=60)
    batch, _, _ = model.pack(values, positions, pad_mask)
    masked = draw_mask(batch, model.config, seed=3, epoch=1)
    hidden = torch.zeros(batch.segments.total, dtype=torch.bool)
    hidden[masked.masked.hidden_rows] = True
    ids = batch.segments.ids
    window = window_of(batch.positions, ids, batch.segments.count, model.config) + 1000 * ids
    for series in range(3):
        of_series = ids == series
        assert hidden[of_series].sum() == (of_series.sum() + 1) // 2
        shares = [hidden[window == w].float().mean() for w in window[of_series].unique()]
        assert sum(0 < share < 1 for share in shares) <= 1


def test_statistics_are_those_of_observed_series_not_of_the_blanks_between_them():
    """Every series normalised by the statistics of all, whatever lies between them in the row."""
    stem = Stem(classifier(**GRID | {"stem_layers": 1, "n_channels": 1}).config).train()
    tokens, time = torch.randn(60, 1) * 4 + 2, torch.arange(60.0)[:, None] * 0.5 + 3.5
    time[41:] += 300  # a long gap between two whole windows
    series = (torch.arange(60) >= 20).long()
    features, _ = stem(tokens, time, series)
    own = [(x - x.mean()) / x.std(correction=0) for x in tokens.split([20, 40])]
    x = torch.cat((tokens, torch.cat(own), torch.ones_like(tokens)), 1).T.split([20, 21, 19], dim=1)
    norms = [torch.nn.BatchNorm1d(6).train() for _ in stem.norms]
    for n, (convolution, norm) in enumerate(zip(stem.convolutions, norms, strict=True)):
        found = torch.cat([convolution(part) for part in x], dim=1)
        found = F.silu(norm(found[None])[0]).split([20, 21, 19], dim=1)
        x = tuple(a + b for a, b in zip(x, found, strict=True)) if n else found
        torch.testing.assert_close(stem.norms[n].mean, norm.running_mean)
        torch.testing.assert_close(stem.norms[n].variance, norm.running_var)
    # of the first series, whose first step is the last of a window
    grid = F.pad(x[0].T, (0, 0, 3, 1)).unflatten(0, (-1, 4)).mean(1)
    torch.testing.assert_close(features[: len(grid)], grid, rtol=1e-4, atol=1e-4)
    before = stem.norms[1].mean.clone()
    stem.eval()(tokens, time, series)
    stem.train()(tokens[:1], time[:1], series[:1])  # one step has no variance
    assert torch.equal(stem.norms[1].mean, before)


def test_statistics_are_exact_under_autocast():
    x, norm = torch.randn(3, 50_000) + 100, BatchNorm(3).train()
    with torch.autocast("cpu", torch.bfloat16):
        norm(x)
        norm(x.bfloat16())
    torch.testing.assert_close(norm.mean, 0.19 * x.mean(1), rtol=1e-4, atol=0)
    assert norm.mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_as_a_whole_computes_and_learns_far_from_zero(dtype):
    model = classifier(**WITH_GAPS)
    values, positions, pad_mask = series_on_a_grid()
    arguments = values, positions + 40_000, pad_mask
    exact = model.embed(*arguments)
    features = model.to(dtype).embed(*arguments)
    torch.testing.assert_close(features.float(), exact, rtol=0.1, atol=0.1)
    model.train()(*arguments, torch.tensor([0, 2, 1]))[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_running_statistics_are_saved_and_carried_into_a_classifier(tmp_path):
    model = autoencoder(**WITH_GAPS).train()
    model(*series_on_a_grid())
    model.save_pretrained(tmp_path)
    again = RoMAForPreTraining.from_pretrained(tmp_path)
    tuned = RoMAForClassification.from_pretrained(tmp_path, dim_output=2)
    for stem in (again.stem, tuned.stem):
        assert torch.equal(stem.norms[1].mean, model.stem.norms[1].mean)
        assert model.stem.norms[1].mean.any()


@pytest.mark.parametrize("fields", [GRID, {"n_pos_dims": 1}])
def test_a_classifier_has_the_window_of_its_checkpoint_whatever_the_environment(
    fields, tmp_path, monkeypatch
):
    autoencoder(**fields).save_pretrained(tmp_path)
    monkeypatch.setenv("ROMA_CLASSIFIER_WINDOW", "8")
    tuned = RoMAForClassification.from_pretrained(tmp_path, dim_output=2)
    assert tuned.config.window == fields.get("window", 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_pos_dims": 2}, "window=4 needs observations on one axis"),
        ({"grid_step": None}, "window=4 needs grid_step"),
        ({"neighbours": 2}, "neighbours and value_features, which must be 0"),
        ({"pos_encoding": "absolute"}, "needs pos_encoding='ropend'"),
    ],
)
def test_what_windows_cannot_do_is_refused(changes, message):
    with pytest.raises((SettingsError, ValueError), match=message):
        RoMAForPreTrainingConfig(tubelet_size=(1, 1, 1), **GRID | changes)
