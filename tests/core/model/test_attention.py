"""Attention of packed rows: the kernels it chooses, its outputs and its gradients."""

import pytest
import torch

from roma_core.model import attention
from roma_core.model.attention import _runs_packed, packed_attention, padded_attention
from roma_core.model.packing import Segments


@pytest.mark.parametrize(
    ("dtype", "width", "drops", "capability", "packed"),
    [
        (torch.bfloat16, 64, False, (9, 0), True),
        (torch.float16, 256, False, (8, 0), True),
        (torch.bfloat16, 60, False, (9, 0), False),
        (torch.bfloat16, 264, False, (9, 0), False),
        (torch.bfloat16, 64, True, (9, 0), False),
        (torch.bfloat16, 64, False, (7, 5), False),
        (torch.float32, 64, False, (9, 0), False),
    ],
)
def test_a_gpu_attends_to_packed_rows_where_its_kernel_can_and_says_so_once(
    monkeypatch, caplog, dtype, width, drops, capability, packed
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _runs_packed.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            case = torch.device("cuda"), dtype, width, drops
            assert _runs_packed(*case) is packed
    _runs_packed.cache_clear()
    (record,) = caplog.records
    assert record.levelname == ("INFO" if packed else "WARNING")
    assert ("varlen_attn" if packed else "ROMA_TRAINER_MIXED_PRECISION") in record.message


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


@pytest.mark.parametrize("matrix_units", [True, False])
def test_training_in_16_bits_has_nearly_the_gradients_of_32_bits(monkeypatch, matrix_units):
    monkeypatch.setattr(attention, "has_matrix_units", lambda: matrix_units)
    torch.manual_seed(0)
    queries, keys = (
        Segments([3, 1, 1, 0, 200]),
        Segments([3, 7, 7, 2, 200]),
    )  # a series asks nothing
    inputs = [torch.randn(s.total, 2, 8).bfloat16() for s in (queries, keys, keys)]
    weight = torch.randn(queries.total, 2, 8).bfloat16()

    def results(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = packed_attention(*leaves, queries, keys)
        return out, *torch.autograd.grad(out, leaves, weight.to(dtype))

    for half, exact in zip(results(torch.bfloat16), results(torch.float32), strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), exact, rtol=0.02, atol=0.02)
    unasked = slice(3 + 7 + 7, 3 + 7 + 7 + 2)
    assert not any(grad[unasked].any() for grad in results(torch.bfloat16)[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_which_none_is_queried_give_nothing(dtype):
    none, keys = Segments([0, 0]), Segments([1, 2])
    q, k = torch.zeros(0, 2, 8, dtype=dtype), torch.ones(3, 2, 8, dtype=dtype)
    assert packed_attention(q, k, k, none, keys).shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1, 4, 4], [0, 2, 2], [0, 0, 0]])
def test_the_operator_is_what_its_shape_for_the_compiler_says(dtype, lengths):
    queries, keys = Segments(lengths), Segments([1, 4, 4])
    inputs = [torch.randn(s.total, 2, 8, dtype=dtype) for s in (queries, keys, keys)]
    arguments = *inputs, queries.cu_seqlens, keys.cu_seqlens
    torch.library.opcheck(attention._cpu_attention, arguments, test_utils="test_faketensor")


def test_no_series_at_all_have_gradients_of_no_rows():
    none, x = Segments([]), torch.zeros(0, 2, 8, requires_grad=True)
    packed_attention(x, x, x, none, none).sum().backward()
    assert x.grad.shape == x.shape
