"""Every kernel in fp32 against the reference arithmetic in float64, on a GPU or under Triton's interpreter.

The interpreter returns garbage for bf16 without an error, so bf16 is tested in test_gpu.py alone.
"""

from itertools import pairwise

import pytest
import torch

from mosaicbert_ds.ops import reference

pytest.importorskip("triton")

from mosaicbert_ds.ops import attention_triton, dropout_layernorm_triton, geglu_triton, masked_lm_loss_triton
from mosaicbert_ds.ops.column_sums_triton import column_sums

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-6  # fp32 resolves 6e-8; the sums here have at most a few hundred terms


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def run(function, inputs, weight, dtype=None):
    """The output and the gradients of its weighted sum, with `inputs` cast to `dtype`."""
    inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in inputs)]


def assert_agree(kernel, truth, inputs, weight, tolerance=TOLERANCE):
    found = run(kernel, inputs, weight)
    expected = run(truth, inputs, weight.double(), torch.float64)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < tolerance
    return found


@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "trailing", "spare"),
    [
        ([1], 1, 32, 0, 0),
        ([2, 1, 0, 16, 15], 3, 16, 5, 0),
        ([17, 5], 2, 64, 20, 0),
        ([33, 0, 1], 1, 32, 3, 40),
        ([3, 1], 16, 16, 0, 0),
        ([16, 2], 1, 128, 1, 0),
        ([127], 1, 64, 1, 0),
        ([128], 1, 32, 0, 0),
        ([129, 3], 1, 32, 2, 0),
        ([129], 1, 64, 0, 0),
        ([130], 1, 128, 0, 0),
        ([140, 0, 9], 2, 16, 0, 120),
        ([511, 1], 1, 32, 0, 0),
        ([1024], 1, 16, 0, 0),
    ],
)
def test_attention_and_its_gradient(poisoned, lengths, heads, head_dim, trailing, spare):
    if DEVICE == "cuda" and head_dim >= 64 and max(lengths) > 64:
        pytest.skip("over fp32 products of this size the compiler takes minutes; test_gpu.py: bf16")
    qkv = normal(sum(lengths) + trailing, 3, heads, head_dim)
    weight = normal(sum(lengths) + trailing, heads, head_dim, seed=1)
    slopes, cu_seqlens = reference.alibi_slopes(heads, DEVICE), cu_seqlens_of(lengths)
    max_seqlen = max(lengths) + spare
    out, grad = assert_agree(
        lambda x: attention_triton.attention(x, slopes, cu_seqlens, max_seqlen),
        lambda x: reference.attention(x, slopes, cu_seqlens, max_seqlen),
        [qkv],
        weight,
    )
    assert not out[sum(lengths) :].any()
    assert not grad[sum(lengths) :].any()


def test_attention_without_any_bias():
    qkv, cu_seqlens, slopes = normal(11, 3, 2, 16), cu_seqlens_of([7, 4]), torch.zeros(2, device=DEVICE)
    assert_agree(
        lambda x: attention_triton.attention(x, slopes, cu_seqlens, 9),
        lambda x: reference.attention(x, slopes, cu_seqlens, 9),
        [qkv],
        normal(11, 2, 16, seed=1),
    )


def test_attention_reads_rows_that_are_not_contiguous_and_ignores_what_stands_behind_the_sequences():
    wide = normal(12, 2, 3, 2, 16)
    wide[9:] = float("nan")
    qkv, slopes, cu_seqlens = wide[:, 1], reference.alibi_slopes(2, DEVICE), cu_seqlens_of([4, 5, 0])
    out = attention_triton.attention(qkv, slopes, cu_seqlens, 5)
    expected = reference.attention(qkv.double(), slopes, cu_seqlens, 5)
    assert error(out, expected) < TOLERANCE


@pytest.mark.parametrize("lengths", [[20, 7], [130]])
def test_attention_dropout_has_one_mask_for_both_passes(lengths):
    """With v the identity the output is the dropped probabilities themselves, which shows the mask."""
    heads, head_dim, longest, p = 2, 16, max(lengths), 0.25
    slopes, cu_seqlens = reference.alibi_slopes(heads, DEVICE), cu_seqlens_of(lengths)
    qkv = normal(sum(lengths), 3, heads, head_dim)
    seed = torch.tensor([5], device=DEVICE)
    scale = attention_triton.keep_scale.fn(attention_triton.drop_threshold(p))
    starts = cu_seqlens.tolist()
    kept = torch.zeros(len(lengths), heads, longest, longest, device=DEVICE)
    for first_key in range(0, longest, head_dim):
        probe = qkv.clone()
        for sequence, (start, end) in enumerate(pairwise(starts)):
            keys = torch.arange(end - start, device=DEVICE)[:, None] - first_key
            probe[start:end, 2] = (keys == torch.arange(head_dim, device=DEVICE)).float()[:, None]
            out = attention_triton.attention_forward(probe, slopes, cu_seqlens, longest, seed, p)[0]
            width = min(head_dim, longest - first_key)
            part = out[start:end].transpose(0, 1)[..., :width]
            kept[sequence, :, : end - start, first_key : first_key + width] = (part > 0).float()
    filled = torch.cat([kept[i, :, :n, :n].flatten() for i, n in enumerate(lengths)])
    assert abs(filled.mean() - (1 - p)) < 4 * (p * (1 - p) / filled.numel()) ** 0.5

    def masked(x):
        """The reference with this mask in the place of its own dropout."""
        out = x.new_zeros(x.shape[0], heads, head_dim)
        for sequence, (start, end) in enumerate(pairwise(starts)):
            q, k, v = x[start:end].permute(1, 2, 0, 3)
            n = end - start
            place = torch.arange(n, device=DEVICE)
            bias = -slopes[:, None, None] * (place[:, None] - place).abs()
            probabilities = (q @ k.mT * head_dim**-0.5 + bias).softmax(-1)
            out[start:end] = (probabilities * kept[sequence, :, :n, :n] * scale @ v).transpose(0, 1)
        return out

    assert_agree(
        lambda x: attention_triton.attention_forward(x, slopes, cu_seqlens, longest, seed, p)[0],
        masked,
        [qkv],
        normal(sum(lengths), heads, head_dim, seed=1),
    )


