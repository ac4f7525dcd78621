"""Properties the models keep whatever the weights: masks, padding, shifts, gradients, export."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from roma_core import (
    EncoderConfig,
    RoMAForClassification,
    RoMAForClassificationConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.hashing import hash_ints
from roma_core.model import masking
from roma_core.model.attention import packed_attention, padded_attention
from roma_core.model.export import export_classifier
from roma_core.model.masking import hidden_count, sample_hidden
from roma_core.model.packing import PackedBatch, Segments
from roma_core.model.positions import pairs_per_axis

STACK = EncoderConfig(d_model=24, nhead=2, depth=2)
SHAPE = {"encoder_config": STACK, "tubelet_size": (1, 1, 1), "n_channels": 2}


def classifier(**changes):
    torch.manual_seed(0)
    values = {**SHAPE, "n_pos_dims": 2, "dim_output": 3, **changes}
    return spread(RoMAForClassification(RoMAForClassificationConfig(**values))).eval()


def autoencoder(**changes):
    torch.manual_seed(0)
    values = {
        **SHAPE,
        "n_pos_dims": 2,
        "decoder_config": EncoderConfig(d_model=12, nhead=1, depth=2),
    }
    return spread(RoMAForPreTraining(RoMAForPreTrainingConfig(**values | changes))).eval()


def spread(model):
    """Weights large enough that no part is neutral."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1) * 0.5)
    return model


def padded_batch(lengths, n_tokens, n_axes=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    n = len(lengths)
    values = torch.randn(n, n_tokens, 2, 1, 1, generator=g, dtype=dtype)
    positions = torch.rand(n, n_axes, n_tokens, generator=g, dtype=dtype) * 40
    pad_mask = torch.arange(n_tokens) >= torch.tensor(lengths)[:, None]
    return values, positions, pad_mask


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
    lengths = torch.arange(1, 3001)

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


@pytest.mark.parametrize("strategy", ["random", "block"])
def test_a_range_of_ratios_is_drawn_alike_on_every_device(strategy):
    sizes, ids = torch.tensor([9, 30]), torch.tensor([3, 2**40])
    owner, index = torch.tensor([0] * 9 + [1] * 30), torch.cat((torch.arange(9), torch.arange(30)))
    span = (Fraction(1, 10), Fraction(9, 10))

    as_arrays = sample_hidden(Segments(sizes.tolist()), ids, span, strategy, 1, 2)
    as_tensors = masking._sample(span, strategy, 1, 2, sizes, owner, index, ids, index)

    assert torch.equal(as_arrays, as_tensors)


def test_random_masks_are_fair_and_change_with_the_epoch():
    segments, ids = Segments([20] * 400), torch.arange(400)
    masks = [
        sample_hidden(segments, ids, (Fraction(1, 2),) * 2, "random", 0, epoch).view(400, 20)
        for epoch in (0, 1)
    ]
    assert (masks[0] != masks[1]).any(1).all()
    share = torch.stack(masks).float().mean((0, 1))  # of each place
    assert (share - 0.5).abs().max() < 5 * 0.5 / math.sqrt(800)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    extra=st.integers(0, 4),
    pooling=st.sampled_from(["cls", "mean"]),
    neighbours=st.sampled_from([0, 3]),
)
def test_padding_and_batch_order_change_no_logit(lengths, extra, pooling, neighbours):
    model = classifier(pooling=pooling, neighbours=neighbours)
    values, positions, pad_mask = padded_batch(lengths, max(lengths) + extra)
    with torch.no_grad():
        alone = [
            model(values[b : b + 1, :n], positions[b : b + 1, :, :n])[0]
            for b, n in enumerate(lengths)
        ]
        dirty = values.masked_fill(pad_mask[:, :, None, None, None], float("nan"))
        together, _ = model(dirty, positions, pad_mask)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(shift=st.floats(-100, 100), n_axes=st.integers(1, 3), neighbours=st.sampled_from([0, 2]))
def test_without_cls_a_shift_of_all_positions_changes_nothing(shift, n_axes, neighbours):
    model = autoencoder(use_cls=False, n_pos_dims=n_axes, neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4], 8, n_axes)
    mask = torch.arange(8).remainder(2).eq(1).expand(2, -1)
    moved = positions.clone()
    moved[:, -1] += shift
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask, mask=mask)
        there, _ = model(values, moved, pad_mask, mask=mask)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)


