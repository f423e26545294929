"""The two halves of a layer against autograd's chain of their parts: every gradient, also with dropout.

fp32 on a GPU or under Triton's interpreter; in bf16 `test_gpu.py` runs them against float64.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mosaicbert_ds.ops import reference
from mosaicbert_ds.ops.reference import AttentionWeights, MLPWeights

pytest.importorskip("triton")

from mosaicbert_ds.ops import (
    attention_triton,
    blocks_triton,
    dropout_layernorm_triton,
    embedding_triton,
    geglu_triton,
    layernorm_dropout_triton,
)
from mosaicbert_ds.ops.column_sums_triton import add_partials, column_sums
from mosaicbert_ds.ops.dropout_triton import draw_seed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIDDEN, HEADS, INTERMEDIATE, EPS = 32, 2, 48, 1e-12
LENGTHS, TRAILING = [5, 0, 17, 3], 2
TOLERANCE = 2e-6  # fp32 resolves 6e-8; the sums here have at most a few hundred terms


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def weight(*shape):
    return normal(*shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0)


def attention_weights(dtype=torch.float32):
    shapes = [(3 * HIDDEN, HIDDEN), (3 * HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,)]
    return AttentionWeights(*(weight(*shape).to(dtype) for shape in shapes))


def mlp_weights(dtype=torch.float32):
    shapes = [(2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (HIDDEN,), (HIDDEN,), (HIDDEN,)]
    return MLPWeights(*(weight(*shape).to(dtype) for shape in shapes))


def chained_norm(x, x_bias, hidden, stream, w, eps, p):
    """The end of a half, post-LN or pre-LN, as an operation of its own."""
    if stream is None:
        return dropout_layernorm_triton.dropout_add_layer_norm(
            x, x_bias, hidden, w.norm_weight, w.norm_bias, eps, p
        ), None
    seed = draw_seed(x.device) if p else None
    out, _, _, total = dropout_layernorm_triton.layer_norm_forward(
        x, x_bias, stream, w.norm_weight, w.norm_bias, seed, eps, p, keep_sum=True
    )
    return out, total


def chained_attention_block(hidden, w, slopes, cu_seqlens, max_seqlen, eps, p_attention, p_hidden, stream):
    """The block from its kernels, linked by autograd."""
    qkv = F.linear(hidden, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, HEADS, -1))
    context = attention_triton.attention(qkv, slopes, cu_seqlens, max_seqlen, p_attention).flatten(1)
    return chained_norm(F.linear(context, w.dense_weight), w.dense_bias, hidden, stream, w, eps, p_hidden)


def chained_mlp_block(hidden, w, eps, p, stream):
    gated = geglu_triton.geglu(F.linear(hidden, w.gate_value_weight), p)
    return chained_norm(F.linear(gated, w.down_weight), w.down_bias, hidden, stream, w, eps, 0.0)


def gradients(block, inputs, weights, d_outs, dtype, seed=0):
    """Outputs and gradients of `block(*inputs, weights)`; an input or output may be None."""
    inputs, weights = (
        [None if x is None else x.detach().to(dtype).requires_grad_() for x in part]
        for part in (inputs, weights)
    )
    torch.manual_seed(seed)
    outs = block(*inputs, weights)
    outs = [out for out in (outs if isinstance(outs, tuple) else (outs,)) if out is not None]
    torch.autograd.backward(outs, [d[: len(out)].to(dtype) for out, d in zip(outs, d_outs, strict=False)])
    return [out.detach() for out in outs] + [x.grad for x in (*inputs, *weights) if x is not None]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert ((a.double() - b.double()).norm() / b.double().norm()).item() < TOLERANCE


def attention_block_of(block, dropout_p):
    cu_seqlens = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    slopes = reference.alibi_slopes(HEADS, DEVICE)
    return lambda hidden, stream, weights: block(
        hidden, AttentionWeights(*weights), slopes, cu_seqlens, max(LENGTHS), EPS, dropout_p, dropout_p,
        stream,
    )  # fmt: skip


def without_norm_bias(weights, norm):
    """RMSNorm has none."""
    return weights if norm == "layernorm" else weights._replace(norm_bias=None)


def inputs_of(placement, rows):
    """hidden, and in pre-LN the residual stream; gradients of both outputs"""
    hidden, stream = normal(rows, HIDDEN), normal(rows, HIDDEN)
    return (hidden, stream if placement == "pre" else None), (normal(rows, HIDDEN), normal(rows, HIDDEN))


NORMS = [("layernorm", "post"), ("layernorm", "pre"), ("rmsnorm", "post"), ("rmsnorm", "pre")]


@pytest.mark.parametrize(("norm", "placement"), NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_attention_block_has_the_gradients_of_its_parts(dropout_p, norm, placement):
    inputs, d_outs = inputs_of(placement, sum(LENGTHS) + TRAILING)
    weights = without_norm_bias(attention_weights(), norm)
    block, chain = (
        attention_block_of(f, dropout_p) for f in (blocks_triton.attention_block, chained_attention_block)
    )
    found = gradients(block, inputs, weights, d_outs, torch.float32)
    assert_close(found, gradients(chain, inputs, weights, d_outs, torch.float32))
    if not dropout_p:
        exact = attention_block_of(reference.attention_block, 0.0)
        assert_close(found, gradients(exact, inputs, weights, d_outs, torch.float64))


def narrow_block_of(block, lengths, positions, dropout_p):
    """The attention block where only the tokens at `positions` ask, all of them where that is None."""
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    slopes = reference.alibi_slopes(HEADS, DEVICE)

    def narrow(hidden, stream, memory, weights):
        queries = reference.Queries(torch.arange(len(hidden), device=DEVICE), cu_seqlens)
        if positions is not None:
            asked = torch.tensor(positions, device=DEVICE)
            queries, *_ = reference.queries_at(asked, cu_seqlens, len(memory))
        return block(
            hidden, AttentionWeights(*weights), slopes, cu_seqlens, max(lengths), EPS,
            dropout_p, dropout_p, stream, memory, queries,
        )  # fmt: skip

    return narrow


@pytest.mark.parametrize(("norm", "placement"), [NORMS[0], NORMS[-1]])
@pytest.mark.parametrize(
    ("lengths", "positions"),
    [(LENGTHS, [3, 0, 24, 11, 11, 26]), (LENGTHS, []), ([70, 140, 1], [*range(5, 75), *range(150, 211, 2)])],
    ids=["short", "nothing", "long"],
)
def test_narrow_attention_block_has_the_gradients_of_the_reference(lengths, positions, norm, placement):
    """Some positions twice, some of no sequence, sequences of which none is asked for."""
    (hidden, stream), d_outs = inputs_of(placement, max(1, len(positions)))
    memory, weights = normal(sum(lengths) + TRAILING, HIDDEN), without_norm_bias(attention_weights(), norm)
    found, expected = (
        gradients(
            narrow_block_of(module.attention_block, lengths, positions, 0.0),
            (hidden, stream, memory), weights, d_outs, dtype,
        )
        for module, dtype in ((blocks_triton, torch.float32), (reference, torch.float64))
    )  # fmt: skip
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= TOLERANCE * b.double().norm()


@pytest.mark.parametrize(("lengths", "placement"), [(LENGTHS, "post"), (LENGTHS, "pre"), ([131, 2], "pre")])
def test_where_all_tokens_ask_the_narrow_attention_block_is_the_plain_one(lengths, placement):
    """With dropout, whose masks do not depend on how the tiles lie."""
    (hidden, stream), d_outs = inputs_of(placement, sum(lengths) + TRAILING)
    weights = attention_weights()
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    slopes = reference.alibi_slopes(HEADS, DEVICE)

    def plain(hidden, stream, weights):
        arguments = (slopes, cu_seqlens, max(lengths), EPS, 0.3, 0.3, stream)
        return blocks_triton.attention_block(hidden, AttentionWeights(*weights), *arguments)

    narrow = narrow_block_of(blocks_triton.attention_block, lengths, None, 0.3)
    expected = gradients(plain, (hidden, stream), weights, d_outs, torch.float32)
    found = gradients(
        lambda hidden, stream, weights: narrow(hidden, stream, hidden, weights),
        (hidden, stream), weights, d_outs, torch.float32,
    )  # fmt: skip
    assert_close(found, expected)


def mlp_block_of(block, dropout_p):
    return lambda hidden, stream, weights: block(hidden, MLPWeights(*weights), EPS, dropout_p, stream)


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("half", ["attention", "mlp"])
def test_activation_checkpointing_changes_no_bit(half, placement):
    """It lets a backward read what was saved once, and recomputes it from the same dropout masks."""
    inputs, d_outs = inputs_of(placement, sum(LENGTHS) + TRAILING)
    weights = attention_weights() if half == "attention" else mlp_weights()
    block = (
        attention_block_of(blocks_triton.attention_block, 0.3)
        if half == "attention"
        else mlp_block_of(blocks_triton.mlp_block, 0.3)
    )

    def checkpointed(hidden, stream, weights):
        return checkpoint(
            lambda *tensors: block(*tensors[:2], tensors[2:]), hidden, stream, *weights, use_reentrant=False
        )

    plain = gradients(block, inputs, weights, d_outs, torch.float32)
    again = gradients(checkpointed, inputs, weights, d_outs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(("norm", "placement"), NORMS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_mlp_block_has_the_gradients_of_its_parts(dropout_p, norm, placement):
    inputs, d_outs = inputs_of(placement, 20)
    weights = without_norm_bias(mlp_weights(), norm)

    def of(block):
        return lambda hidden, stream, weights: block(hidden, MLPWeights(*weights), EPS, dropout_p, stream)

    found = gradients(of(blocks_triton.mlp_block), inputs, weights, d_outs, torch.float32)
    assert_close(found, gradients(of(chained_mlp_block), inputs, weights, d_outs, torch.float32))
    if not dropout_p:
        exact = gradients(of(reference.mlp_block), inputs, weights, d_outs, torch.float64)
        assert_close(found, exact)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kinds", [1, 9])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_embedding_norm_has_the_gradients_of_its_parts(norm, kinds, dropout_p):
    op = layernorm_dropout_triton.add_layer_norm_dropout
    x, d_out = normal(9, HIDDEN), normal(9, HIDDEN)
    weights = [normal(kinds, HIDDEN), normal(HIDDEN), normal(HIDDEN) if norm == "layernorm" else None]
    torch.manual_seed(0)
    ones = torch.ones(HIDDEN, device=DEVICE)  # a LayerNorm of zeros is its bias: what is kept of ones
    kept = op(torch.zeros_like(x), torch.zeros_like(weights[0]), ones, ones, EPS, dropout_p)
    found = gradients(lambda x, w: op(x, *w, EPS, dropout_p), (x,), weights, (d_out,), torch.float32)
    exact = gradients(
        lambda x, w: reference.add_layer_norm_dropout(x, *w, EPS, 0.0) * kept,
        (x,),
        weights,
        (d_out,),
        torch.float64,
    )
    assert_close(found, exact)


@pytest.mark.parametrize("words", [1, 3, 40, 500])
@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 97, 700])
@pytest.mark.parametrize("blocks", [1, embedding_triton.BLOCKS], ids=["large blocks", "small blocks"])
def test_embedding_adds_each_tokens_gradient_to_its_word(monkeypatch, blocks, tokens, words):
    """Runs of one word within a block of places, from one into the next, and over many."""
    monkeypatch.setattr(embedding_triton, "BLOCKS", blocks)
    ids = (torch.rand(tokens, device=DEVICE) ** 4 * words).long()  # some words often, some never
    table, d_out, total = normal(words, 24), normal(tokens, 24), normal(words, 24)
    expected = torch.zeros(words, 24, dtype=torch.float64, device=DEVICE).index_add(0, ids, d_out.double())
    weight = table.clone().requires_grad_()
    out = embedding_triton.embedding(ids, weight)
    assert torch.equal(out, table[ids])
    out.backward(d_out)
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-5, atol=1e-5)
    weight.grad, weight.main_grad = None, total.clone()
    embedding_triton.embedding(ids, weight).backward(d_out)
    assert weight.grad is None
    torch.testing.assert_close(weight.main_grad.double(), expected + total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 24), (5000, 300)])
def test_column_sums(rows, width):
    x = normal(rows, width)
    torch.testing.assert_close(column_sums(x).double(), x.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("programs", [1, 27, 512, 1056])
def test_partial_sums_are_added_in_fp32_and_rounded_once(programs):
    partial = normal(programs, 3, 24)
    found = add_partials(partial, torch.float32)
    torch.testing.assert_close(found.double(), partial.double().sum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(add_partials(partial, torch.float16), found.half())


DTYPES = [torch.float32] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("norm", "placement"), [NORMS[0], NORMS[-1]])
@pytest.mark.parametrize("half", ["mlp", "narrow attention"])
def test_weights_with_a_main_grad_get_their_gradients_added_there(half, dtype, norm, placement):
    inputs, d_outs = ([x if x is None else x.to(dtype) for x in part] for part in inputs_of(placement, 20))
    hidden, stream = inputs
    weights = without_norm_bias(mlp_weights(dtype) if half == "mlp" else attention_weights(dtype), norm)
    given = [w.requires_grad_() for w in weights if w is not None]
    narrow = narrow_block_of(blocks_triton.attention_block, [16, 4], None, 0.0)

    def add_gradients():
        if half == "mlp":
            outs = blocks_triton.mlp_block(hidden, weights, EPS, 0.0, stream)
        else:
            outs = narrow(hidden, stream, hidden, weights)
        torch.autograd.backward([out for out in outs if out is not None], d_outs[: 1 + (placement == "pre")])

    add_gradients()
    expected = [w.grad.float() for w in given]
    for w in given:
        w.grad, w.main_grad = None, torch.full_like(w, 2.0, dtype=torch.float32)
    for _ in range(3):
        add_gradients()
    assert all(w.grad is None for w in given)
    for w, once in zip(given, expected, strict=True):
        # A gradient rounded to bf16 against one that may never have been: half a unit in the last of 8 bits.
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            w.main_grad, 2 + 3 * once, rtol=tolerance, atol=tolerance * once.abs().max()
        )
