"""The same numbers on a GPU, in its own kernels, without waiting for it in a step."""

from __future__ import annotations

import pytest
import torch
from torch.export.passes import move_to_device_pass

from roma_core import EncoderConfig, RoMAForPreTraining, RoMAForPreTrainingConfig
from roma_core.model.attention import packed_attention
from roma_core.model.masking import draw_mask
from roma_core.model.packing import Segments
from tests.core.model.small_models import autoencoder, classifier, every_part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STACK = EncoderConfig(d_model=128, nhead=2, depth=3)


def model_and_batch():
    torch.manual_seed(0)
    config = RoMAForPreTrainingConfig(
        encoder_config=STACK,
        decoder_config=STACK,
        tubelet_size=(1, 1, 1),
        n_channels=2,
        n_pos_dims=1,
    )
    model = RoMAForPreTraining(config)
    values = torch.randn(4, 40, 2, 1, 1)
    positions = torch.rand(4, 1, 40).cumsum(2)
    pad_mask = torch.arange(40) >= torch.tensor([[40], [7], [21], [21]])
    batch, _, _ = model.pack(values, positions, pad_mask)
    return model, draw_mask(batch, config, 0, 0)


def outcome(model, batch, dtype=torch.float32):
    device = batch.tokens.device.type
    model.zero_grad(set_to_none=True)
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        logits, loss = model(batch)
    loss.backward()
    return logits.float().cpu(), loss.cpu(), [p.grad.cpu() for p in model.parameters()]


def assert_second_call_does_not_wait(step):
    """The first one may: it creates state and compiles."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_what_the_cpu_does(dtype, compiled):
    model, batch = model_and_batch()
    expected = outcome(model, batch)
    model.cuda()
    if compiled:
        model.compile_regions()
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(outcome(model, batch.to("cuda"), dtype), expected, **close)


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.bfloat16, 64), (torch.float16, 72), (torch.bfloat16, 60), (torch.float32, 64)],
)
@pytest.mark.parametrize("queries", [None, [3, 0, 11, 5]])
def test_packed_attention_is_that_of_each_series_alone(dtype, width, queries):
    """In the kernel for packed rows where its types and widths allow, else padded."""
    keys = [40, 7, 21, 300]
    g = torch.Generator().manual_seed(0)
    segments = [Segments(queries or keys), Segments(keys)]
    q, k, v = (
        torch.randn(s.total, 3, width, generator=g).to(dtype).double().requires_grad_()
        for s in (segments[0], segments[1], segments[1])
    )
    parts = zip(q.split(segments[0].lengths), k.split(keys), v.split(keys), strict=True)
    expected = torch.cat(
        [
            torch.einsum(
                "hqk,khw->qhw", (torch.einsum("qhw,khw->hqk", a, b) / width**0.5).softmax(-1), c
            )
            for a, b, c in parts
        ]
    )
    weight = torch.randn(expected.shape, generator=g).to(dtype).double()
    gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))

    on_gpu = [x.detach().to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    found = packed_attention(*on_gpu, *(s.to("cuda") for s in segments))
    loss = (found * weight.to("cuda", dtype)).sum()
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.02}
    torch.testing.assert_close(found.cpu().double(), expected, **close)
    for ours, theirs in zip(torch.autograd.grad(loss, on_gpu), gradients, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, **close)


def test_an_exported_program_moves_to_the_gpu():
    model, _ = model_and_batch()
    program = model.export()
    g = torch.Generator().manual_seed(0)
    valid = torch.arange(40) < torch.tensor([[40], [7], [21]])
    arguments = torch.randn(3, 40, 2, generator=g), torch.rand(3, 40, 1, generator=g), valid
    expected = program.module()(*arguments)
    moved = move_to_device_pass(program, "cuda:0").module()
    found = moved(*(x.cuda() for x in arguments))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)


def test_a_step_never_waits_for_the_gpu():
    model, batch = model_and_batch()
    optimizer = torch.optim.AdamW(model.cuda().parameters(), fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = model(batch.to("cuda"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert_second_call_does_not_wait(step)


@pytest.mark.parametrize("make", [autoencoder, classifier])
def test_no_optional_part_waits_for_the_gpu(make):
    model, batch = every_part(make)
    model.cuda()

    def step():
        logits, loss = model(batch.to("cuda"))
        (logits.sum() if loss is None else loss).backward()

    assert_second_call_does_not_wait(step)


def test_a_pinned_batch_is_the_same_batch():
    _, batch = model_and_batch()
    pinned = batch.pin_memory()
    assert pinned.tokens.is_pinned() and pinned.masked.hidden_rows.is_pinned()
    assert torch.equal(pinned.to("cuda").tokens.cpu(), batch.tokens)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask_strategy": "block", "mask_ratio_max": 0.9},
        {"mask_strategy": {"channel": 1, "window": 1}, "missing_values": True},
    ],
)
def test_masks_are_drawn_alike_on_every_device(changes):
    model, batch = model_and_batch()
    config = model.config.model_copy(update=changes)
    expected, drawn = (draw_mask(b, config, 1, 2).masked for b in (batch, batch.to("cuda")))
    assert drawn.hidden_rows.is_cuda
    assert torch.equal(drawn.hidden_rows.cpu(), expected.hidden_rows)