@pytest.mark.parametrize("neighbours", [0, 3])
def test_hidden_values_cannot_influence_the_reconstruction(neighbours):
    model = autoencoder(neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4], 8)
    mask = torch.arange(8).remainder(3).eq(1).expand(2, -1)
    changed = values.masked_fill(mask[:, :, None, None, None], 1e3)
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask, mask=mask)
        there, _ = model(changed, positions, pad_mask, mask=mask)
    assert torch.equal(here, there)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_the_order_of_the_tokens_changes_no_logit(neighbours):
    model = classifier(neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4], 8)
    positions[:, 0] = positions[:, 0].round(decimals=-1)  # the second axis breaks ties
    order = torch.randperm(8)
    with torch.no_grad():
        here, _ = model(values, positions, pad_mask)
        there, _ = model(values[:, order], positions[:, :, order], pad_mask[:, order])
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("neighbours", [0, 2])
def test_unequal_masks_give_each_series_what_it_would_get_alone(neighbours):
    model = autoencoder(neighbours=neighbours)
    values, positions, pad_mask = padded_batch([7, 4, 6], 8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, [1, 2, 5]] = mask[1, 3] = True
    mask[1, 6] = True  # padding: ignored
    with torch.no_grad():
        logits, loss = model(values, positions, pad_mask, mask=mask)
        first, _ = model(values[:1, :7], positions[:1, :, :7], mask=mask[:1, :7])
        second, _ = model(values[1:2, :4], positions[1:2, :, :4], mask=mask[1:2, :4])
    assert logits.shape == (3, 3, 2)
    torch.testing.assert_close(logits[0], first[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[1, :1], second[0], rtol=1e-5, atol=1e-5)
    assert not logits[1, 1:].any() and not logits[2].any()
    targets = torch.stack([*values[0, [1, 2, 5], :, 0, 0], values[1, 3, :, 0, 0]])
    predicted = torch.cat([logits[0], logits[1, :1]])
    torch.testing.assert_close(loss, ((predicted - targets) ** 2).mean())


@pytest.mark.parametrize("use_cls", [True, False])
@pytest.mark.parametrize("encoding", ["ropend", "absolute"])
def test_every_parameter_receives_a_gradient(use_cls, encoding):
    values, positions, pad_mask = padded_batch([7, 4], 8)
    for model in (
        autoencoder(use_cls=use_cls, pos_encoding=encoding, neighbours=1),
        classifier(use_cls=use_cls, pos_encoding=encoding, neighbours=1),
    ):
        label = torch.tensor([0, 2])
        _, loss = model.train()(values, positions, pad_mask, label)
        loss.backward()
        silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent


def test_a_series_of_zeros_has_finite_gradients_from_the_first_step():
    stack = EncoderConfig(d_model=16, nhead=2, depth=6)
    shape = {"encoder_config": stack, "tubelet_size": (1, 1, 1), "n_channels": 2, "n_pos_dims": 1}
    shape |= {"use_cls": False, "value_features": 0}
    for model in (
        RoMAForPreTraining(RoMAForPreTrainingConfig(**shape, decoder_config=stack)),
        RoMAForClassification(RoMAForClassificationConfig(**shape, dim_output=3)),
    ):
        _, loss = model(
            torch.zeros(2, 8, 2, 1, 1),
            torch.arange(8.0).expand(2, 1, 8),
            label=torch.tensor([0, 1]),
        )
        loss.backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
        assert largest < 1e3


def test_packed_attention_and_its_gradient_agree_with_the_padded_body():
    torch.manual_seed(0)
    lengths = [2, 2, 5, 1]
    segments = Segments(lengths)
    q, k, v = (torch.randn(10, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(3))
    places = (segments.ids, segments.index_in_series)

    def padded():
        spread_out = [x.new_zeros(4, 5, 2, 6).index_put(places, x) for x in (q, k, v)]
        valid = torch.arange(5) < segments.sizes[:, None]
        return padded_attention(*spread_out, valid)[places]

    packed = packed_attention(q, k, v, segments, segments)
    torch.testing.assert_close(packed, padded())
    weight = torch.randn_like(packed)
    grads = torch.autograd.grad((packed * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((padded() * weight).sum(), (q, k, v))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width, axes", [(64, 3), (42, 2), (30, 2), (15, 1)])
def test_any_head_width_can_be_shared_out_over_the_axes(width, axes):
    pairs = pairs_per_axis(width, axes)
    assert sum(pairs) == width // 2 and max(pairs) - min(pairs) <= 1
    stack = EncoderConfig(d_model=2 * width, nhead=2, depth=1)
    model = classifier(encoder_config=stack, n_pos_dims=axes)
    values, positions, pad_mask = padded_batch([7, 4], 8, axes)
    assert model(values, positions, pad_mask)[0].isfinite().all()


@pytest.mark.parametrize(("use_cls", "neighbours"), [(True, 0), (False, 0), (True, 2)])
def test_exported_program_agrees_at_other_shapes(use_cls, neighbours):
    model = classifier(use_cls=use_cls, neighbours=neighbours)
    program = export_classifier(model).module()
    for lengths in ([3], [6, 2, 1], [1], [1, 1]):
        values, positions, pad_mask = padded_batch(lengths, max(lengths))
        with torch.no_grad():
            expected, _ = model(values, positions, pad_mask)
            logits = program(values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


LOAD_ELSEWHERE = """
import sys
sys.modules["roma_core"] = None  # importing it is an error from here on
import torch
program = torch.export.load(sys.argv[1])
spaces = {str(n.target).split(".")[0] for n in program.graph.nodes if n.op == "call_function"}
spaces -= {f"<built-in function {name}>" for name in ("getitem", "add", "sub", "mul")}
assert spaces == {"aten"}, spaces
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(program.module()(*inputs), sys.argv[3])
"""


def test_exported_program_needs_nothing_of_this_project(tmp_path):
    model = classifier(neighbours=2)
    torch.export.save(export_classifier(model), tmp_path / "model.pt2")
    values, positions, pad_mask = padded_batch([6, 2, 1], 6)
    inputs = (values.flatten(2), positions.transpose(1, 2).contiguous(), ~pad_mask)
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "logits.pt")]

    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *files], cwd=tmp_path, check=True)

    with torch.no_grad():
        expected, _ = model(values, positions, pad_mask)
    logits = torch.load(files[2], weights_only=True)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_transfer_carries_projection_encoder_and_cls(tmp_path):
    pretrained = autoencoder()
    pretrained.data_schema = {"axes": ["time"]}
    pretrained.save_pretrained(tmp_path)

    model = RoMAForClassification.from_pretrained(tmp_path, dim_output=4)

    shared = [n for n, _ in model.named_parameters() if not n.startswith("head.")]
    assert {"cls", "projection.weight", "projection.bias"} < set(shared)
    for name in shared:
        assert torch.equal(model.get_parameter(name), pretrained.get_parameter(name)), name
    assert model.data_schema == {"axes": ["time"]}
    model.save_pretrained(tmp_path / "classifier")
    again = RoMAForClassification.from_pretrained(tmp_path / "classifier")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_contradicting_the_checkpoint_is_refused(tmp_path):
    autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="n_pos_dims=1 contradicts"):
        RoMAForClassification.from_pretrained(tmp_path, dim_output=4, n_pos_dims=1)
    with pytest.raises(ValueError, match="dim_output"):
        RoMAForClassification.from_pretrained(tmp_path)


