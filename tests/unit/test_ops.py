"""The reference arithmetic against plain definitions, sequence by sequence, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds import ops
from mosaicbert_ds.ops import reference


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def naive_attention(qkv, slopes, lengths):
    """One sequence and one head at a time."""
    out = torch.zeros_like(qkv[:, 0])
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        distance = (torch.arange(length)[:, None] - torch.arange(length)).abs()
        for head in range(qkv.shape[2]):
            q, k, v = qkv[rows, :, head].unbind(1)
            scores = q @ k.T / math.sqrt(qkv.shape[3]) - slopes[head] * distance
            out[rows, head] = scores.softmax(-1) @ v
        start += length
    return out


def test_slopes_are_those_of_the_published_model():
    expected = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    torch.testing.assert_close(ops.alibi_slopes(12), torch.tensor(expected))
    torch.testing.assert_close(ops.alibi_slopes(16), torch.tensor([2.0 ** -(i / 2) for i in range(1, 17)]))
    torch.testing.assert_close(ops.alibi_slopes(1), torch.tensor([2.0**-8]))
    # 6 heads: 2^-2 to 2^-8 for the first four, then the first odd members for 8 heads
    torch.testing.assert_close(
        ops.alibi_slopes(6), torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    )


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    trailing=st.integers(0, 5),
    spare_length=st.integers(0, 9),
    query_chunk=st.sampled_from([7, 512]),
)
def test_attention_and_its_gradient_equal_the_naive_loop(lengths, trailing, spare_length, query_chunk):
    tokens = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(tokens + trailing, 3, 3, 8, generator=generator, requires_grad=True)
    weight = torch.randn(tokens, 3, 8, generator=generator)
    slopes = ops.alibi_slopes(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_CHUNK", query_chunk)
        out = reference.attention(qkv, slopes, cu_seqlens_of(lengths), max(lengths) + spare_length, 0.0)
        (out[:tokens] * weight).sum().backward()

    exact = qkv.detach()[:tokens].double().requires_grad_()
    expected = naive_attention(exact, slopes.double(), lengths)
    (expected * weight).sum().backward()
    torch.testing.assert_close(out[:tokens], expected.float(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(qkv.grad[:tokens], exact.grad.float(), rtol=1e-5, atol=2e-6)
    assert not out[tokens:].any()
    assert not qkv.grad[tokens:].any()


def test_rows_behind_the_last_sequence_give_zeros_even_when_they_hold_no_numbers():
    qkv = torch.randn(12, 3, 2, 4)
    qkv[9:] = float("nan")
    out = reference.attention(qkv.requires_grad_(), ops.alibi_slopes(2), cu_seqlens_of([4, 5, 0, 0]), 8, 0.0)
    assert out.isfinite().all()
    assert not out[9:].any()
    out.sum().backward()
    assert not qkv.grad[9:].any()


def test_attention_dropout_keeps_the_mean_and_is_absent_at_zero():
    qkv = torch.randn(64, 3, 2, 4)
    arguments = (qkv, ops.alibi_slopes(2), cu_seqlens_of([64]), 64)
    exact = reference.attention(*arguments, 0.0)
    torch.manual_seed(0)
    mean = torch.stack([reference.attention(*arguments, 0.2) for _ in range(400)]).mean(0)
    assert not torch.equal(reference.attention(*arguments, 0.2), exact)
    assert (mean - exact).abs().max() < 0.15


def test_geglu_gates_with_the_exact_gelu():
    gate_value = torch.randn(5, 12, dtype=torch.float64)
    gate, value = gate_value[:, :6], gate_value[:, 6:]
    expected = 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * value
    torch.testing.assert_close(reference.geglu(gate_value, 0.0), expected)
    torch.manual_seed(0)
    dropped = reference.geglu(gate_value, 0.5)
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, 2 * expected))


def test_layer_norm_takes_its_statistics_in_fp32():
    x, residual = torch.randn(6, 48).bfloat16(), (torch.randn(6, 48) + 100).bfloat16()
    x_bias, weight, bias = (torch.randn(48).bfloat16() for _ in range(3))
    out = reference.dropout_add_layer_norm(x, x_bias, residual, weight, bias, 1e-12, 0.0)
    assert out.dtype == torch.bfloat16
    total = x.double() + x_bias.double() + residual.double()
    expected = F.layer_norm(total, (48,), weight.double(), bias.double(), 1e-12)
    # half a unit in the last place of bf16, which has 8 bits
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)


def test_loss_sums_over_the_labels_and_counts_the_correct_ones():
    hidden, weight, bias = torch.randn(7, 16), torch.randn(64, 16), torch.randn(64)
    logits = hidden @ weight.T + bias
    labels = torch.tensor([0, 5, -100, 9, -100, 63, 0])
    labels[1] = logits[1].argmax()
    expected = -sum(logits[i].log_softmax(-1)[labels[i]] for i in range(7) if labels[i] != -100)
    loss_sum, num_correct = ops.masked_lm_loss(hidden, weight, bias, labels)
    torch.testing.assert_close(loss_sum, expected)
    assert num_correct == sum(int(logits[i].argmax() == labels[i]) for i in range(7))
    assert (loss_sum.dtype, num_correct.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("labels", [torch.full((3,), -100), torch.empty(0, dtype=torch.int64)])
def test_loss_without_any_label_is_zero_with_zero_gradient(labels):
    hidden = torch.randn(len(labels), 8, requires_grad=True)
    weight = torch.randn(64, 8, requires_grad=True)
    loss_sum, num_correct = ops.masked_lm_loss(hidden, weight, torch.zeros(64), labels)
    loss_sum.backward()
    assert loss_sum == 0
    assert num_correct == 0
    assert not weight.grad.any()
