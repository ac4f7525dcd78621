"""What can be asked of the models besides a loss: features, outputs per token, reconstructions."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.model.export import export_classifier
from roma_core.model.masking import draw_mask, sample_hidden
from roma_core.model.packing import Segments
from roma_core.schema import denormalise

SHAPE = {
    "encoder_config": EncoderConfig(d_model=24, nhead=2, depth=2),
    "tubelet_size": (1, 1, 1),
    "n_channels": 2,
    "n_pos_dims": 1,
}
DECODER = EncoderConfig(d_model=12, nhead=1, depth=2)


def autoencoder(**changes):
    torch.manual_seed(0)
    values = SHAPE | {"decoder_config": DECODER} | changes
    return RoMAForPreTraining(RoMAForPreTrainingConfig(**values))


def classifier(**changes):
    torch.manual_seed(0)
    return RoMAForClassification(RoMAForClassificationConfig(**SHAPE | {"dim_output": 3} | changes))


def batch(lengths, n_tokens=8):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(len(lengths), n_tokens, 2, 1, 1, generator=g)
    positions = torch.rand(len(lengths), 1, n_tokens, generator=g).cumsum(2)
    return values, positions, torch.arange(n_tokens) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("use_cls", [True, False])
def test_features_pooled_and_per_token_belong_together(use_cls):
    for model in (autoencoder(use_cls=use_cls), classifier(use_cls=use_cls)):
        model.eval()
        values, positions, pad_mask = batch([8, 3, 5])
        by_token = model.embed(values, positions, pad_mask, pooling="token")
        assert by_token.shape == (3, 8, 24)
        assert not by_token[pad_mask].any()
        mean = model.embed(values, positions, pad_mask)
        torch.testing.assert_close(mean, by_token.sum(1) / torch.tensor([[8], [3], [5]]))
        alone = model.embed(values[1:2, :3], positions[1:2, :, :3])
        torch.testing.assert_close(mean[1:2], alone, rtol=1e-5, atol=1e-5)
        if use_cls:
            assert model.embed(values, positions, pad_mask, pooling="cls").shape == (3, 24)
        else:
            with pytest.raises(ValueError, match="use_cls=False"):
                model.embed(values, positions, pad_mask, pooling="cls")


@pytest.mark.parametrize("problem_type", ["classification", "regression"])
def test_a_head_on_every_token_ignores_padding(problem_type):
    model = classifier(pooling="token", problem_type=problem_type)
    values, positions, pad_mask = batch([8, 3, 5])
    label = torch.randint(3, (3, 8)) if problem_type == "classification" else torch.randn(3, 8, 3)

    logits, loss = model(values, positions, pad_mask, label)

    assert logits.shape == (3, 8, 3)
    assert not logits[pad_mask].any() and logits[~pad_mask].any(-1).all()
    alone, _ = model(values[1:2, :3], positions[1:2, :, :3])
    torch.testing.assert_close(logits[1:2, :3], alone, rtol=1e-5, atol=1e-5)
    real, wanted = logits[~pad_mask], label[~pad_mask]
    expected = (
        torch.nn.functional.cross_entropy(real, wanted)
        if problem_type == "classification"
        else ((real - wanted) ** 2).mean()
    )
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="one entry per token"):
        model(values, positions, pad_mask, torch.zeros(3, dtype=torch.int64))


def test_an_exported_head_on_every_token_agrees():
    model = classifier(pooling="token").eval()
    values, positions, pad_mask = batch([6, 2], 6)
    program = export_classifier(model).module()
    with torch.no_grad():
        logits = program(values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
        expected, _ = model(values, positions, pad_mask)
    torch.testing.assert_close(logits[~pad_mask], expected[~pad_mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_cls", [True, False])
def test_reconstructing_hidden_tokens_at_their_own_positions_is_what_training_does(use_cls):
    model = autoencoder(use_cls=use_cls).eval()
    values, positions, pad_mask = batch([8, 5])
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, [1, 3]] = True
    with torch.no_grad():
        logits, _ = model(values, positions, pad_mask, mask=mask)
        asked = model.reconstruct(
            values[:, [0, 2, 4, 5, 6, 7]],
            positions[:, :, [0, 2, 4, 5, 6, 7]],
            pad_mask[:, [0, 2, 4, 5, 6, 7]],
            query_positions=positions[:, :, [1, 3]],
        )
    torch.testing.assert_close(asked.mean, logits, rtol=1e-5, atol=1e-5)
    assert asked.std is None


SCHEMA = {
    "channels": [{"name": "flux", "unit": "mJy"}, {"name": "error", "unit": "mJy"}],
    "axes": [{"name": "time", "unit": "d"}],
    "normalisation": [
        {"transform": "arcsinh", "transform_scale": 3.0, "mean": 0.5, "std": 2.0},
        {"mean": -1.0, "std": 10.0},
    ],
}


def test_reconstructions_come_in_the_units_of_the_data_with_their_deviation():
    model = autoencoder(predict_variance=True).eval()
    values, positions, pad_mask = batch([8, 5])
    grid = torch.linspace(0, 9, 4)[None]  # one grid for all series
    with torch.no_grad():
        plain = model.reconstruct(values, positions, pad_mask, query_positions=grid)
        model.data_schema = SCHEMA
        same = model.reconstruct(
            values, positions, pad_mask, query_positions=grid, denormalise=False
        )
        result = model.reconstruct(values, positions, pad_mask, query_positions=grid)
    assert torch.equal(plain.mean, same.mean) and result.mean.shape == (2, 4, 2)
    from roma_core.schema import DataSchema

    schema = DataSchema.model_validate(SCHEMA)
    expected = torch.from_numpy(denormalise(plain.mean.numpy(), schema))
    torch.testing.assert_close(result.mean, expected)
    assert result.std is not None and plain.std is not None
    torch.testing.assert_close(result.std[..., 1], plain.std[..., 1] * 10)
    above = torch.from_numpy(denormalise((plain.mean + 1e-3 * plain.std).numpy(), schema))
    torch.testing.assert_close((above - expected) / 1e-3, result.std, rtol=2e-2, atol=2e-2)


def test_a_gaussian_head_learns_the_spread_of_noise():
    torch.manual_seed(0)
    model = autoencoder(predict_variance=True, mask_ratio=0.5, n_channels=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        values = 0.3 * torch.randn(32, 6, 1, 1, 1)
        _, loss = model(values, torch.arange(6.0).expand(32, 1, 6))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        result = model.eval().reconstruct(
            0.3 * torch.randn(32, 6, 1, 1, 1),
            torch.arange(6.0).expand(32, 1, 6),
            query_positions=torch.tensor([[2.5]]),
        )
    assert 0.25 < float(result.std.mean()) < 0.36


def test_reconstruct_says_what_it_cannot_do():
    values, positions, pad_mask = batch([8, 5])
    for model, message in (
        (autoencoder(pos_encoding="absolute"), "ropend"),
        (autoencoder(normalize_targets=True), "normalize_targets=False"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reconstruct(values, positions, pad_mask, query_positions=positions)
    with pytest.raises(
        ValueError, match=r"query_positions must have shape .* = \(2, 1, 3\), got \(2, 2, 3\)"
    ):
        autoencoder().reconstruct(values, positions, pad_mask, query_positions=torch.zeros(2, 3))


def test_standardised_predictions_are_shown_at_the_level_of_their_tubelets():
    model = autoencoder(normalize_targets=True, tubelet_size=(2, 1, 1))
    values, _, _ = batch([8], 8)
    packed, _, _ = model.pack(values * 7 + 3, torch.arange(4.0)[None, None], None)
    packed = packed.with_mask(torch.tensor([True, False, True, False]))
    model.predict_hidden = lambda *_: torch.tensor([[0.0] * 4, [1.0] * 4])
    hidden = packed.tokens[[0, 2]]
    shown = model.reconstruct_hidden(packed, packed.masked)
    torch.testing.assert_close(shown[0], hidden[0].mean().expand(4))
    torch.testing.assert_close(
        shown[1], (hidden[1].mean() + hidden[1].std()).expand(4), rtol=1e-4, atol=1e-4
    )


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
        autoencoder(mask_strategy="channel")
    model = autoencoder(mask_strategy="channel", channel_axis=1, n_pos_dims=2, mask_ratio=0.5)
    positions = torch.stack((torch.arange(12.0), torch.arange(12.0) // 6))[None]
    packed, _, _ = model.pack(torch.randn(1, 12, 2, 1, 1), positions, None)
    hidden = draw_mask(packed, model.config, 0, 0).masked.hidden_rows.tolist()
    assert hidden in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11])


@pytest.mark.parametrize(
    "size, n_parameters",
    [("tiny-shallow", 778_320), ("tiny", 4_669_920), ("small", 26_884_224), ("base", 74_666_880)],
)
def test_published_sizes_have_the_published_number_of_parameters(size, n_parameters):
    with torch.device("meta"):
        model = classifier(encoder_config=EncoderConfig.preset(size))
    assert sum(p.numel() for p in model.encoder.parameters()) == n_parameters


def test_both_models_start_as_declared():
    for model in (autoencoder(), classifier()):
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert (parameter == 1).all(), name
            elif name == "projection.bias":  # keeps a series of zeros off zero
                assert 0 < parameter.abs().max() < 0.1, name
            elif name.endswith("bias"):
                assert not parameter.any(), name
            else:
                std = 0.02 if parameter.ndim == 1 else (3 * parameter.shape[1]) ** -0.5
                assert parameter.abs().max() <= 2 * std, name
                if parameter.numel() > 500:  # 0.88 σ: cut at two of them
                    assert 0.8 < parameter.std() / std < 0.95, name


def test_features_of_the_numbers_bend_and_are_carried_over(tmp_path):
    model = autoencoder(value_features=32)
    heights = torch.linspace(-3, 3, 61)[:, None].expand(-1, model.config.tubelet_width)
    bent = model.projection(heights) - torch.lerp(
        *model.projection(heights[[0, -1]])[:, None], torch.linspace(0, 1, 61)[:, None]
    )
    model.save_pretrained(tmp_path)

    started = RoMAForClassification.from_pretrained(tmp_path, dim_output=3)

    assert bent.norm(dim=1).max() > 0.3
    assert torch.equal(started.projection.features.weight, model.projection.features.weight)
    assert torch.equal(started.projection(heights), model.projection(heights))
    assert classifier().projection.features is None


def test_neighbours_are_told_by_their_places_and_carried_over(tmp_path):
    model = autoencoder(neighbours=2)
    around = model.neighbourhood
    tokens, positions = torch.randn(7, 2), torch.tensor([[0.0], [2], [3], [9], [10], [11], [40]])
    series = torch.tensor([0] * 5 + [1] * 2)

    inputs = around._inputs(tokens, positions, series)
    model.save_pretrained(tmp_path)
    started = RoMAForClassification.from_pretrained(tmp_path, dim_output=3)

    assert around.offsets.tolist() == [-1, -2, 1, 2]
    of_second = inputs[1].split([2, 4, 4, 4, 4])
    assert torch.equal(of_second[0], tokens[1])
    for found, place in zip(of_second[1:], around.offsets.tolist(), strict=True):
        if place == -2:  # before the series begins
            assert not found.any()
            continue
        gap = torch.asinh(positions[1 + place] - positions[1])
        assert torch.equal(found, torch.cat((tokens[1 + place] - tokens[1], gap, torch.ones(1))))
    assert not inputs[5].split([2, 4, 4, 4, 4])[1].any()  # the other series is none of its business
    assert torch.equal(
        started.neighbourhood(tokens, positions, series), around(tokens, positions, series)
    )
    assert classifier().neighbourhood is None


def test_drop_path_grows_with_depth_and_keeps_the_expectation():
    stack = EncoderConfig(d_model=24, nhead=2, depth=3, drop_path_rate=0.4)
    model = classifier(encoder_config=stack)
    assert [layer.drop_path_rate for layer in model.encoder.layers] == [0.0, 0.2, 0.4]
    only = classifier(encoder_config=stack.model_copy(update={"depth": 1}))
    assert only.encoder.layers[0].drop_path_rate == 0
    torch.manual_seed(0)
    scales = model.encoder.layers[2].train()._drop_path(Segments([2] * 4000))
    for branch in scales:
        assert branch.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
        assert torch.equal(branch[::2], branch[1::2])  # a series is dropped whole
        assert float(branch.mean()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(*scales)


def test_an_exception_leaves_no_trace_in_the_next_call():
    model = classifier().eval()
    values, positions, pad_mask = batch([8, 5])
    before, _ = model(values, positions, pad_mask)
    with pytest.raises(ValueError, match="NaN"):
        model(values * torch.nan, positions, pad_mask)
    assert torch.equal(model(values, positions, pad_mask)[0], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_as_a_whole_computes_and_learns(dtype):
    values, positions, pad_mask = batch([8, 5])
    for model in (autoencoder(), classifier()):
        exact = model.embed(values, positions, pad_mask)
        model.to(dtype)
        close = (
            {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
        )
        features = model.embed(values.to(dtype), positions, pad_mask)
        assert features.dtype == dtype
        torch.testing.assert_close(features.float(), exact, **close)
        _, loss = model(values.to(dtype), positions, pad_mask, torch.tensor([0, 2]))
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pooling, label", [("cls", [0, 3]), ("token", [[0] * 7 + [-1]] * 2)])
def test_a_label_that_is_no_class_is_named(pooling, label):
    values, positions, _ = batch([8, 8])
    with pytest.raises(ValueError, match=r"classes from 0 to 2 \(dim_output=3\); row \d+ has"):
        classifier(pooling=pooling)(values, positions, label=torch.tensor(label))


def test_a_batch_of_nothing_is_named():
    values, positions, _ = batch([8])
    with pytest.raises(ValueError, match="no tokens"):
        autoencoder()(values[:0], positions[:0])
