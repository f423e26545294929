"""Every kernel in bf16 on a GPU, over the shapes that training and finetuning meet.

    python -m pytest -m gpu tests/kernels          (add `-n 8` to compile on eight cores)

Truth is the reference arithmetic on float64 inputs; a kernel may be at most 1.2 times as far from it as the
same reference in bf16. Inputs are fresh in each run, and memory is poisoned with NaN before each call.
"""

from functools import partial

import pytest
import torch

from mosaicbert_ds.ops import reference

pytest.importorskip("triton")

from mosaicbert_ds.ops import (
    attention_triton,
    blocks_triton,
    dropout_layernorm_triton,
    geglu_triton,
    layernorm_dropout_triton,
    masked_lm_loss_triton,
)
from mosaicbert_ds.ops.reference import AttentionWeights, MLPWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

RATIO = 1.2
# Of gradients that are zero in exact arithmetic (a token that attends to itself alone) only the size counts.
FLOOR = 1e-5

LENGTHS = [
    *([n] for n in (1, 2, 15, 16, 17, 127, 128, 129, 511, 1024, 8192)),
    [5, 16, 0, 9, 1],
    [128, 1, 17, 0, 127, 64, 2, 90],
    [1024, 1, 129, 0, 511, 2, 128],
    [8192, 3, 700, 128],
]
# Of operations that work row by row.
ROWS = [1, 2, 15, 16, 17, 127, 128, 129, 511, 1024, 8192]


def normal(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def cu_seqlens_of(lengths):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).int()


