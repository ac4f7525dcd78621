"""The stack: compiled regions, kernels of products and norms, attention, sizes, drop path."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from roma_core import (
    EncoderConfig,
    RoMAForPreTraining,
    RoMAForPreTrainingConfig,
)
from roma_core.model import encoder as encoder_module
from roma_core.model.encoder import (
    MIN_ONEDNN_ROWS,
    Encoder,
    OutputRows,
    RMSNorm,
    linear,
    linear_silu,
)
from roma_core.model.packing import Segments
from roma_core.model.positions import RotaryEmbedding
from tests.core.model.small_models import STACK, new_classifier


def packed(lengths, seed=0):
    """x, rotations and segments as an encoder takes them, their lazy parts already made."""
    segments = Segments(lengths)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(segments.total, 24, generator=g, requires_grad=True)
    rotations = RotaryEmbedding(12, [0], 0.75)(torch.rand(segments.total, 1, generator=g) * 20)
    assert segments.cu_seqlens is not None
    return x, rotations, segments


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_encoder_is_one_graph_that_serves_other_lengths():
    torch.manual_seed(0)
    encoder = Encoder(STACK)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encoder, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for lengths in ([7, 7, 15], [2, 7], [1, 1, 1, 28], [4, 4]):
        x, rotations, segments = packed(lengths)
        expected = encoder(x, rotations, segments)
        (gradient,) = torch.autograd.grad(expected.square().sum(), x)
        out = compiled(x, rotations, segments)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        ours = torch.autograd.grad(out.square().sum(), x)[0]
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)
        graphs.append(counter.frame_count)
    # no length made another graph; a size that happens to equal a width would make one
    assert graphs == graphs[:1] * 4


@pytest.mark.parametrize(("n_read", "compiles"), [(3, False), (20, True)])
def test_a_last_block_is_compiled_unless_few_of_its_rows_are_read(monkeypatch, n_read, compiles):
    compiled = []
    monkeypatch.setattr(
        encoder_module, "_compiled", lambda method: compiled.append(method) or method
    )
    encoder = Encoder(STACK.model_copy(update={"depth": 1}))
    encoder.compile_regions()
    x, rotations, segments = packed([30])
    rows = OutputRows(torch.arange(n_read), Segments([n_read]))

    assert encoder(x, rotations, segments, rows).shape[0] == n_read
    assert bool(compiled) is compiles


@pytest.mark.slow
def test_compiled_regions_compute_the_same_without_recompiling_for_lengths():
    config = RoMAForPreTrainingConfig(
        encoder_config=STACK, decoder_config=STACK, tubelet_size=(1, 1, 1), n_pos_dims=1
    )
    torch.manual_seed(0)
    eager, compiled = RoMAForPreTraining(config), RoMAForPreTraining(config)
    compiled.load_state_dict(eager.state_dict())
    compiled.compile_regions()
    compiled.compile_regions()  # a second call changes nothing
    compiled = pickle.loads(
        pickle.dumps(copy.deepcopy(compiled))
    )  # copies have weights of their own
    assert compiled.state_dict().keys() == eager.state_dict().keys()

    def step(model, n):
        values = torch.randn(3, n, 1, 1, 1, generator=torch.Generator().manual_seed(n))
        mask = torch.arange(n).remainder(3).eq(1).expand(3, -1)
        model.zero_grad()
        _, loss = model(values, torch.arange(float(n)).expand(3, 1, n), mask=mask)
        loss.backward()
        return loss, [p.grad for p in model.parameters()]

    step(compiled, 31)
    torch._dynamo.utils.counters.clear()
    for n in (7, 13, 30, 2_200):  # the last one has more rows than the compiler adds up at once
        ours, theirs = step(compiled, n), step(eager, n)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch._dynamo.utils.counters["frames"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_before_a_product_and_its_gradient_are_those_of_the_framework(dtype):
    torch.manual_seed(0)
    norm, product = RMSNorm(12, 1e-12), torch.nn.Linear(12, 4, bias=False)
    with torch.no_grad():
        norm.weight.normal_()
    if dtype == torch.float64:
        norm.double()
        product.double()
    x = torch.randn(5, 7, 12, dtype=dtype, requires_grad=True)
    leaves = x, norm.weight, product.weight
    exact, gain, matrix = (leaf.detach().double().requires_grad_() for leaf in leaves)
    expected = F.linear(F.rms_norm(exact, (12,), gain, 1e-12), matrix)
    read = torch.randn(5, 7, 4, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * read).sum(), (exact, gain, matrix))
    close = (
        {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    )

    out = F.linear(*norm(x, product.weight))
    grads = torch.autograd.grad((out.double() * read).sum(), leaves)

    assert out.dtype == norm.weight.dtype
    torch.testing.assert_close(out.double(), expected, **close)
    torch.testing.assert_close([g.double() for g in grads], list(wanted), **close)
    with torch.no_grad():
        torch.testing.assert_close(F.linear(*norm(x, product.weight)).double(), expected, **close)


@pytest.mark.parametrize("rows", [3, MIN_ONEDNN_ROWS])
@pytest.mark.parametrize("autocast", [False, True])
def test_products_and_their_gradients_are_those_of_the_framework(rows, autocast):
    torch.manual_seed(0)
    x = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(24, 16, requires_grad=True)
    grad = torch.randn(rows, 24)
    close = {"rtol": 2e-2, "atol": 5e-2} if autocast else {"rtol": 1e-5, "atol": 1e-4}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out, expected = linear(x, weight), F.linear(x, weight)
        assert out.dtype == expected.dtype
        ours = torch.autograd.grad(out, (x, weight), grad.to(out.dtype))
        theirs = torch.autograd.grad(expected, (x, weight), grad.to(out.dtype))
        torch.testing.assert_close((out, *ours), (expected, *theirs), **close)
        with torch.no_grad():
            torch.testing.assert_close(linear_silu(x, weight), F.silu(expected), **close)
        torch.testing.assert_close(linear_silu(x, weight), F.silu(expected), **close)


@pytest.mark.parametrize(
    "size, n_parameters",
    [("tiny-shallow", 778_320), ("tiny", 4_669_920), ("small", 26_884_224), ("base", 74_666_880)],
)
def test_published_sizes_have_the_published_number_of_parameters(size, n_parameters):
    with torch.device("meta"):
        model = new_classifier(encoder_config=EncoderConfig.preset(size))
    assert sum(p.numel() for p in model.encoder.parameters()) == n_parameters


def test_drop_path_grows_with_depth_and_keeps_the_expectation():
    stack = EncoderConfig(d_model=24, nhead=2, depth=3, drop_path_rate=0.4)
    model = new_classifier(encoder_config=stack)
    assert [layer.drop_path_rate for layer in model.encoder.layers] == [0.0, 0.2, 0.4]
    only = new_classifier(encoder_config=stack.model_copy(update={"depth": 1}))
    assert only.encoder.layers[0].drop_path_rate == 0
    torch.manual_seed(0)
    scales = model.encoder.layers[2].train()._drop_path(Segments([2] * 4000))
    for branch in scales:
        assert branch.unique().tolist() == [0.0, pytest.approx(1 / 0.6)]
        assert torch.equal(branch[::2], branch[1::2])  # a series is dropped whole
        assert float(branch.mean()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(*scales)