@pytest.mark.parametrize("lengths", [[40, 17], [140, 30]], ids=["one tile", "by blocks"])
def test_what_keys_and_values_have_in_common_costs_queries_no_exactness(poisoned, lengths):
    """It cancels in the queries' gradient, but only with a row sum of dO O to which O came unrounded: else
    this is five times as far off as PyTorch. In fp16, as the interpreter knows no bf16."""
    qkv, weight = normal(sum(lengths), 3, 2, 16), normal(sum(lengths), 2, 16, seed=1).half()
    qkv[:, 1] += 1.0
    qkv[:, 2] += 4.0
    arguments = (reference.alibi_slopes(2, DEVICE), cu_seqlens_of(lengths), max(lengths))
    (_, ours), (_, theirs), (_, truth) = (
        run(lambda x, f=f: f(x, *arguments), [qkv.half()], weight, dtype)
        for f, dtype in (
            (attention_triton.attention, torch.float16),
            (reference.attention, torch.float16),
            (reference.attention, torch.float64),
        )
    )
    assert error(ours[:, 0], truth[:, 0]) <= 1.2 * error(theirs[:, 0], truth[:, 0])


ROWS = [(rows, 24) for rows in (2, 15, 16, 17, 127, 128, 129)]


def test_columns_that_are_known_to_sum_up_to_zero_are_not_read():
    x = normal(70, 900)
    expected = x.double().sum(0)
    known = range(300, 850)  # with tiles at both ends that are read in part
    x[:, known.start : known.stop] = float("nan")
    expected[known.start : known.stop] = 0.0
    torch.testing.assert_close(column_sums(x, zeros=known).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [[5, 17], [130]])
def test_the_bias_of_the_keys_has_no_gradient(lengths, dropout_p):
    """It shifts all scores of a query alike; the kernels' sum over the keys is rounding beside the others."""
    slopes, cu_seqlens = reference.alibi_slopes(2, DEVICE), cu_seqlens_of(lengths)
    qkv, weight = normal(sum(lengths), 3, 2, 16), normal(sum(lengths), 2, 16, seed=1)
    _, gradient = run(
        lambda x: attention_triton.attention(x, slopes, cu_seqlens, max(lengths), dropout_p), [qkv], weight
    )
    queries, keys, _ = gradient.double().sum(0).norm(dim=(1, 2))
    assert keys < 1e-5 * queries


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 24), (3, 520), *ROWS])
def test_geglu_and_its_gradient(poisoned, rows, width):
    gate_value = normal(rows, 2 * width) * 2
    assert_agree(geglu_triton.geglu, reference.geglu, [gate_value], normal(rows, width, seed=1))


def test_geglu_is_exact_in_the_tails():
    gate = torch.linspace(-8, 8, 4001, device=DEVICE)
    gate_value = torch.stack([gate, torch.ones_like(gate)], 1)
    expected = gate.double() * 0.5 * torch.special.erfc(-gate.double() / 2**0.5)
    found = geglu_triton.geglu(gate_value)[:, 0]
    # Relative to each value, not to the largest: fp32's exp of -32 is good to 32 roundings.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_geglu_dropout_has_one_mask_for_both_passes():
    gate_value, weight, p = normal(40, 2 * 264), normal(40, 264, seed=1), 0.1
    seed = torch.tensor([2**40 + 3], device=DEVICE)
    keep = geglu_triton.geglu_forward(gate_value, seed, p) != 0
    assert abs(keep.float().mean() - 0.9) < 4 * (0.09 / keep.numel()) ** 0.5
    scale = 65536 / (65536 - round(p * 65536))
    assert_agree(
        lambda x: geglu_triton.geglu_forward(x, seed, p),
        lambda x: reference.geglu(x) * keep * scale,
        [gate_value],
        weight,
    )


