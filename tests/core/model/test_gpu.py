"""The same numbers on a GPU, in its own kernels, without waiting for it in a step."""

from __future__ import annotations

import pytest
import torch

from roma_core import EncoderConfig, RoMAForPreTraining, RoMAForPreTrainingConfig
from roma_core.model.masking import draw_mask

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


def test_a_step_never_waits_for_the_gpu():
    model, batch = model_and_batch()
    optimizer = torch.optim.AdamW(model.cuda().parameters(), fused=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            _, loss = model(batch.to("cuda"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