def _broken(name):
    values, positions, pad_mask = padded_batch([7, 4], 8)
    if name == "rank":
        return (values[..., 0], positions), "five axes"
    if name == "channels":
        return (values[:, :, :1], positions), "n_channels=2"
    if name == "axes":
        return (values, positions[:, :1]), "n_pos_dims"
    if name == "integer values":
        return (values.long(), positions), "floating point"
    if name == "nan":
        values[1, 3, 0] = float("nan")
        return (values, positions, pad_mask), "series 1, token 3"
    if name == "infinite position":
        positions[0, 1, 6] = float("inf")
        return (values, positions, pad_mask), "positions must be finite.*series 0, token 6"
    if name == "all padding":
        pad_mask[1] = True
        return (values, positions, pad_mask), r"rows \[1\]"
    return (values, positions, pad_mask.float()), "pad_mask must be bool"


@pytest.mark.parametrize(
    "name",
    [
        "rank",
        "channels",
        "axes",
        "integer values",
        "nan",
        "infinite position",
        "all padding",
        "float mask",
    ],
)
def test_bad_input_is_named(name):
    arguments, message = _broken(name)
    for model in (classifier(), autoencoder()):
        with pytest.raises((ValueError, TypeError), match=message):
            model(*arguments)


def test_unknown_keyword_and_all_hidden_are_refused():
    values, positions, pad_mask = padded_batch([7, 4], 8)
    with pytest.raises(TypeError, match="masks"):
        autoencoder()(values, positions, masks=pad_mask)
    with pytest.raises(ValueError, match=r"hides every real token of series \[0, 1\]"):
        autoencoder()(values, positions, pad_mask, mask=~pad_mask)
    with pytest.raises(ValueError, match="n_pos_dims=2"):
        batch = PackedBatch(torch.zeros(3, 2), torch.zeros(3, 1), Segments([3]), torch.tensor([0]))
        autoencoder()(batch)