def layer_norm_inputs(rows, width):
    """x, its bias, residual, weight, bias"""
    shapes = [(rows, width), (width,), (rows, width), (width,), (width,)]
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 24), (3, 520), *ROWS])
def test_layer_norm_and_its_gradient(poisoned, rows, width):
    assert_agree(
        lambda *x: dropout_layernorm_triton.dropout_add_layer_norm(*x, 1e-12, 0.0),
        lambda x, xb, r, w, b: torch.nn.functional.layer_norm(x + xb + r, (width,), w, b, 1e-12),
        layer_norm_inputs(rows, width),
        normal(rows, width, seed=4),
    )


def test_layer_norm_dropout_has_one_mask_for_both_passes():
    rows, width, p = 40, 264, 0.1
    seed = torch.tensor([9], device=DEVICE)
    x = torch.ones(rows, width, device=DEVICE, requires_grad=True)
    ones, zeros = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    # Of a row of ones and a residual of zeros the survivors stand out above the mean.
    out = dropout_layernorm_triton.layer_norm_forward(
        x, zeros, torch.zeros_like(x), ones, zeros, seed, 1e-12, p
    )[0]
    keep = out > 0
    assert abs(keep.float().mean() - 0.9) < 4 * (0.09 / keep.numel()) ** 0.5
    scale = 65536 / (65536 - round(p * 65536))
    assert_agree(
        lambda *x: dropout_layernorm_triton.layer_norm_forward(*x, seed, 1e-12, p)[0],
        lambda x, xb, r, w, b: torch.nn.functional.layer_norm(
            (x + xb) * keep * scale + r, (width,), w, b, 1e-12
        ),
        layer_norm_inputs(rows, width),
        normal(rows, width, seed=4),
    )


@pytest.mark.parametrize("vocab", [64, 5000])
def test_loss_its_gradient_and_the_count(poisoned, vocab):
    hidden, weight, bias = normal(9, 16), normal(vocab, 16, seed=1), normal(vocab, seed=2)
    logits = hidden @ weight.T + bias
    labels = torch.randint(vocab, (9,), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    labels[2] = labels[8] = -100
    labels[4] = logits[4].argmax()
    inputs = [hidden, weight, bias]
    scale = torch.tensor(0.37, device=DEVICE)
    assert_agree(
        lambda *x: masked_lm_loss_triton.masked_lm_loss(*x, labels)[0],
        lambda *x: torch.nn.functional.cross_entropy(
            torch.nn.functional.linear(*x), labels, ignore_index=-100, reduction="sum"
        ),
        inputs,
        scale,
    )
    with torch.no_grad():
        loss_sum, num_correct = masked_lm_loss_triton.masked_lm_loss(*inputs, labels)
    expected, expected_correct = reference.masked_lm_loss(*inputs, labels)
    torch.testing.assert_close(loss_sum, expected)
    assert num_correct == expected_correct
    assert (loss_sum.dtype, num_correct.dtype) == (torch.float32, torch.int64)


def test_of_equal_scores_the_first_is_the_prediction():
    hidden, weight, bias = torch.zeros(2, 8, device=DEVICE), normal(6000, 8), torch.zeros(6000, device=DEVICE)
    labels = torch.tensor([0, 4096], device=DEVICE)
    assert masked_lm_loss_triton.masked_lm_loss(hidden, weight, bias, labels)[1] == 1


@pytest.mark.parametrize("labels", [[-100, -100, -100], []])
def test_loss_without_any_label_is_zero_with_zero_gradient(labels):
    labels = torch.tensor(labels, dtype=torch.int64, device=DEVICE)
    hidden, weight = normal(len(labels), 8).requires_grad_(), normal(64, 8).requires_grad_()
    loss_sum, num_correct = masked_lm_loss_triton.masked_lm_loss(
        hidden, weight, torch.zeros(64, device=DEVICE), labels
    )
    loss_sum.backward()
    assert (loss_sum, num_correct) == (0, 0)
    assert not weight.grad.any()


@pytest.mark.parametrize("op", ["geglu", "layer_norm", "attention"])
def test_manual_seed_decides_the_mask(op):
    x = normal(30, 3 * 2 * 16)
    ones, zeros = torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE)

    def call():
        if op == "geglu":
            return geglu_triton.geglu(x, 0.3)
        if op == "layer_norm":
            return dropout_layernorm_triton.dropout_add_layer_norm(x, zeros, x, ones, zeros, 1e-12, 0.3)
        qkv = x.view(30, 3, 2, 16)
        return attention_triton.attention(qkv, ones[:2], cu_seqlens_of([10, 20]), 20, 0.3)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)


def test_activation_checkpointing_draws_the_same_mask_again_in_an_operation():
    gate_value = normal(8, 32)
    plain = gate_value.clone().requires_grad_()
    torch.manual_seed(3)
    geglu_triton.geglu(plain, 0.5).sum().backward()
    again = gate_value.clone().requires_grad_()
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(geglu_triton.geglu, again, 0.5, use_reentrant=False).sum().backward()
    assert torch.equal(plain.grad, again.grad)