def run(function, inputs, weight, dtype):
    inputs = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    torch.autograd.backward(out, weight.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def squared_errors(kernel, plain, inputs, weight, split=()):
    """Ours, PyTorch's and the size of the truth, squared, of the output and of the gradient of each of the
    named `inputs`, of those in `split` of each part by itself; and what the kernel gave."""
    found, torch_bf16, truth = (
        dict(zip(["output", *inputs], run(function, inputs.values(), weight, dtype), strict=True))
        for function, dtype in ((kernel, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float64))
    )
    errors = {}
    for name, exact in truth.items():
        ours, theirs = found[name], torch_bf16[name]
        assert ours.dtype == theirs.dtype, name
        assert ours.shape == exact.shape, name
        assert ours.isfinite().all(), name
        parts = [x.unbind(1) if name in split else [x] for x in (ours, theirs, exact)]
        for part, (x, y, z) in enumerate(zip(*parts, strict=True)):
            far, torchs = x.double() - z, y.double() - z
            errors[f"{name}[{part}]"] = torch.stack([e.square().sum() for e in (far, torchs, z)])
    return errors, list(found.values())


def assert_none_worse(draws):
    """`squared_errors` of one or more draws, added up: one draw of few rows compares chance with chance."""
    totals = {name: sum(errors[name] for errors in draws).sqrt().tolist() for name in draws[0]}
    worse = [
        f"{name}: {far / size:.2e} against {torchs / size:.2e}"
        for name, (far, torchs, size) in totals.items()
        if not far <= RATIO * torchs + FLOOR * size
    ]
    assert not worse


def assert_as_exact_as_torch(*arguments, **options):
    """On one draw of inputs; see `squared_errors`, whose arguments these are."""
    errors, found = squared_errors(*arguments, **options)
    assert_none_worse([errors])
    return found


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda n: "-".join(map(str, n)))
def test_attention_is_as_exact_as_torch(poisoned, lengths, head_dim):
    # A few tokens alone would compare chance with chance.
    lengths = lengths * max(1, 512 // sum(lengths))
    tokens = sum(lengths)
    for heads in [1, 3, 12, 16] if tokens < 1000 else [2, 12] if tokens < 5000 else [1]:
        for trailing in (0, 37):
            qkv = normal(tokens + trailing, 3, heads, head_dim)
            qkv[tokens:] = float("nan")
            slopes, cu_seqlens = reference.alibi_slopes(heads, "cuda"), cu_seqlens_of(lengths)
            arguments = (slopes, cu_seqlens, max(lengths))
            out, grad = assert_as_exact_as_torch(
                lambda x, a=arguments: attention_triton.attention(x, *a),
                lambda x, a=arguments: reference.attention(x, *a),
                {"qkv": qkv},
                normal(tokens + trailing, heads, head_dim),
                split=["qkv"],
            )
            assert not out[tokens:].any()
            assert not grad[tokens:].any()


def test_attention_of_large_scores_is_finite_and_as_exact_as_torch(poisoned):
    """Logits of the size of a trained model's sharpest heads."""
    for lengths in ([128, 77], [700, 300]):
        qkv = normal(sum(lengths), 3, 4, 64, scale=4)
        arguments = (reference.alibi_slopes(4, "cuda"), cu_seqlens_of(lengths), max(lengths))
        assert_as_exact_as_torch(
            lambda x, a=arguments: attention_triton.attention(x, *a),
            lambda x, a=arguments: reference.attention(x, *a),
            {"qkv": qkv},
            normal(sum(lengths), 4, 64),
            split=["qkv"],
        )


def test_attention_gradients_have_the_same_bits_each_time():
    for lengths in ([128, 77, 12], [700, 300]):
        qkv, weight = normal(sum(lengths), 3, 12, 64), normal(sum(lengths), 12, 64)
        arguments = (reference.alibi_slopes(12, "cuda"), cu_seqlens_of(lengths), max(lengths))
        runs = [
            run(lambda x, a=arguments: attention_triton.attention(x, *a), [qkv], weight, torch.bfloat16)
            for _ in "ab"
        ]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("length", [17, 128, 129, 300, 1024])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_attention_dropout_has_one_mask_for_both_passes(length, head_dim):
    """With v the identity the output is the dropped probabilities, which shows the mask."""
    heads, p = 3, 0.1
    # Equal scores: every kept probability is far from zero in bf16, and the slopes are small.
    slopes, cu_seqlens = torch.full((heads,), 1e-3, device="cuda"), cu_seqlens_of([length])
    qkv = normal(length, 3, heads, head_dim, scale=0.3)
    seed = torch.randint(2**62, (1,), device="cuda")
    kept = torch.zeros(heads, length, length, device="cuda", dtype=torch.float64)
    for first in range(0, length, head_dim):
        probe = qkv.clone()
        keys = torch.arange(length, device="cuda")[:, None] - first
        probe[:, 2] = (keys == torch.arange(head_dim, device="cuda")).bfloat16()[:, None]
        out = attention_triton.attention_forward(probe, slopes, cu_seqlens, length, seed, p)[0]
        width = min(head_dim, length - first)
        kept[..., first : first + width] = (out.transpose(0, 1)[..., :width] > 0).double()
    assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5

    def masked(x):
        """The reference with this mask in the place of its own dropout."""
        q, k, v = x.permute(1, 2, 0, 3)
        place = torch.arange(length, device="cuda")
        scores = (q @ k.mT).float() * head_dim**-0.5 - slopes[:, None, None] * (place[:, None] - place).abs()
        return ((scores.softmax(-1) * kept / (1 - p)).to(v.dtype) @ v).transpose(0, 1)

    assert_as_exact_as_torch(
        lambda x: attention_triton.attention_forward(x, slopes, cu_seqlens, length, seed, p)[0],
        masked,
        {"qkv": qkv},
        normal(length, heads, head_dim),
        split=["qkv"],
    )


@pytest.mark.parametrize(("rows", "width"), [*((rows, 3072) for rows in ROWS), (511, 4096), (3, 24)])
def test_geglu_is_as_exact_as_torch(poisoned, rows, width):
    assert_as_exact_as_torch(
        geglu_triton.geglu, reference.geglu, {"gate_value": normal(rows, 2 * width)}, normal(rows, width)
    )


def test_geglu_dropout_has_one_mask_for_both_passes(poisoned):
    rows, width, p = 1000, 3072, 0.1
    gate_value, seed = normal(rows, 2 * width), torch.randint(2**62, (1,), device="cuda")
    keep = geglu_triton.geglu_forward(torch.ones_like(gate_value), seed, p) != 0
    assert abs(keep.double().mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    assert_as_exact_as_torch(
        lambda x: geglu_triton.geglu_forward(x, seed, p),
        lambda x: reference.geglu(x) * keep / (1 - p),
        {"gate_value": gate_value},
        normal(rows, width),
    )


def test_random_bits_of_neighbours_are_independent():
    """Pairs within one Philox call, of neighbouring calls, of neighbouring rows and of two seeds."""
    rows, width, p = 2048, 3072, 0.5
    ones = torch.ones(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    first, second = (
        (geglu_triton.geglu_forward(ones, torch.tensor([seed], device="cuda"), p) != 0).double() * 2 - 1
        for seed in (11, 12)
    )
    pairs = [(first[:, :-d], first[:, d:]) for d in (1, 2, 3, 4, 5, 6, 7, 8, 64)]
    pairs += [(first[:-1], first[1:]), (first, second)]
    for a, b in pairs:
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5


def layer_norm_inputs(rows, width):
    names = ("x", "x_bias", "residual", "weight", "bias")
    return {name: normal(*(rows,) * (name in ("x", "residual")), width) for name in names}


WIDTHS = [*((rows, 768) for rows in ROWS), (511, 1024), (3, 24)]


@pytest.mark.parametrize(("rows", "width"), WIDTHS)
def test_layer_norm_is_as_exact_as_torch(poisoned, rows, width):
    inputs = layer_norm_inputs(rows, width)
    found = assert_as_exact_as_torch(
        lambda *x: dropout_layernorm_triton.dropout_add_layer_norm(*x, 1e-12, 0.0),
        lambda x, xb, r, w, b: (
            torch.nn.functional.layer_norm(x + xb + r, (width,), w, b, 1e-12)
            if x.dtype == torch.float64
            else reference.dropout_add_layer_norm(x, xb, r, w, b, 1e-12, 0.0)
        ),
        inputs,
        normal(rows, width),
    )
    again = run(
        lambda *x: dropout_layernorm_triton.dropout_add_layer_norm(*x, 1e-12, 0.0),
        inputs.values(),
        normal(rows, width),
        torch.bfloat16,
    )
    assert torch.equal(found[0], again[0])


def test_layer_norm_dropout_has_one_mask_for_both_passes(poisoned):
    rows, width, p = 3000, 768, 0.1
    seed = torch.randint(2**62, (1,), device="cuda")
    ones, zeros = torch.ones(width, device="cuda").bfloat16(), torch.zeros(width, device="cuda").bfloat16()
    x = torch.ones(rows, width, device="cuda").bfloat16()
    keep = (
        dropout_layernorm_triton.layer_norm_forward(
            x, zeros, torch.zeros_like(x), ones, zeros, seed, 1e-12, p
        )[0]
        > 0
    )
    assert abs(keep.double().mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5

    def masked(x, xb, r, w, b):
        wide = torch.promote_types(x.dtype, torch.float32)
        total = (x.to(wide) + xb.to(wide)) * keep / (1 - p) + r.to(wide)
        return torch.nn.functional.layer_norm(total, (width,), w.to(wide), b.to(wide), 1e-12).to(x.dtype)

    assert_as_exact_as_torch(
        lambda *x: dropout_layernorm_triton.layer_norm_forward(*x, seed, 1e-12, p)[0],
        masked,
        layer_norm_inputs(rows, width),
        normal(rows, width),
    )


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("one_kind", [True, False])
@pytest.mark.parametrize(("rows", "width"), WIDTHS)
def test_embedding_norm_is_as_exact_as_torch(poisoned, rows, width, one_kind, norm):
    no_bias = (None,) * (norm == "rmsnorm")
    assert_as_exact_as_torch(
        lambda *x: layernorm_dropout_triton.add_layer_norm_dropout(*x, *no_bias, 1e-12, 0.0),
        lambda *x: reference.add_layer_norm_dropout(*x, *no_bias, 1e-12, 0.0),
        {
            "x": normal(rows, width),
            "kind": normal(1 if one_kind else rows, width),
            "weight": normal(width),
            **({"bias": normal(width)} if norm == "layernorm" else {}),
        },
        normal(rows, width),
    )


def test_embedding_dropout_has_one_mask_for_both_passes(poisoned):
    rows, width, p = 3000, 768, 0.1
    ones, zeros = torch.ones(width, device="cuda").bfloat16(), normal(rows, width, scale=0)

    def dropped(*x):
        torch.manual_seed(5)
        return layernorm_dropout_triton.add_layer_norm_dropout(*x, 1e-12, p)

    keep = dropped(zeros, zeros[:1], ones, ones) > 0  # the LayerNorm of zeros is its bias
    assert abs(keep.double().mean() - (1 - p)) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    assert_as_exact_as_torch(
        dropped,
        lambda *x: reference.add_layer_norm_dropout(*x, 1e-12, 0.0) * keep / (1 - p),
        {"x": normal(rows, width), "kind": normal(1, width), "weight": normal(width), "bias": normal(width)},
        normal(rows, width),
    )


def matrix(rows, columns):
    return normal(rows, columns, scale=columns**-0.5)


MIXED = [[128, 1, 17, 0, 127, 64, 2, 90], [1024, 1, 129, 0, 511, 2, 128]]
NORMS = [("layernorm", "post"), ("layernorm", "pre"), ("rmsnorm", "post"), ("rmsnorm", "pre")]


def weights_of(kind, norm, *shapes):
    """Named inputs; the last of the weights is the bias of the norm, which an RMSNorm has not."""
    names = kind._fields if norm == "layernorm" else kind._fields[:-1]
    return {
        name: matrix(*shape) if len(shape) == 2 else normal(*shape)
        for name, shape in zip(names, shapes, strict=False)
    }


def named(kind, weights):
    return kind(*weights, *(None,) * (len(kind._fields) - len(weights)))


def attention_weights(width, norm):
    square, vector = (width, width), (width,)
    shapes = ((3 * width, width), (3 * width,), square, vector, vector, vector)
    return weights_of(AttentionWeights, norm, *shapes)


def streams_of(placement, rows, width):
    return {"stream": normal(rows, width)} if placement == "pre" else {}


@pytest.mark.parametrize(("norm", "placement"), NORMS)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", MIXED, ids=len)
def test_attention_block_is_as_exact_as_torch(poisoned, lengths, head_dim, norm, placement):
    tokens, width, heads = sum(lengths) + 37, 768, 768 // head_dim
    arguments = (reference.alibi_slopes(heads, "cuda"), cu_seqlens_of(lengths), max(lengths))
    streams = streams_of(placement, tokens, width)

    def half(block, hidden, *rest):
        stream = rest[0] if streams else None
        weights = named(AttentionWeights, rest[len(streams) :])
        outs = block(hidden, weights, *arguments, 1e-12, 0.0, 0.0, stream)
        return torch.cat([out for out in outs if out is not None])

    assert_as_exact_as_torch(
        partial(half, blocks_triton.attention_block),
        partial(half, reference.attention_block),
        {"hidden": normal(tokens, width), **streams, **attention_weights(width, norm)},
        normal(tokens * (1 + len(streams)), width),
    )


@pytest.mark.parametrize(("norm", "placement"), [NORMS[0], NORMS[-1]])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", MIXED, ids=len)
def test_narrow_attention_block_is_as_exact_as_torch(poisoned, lengths, head_dim, norm, placement):
    tokens, width, heads = sum(lengths), 768, 768 // head_dim
    slopes, cu_seqlens = reference.alibi_slopes(heads, "cuda"), cu_seqlens_of(lengths)
    masked = torch.randperm(tokens, device="cuda")[: tokens * 3 // 10]
    positions = torch.cat([masked, masked.new_zeros(9)])  # rounded up as the loader does
    queries, *_ = reference.queries_at(positions, cu_seqlens, tokens + 37)
    streams = streams_of(placement, len(positions), width)

    def half(block, hidden, memory, *rest):
        stream = rest[0] if streams else None
        weights = named(AttentionWeights, rest[len(streams) :])
        outs = block(
            hidden, weights, slopes, cu_seqlens, max(lengths), 1e-12, 0.0, 0.0, stream, memory, queries
        )
        return torch.cat([out for out in outs if out is not None])

    assert_as_exact_as_torch(
        partial(half, blocks_triton.attention_block),
        partial(half, reference.attention_block),
        {
            "hidden": normal(len(positions), width),
            "memory": normal(tokens + 37, width),
            **streams,
            **attention_weights(width, norm),
        },
        normal(len(positions) * (1 + len(streams)), width),
    )


@pytest.mark.parametrize(("norm", "placement"), NORMS)
@pytest.mark.parametrize(
    ("rows", "width", "intermediate"), [(1, 768, 3072), (511, 768, 3072), (129, 1024, 4096)]
)
def test_mlp_block_is_as_exact_as_torch(poisoned, rows, width, intermediate, norm, placement):
    streams, vector = streams_of(placement, rows, width), (width,)
    shapes = ((2 * intermediate, width), (width, intermediate), vector, vector, vector)

    def half(block, hidden, *rest):
        stream = rest[0] if streams else None
        outs = block(hidden, named(MLPWeights, rest[len(streams) :]), 1e-12, 0.0, stream)
        return torch.cat([out for out in outs if out is not None])

    assert_as_exact_as_torch(
        partial(half, blocks_triton.mlp_block),
        partial(half, reference.mlp_block),
        {"hidden": normal(rows, width), **streams, **weights_of(MLPWeights, norm, *shapes)},
        normal(rows * (1 + len(streams)), width),
    )


@pytest.mark.parametrize(("rows", "vocab"), [(17, 30528), (129, 30528), (8192, 30528), (64, 1000)])
def test_loss_is_as_exact_as_torch(poisoned, rows, vocab):
    assert_none_worse([loss_errors(rows, vocab) for _ in range(max(1, 512 // rows))])


def loss_errors(rows, vocab):
    hidden, weight, bias = normal(rows, 768), normal(vocab, 768, scale=0.05), normal(vocab)
    labels = torch.randint(vocab, (rows,), device="cuda")
    labels[rows // 2 :: 5] = reference.IGNORED_LABEL
    labels[:2] = torch.nn.functional.linear(hidden, weight, bias)[:2].argmax(-1)

    def exact(h, w, b):
        logits = torch.nn.functional.linear(h, w, b)
        return torch.nn.functional.cross_entropy(logits, labels, reduction="sum").to(torch.float32)

    errors, _ = squared_errors(
        lambda *x: masked_lm_loss_triton.masked_lm_loss(*x, labels)[0],
        lambda *x: exact(*x) if x[0].dtype == torch.float64 else reference.masked_lm_loss(*x, labels)[0],
        {"hidden": hidden, "weight": weight, "bias": bias},
        torch.tensor(1 / 700, device="cuda"),
    )
    found, expected = (
        f(hidden, weight, bias, labels)[1]
        for f in (masked_lm_loss_triton.masked_lm_loss, reference.masked_lm_loss)
    )
    assert found == expected
    return errors


def _small_step(x, weight, slopes, cu_seqlens, dropout_p):
    """Every operation once, as a layer chains them."""
    heads = slopes.shape[0]
    qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, heads, -1))
    context = attention_triton.attention(qkv, slopes, cu_seqlens, 100, dropout_p).flatten(1)
    ones = torch.ones_like(context[0])
    hidden = dropout_layernorm_triton.dropout_add_layer_norm(context, ones, x, ones, ones, 1e-12, dropout_p)
    gated = geglu_triton.geglu(torch.cat([hidden, hidden], 1), dropout_p)
    labels = torch.arange(gated.shape[0], device=x.device) % 50
    return masked_lm_loss_triton.masked_lm_loss(gated, weight[:64], weight[:64, 0], labels)[0]


def test_compiled_the_operations_break_no_graph_and_give_the_same():
    x, weight = normal(300, 128), normal(384, 128, scale=0.1)
    arguments = (reference.alibi_slopes(2, "cuda"), cu_seqlens_of([100, 99, 80]))
    plain = run(
        lambda a, b: _small_step(a, b, *arguments, 0.0),
        [x, weight],
        torch.tensor(1.0, device="cuda"),
        torch.bfloat16,
    )
    compiled = torch.compile(_small_step, fullgraph=True)
    found = run(
        lambda a, b: compiled(a, b, *arguments, 0.0),
        [x, weight],
        torch.tensor(1.0, device="cuda"),
        torch.bfloat16,
    )
    for a, b in zip(found, plain, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
    compiled(x, weight, *arguments, 0.1)


def test_replaying_a_cuda_graph_draws_fresh_masks():
    gate_value = torch.ones(64, 512, device="cuda").bfloat16()
    geglu_triton.geglu(gate_value, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = geglu_triton.geglu(gate_value, 0.5)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(out.clone() != 0)
    assert not torch.equal(*masks)
    assert all(abs(mask.float().mean() - 0.5) < 0.05 for mask in masks)
