"""Dropout of every operation in fp32, on a GPU or under Triton's interpreter: with its masks held still, the
gradient is what finite differences give. A backward pass with another mask would be far off.

The shares that are kept, and masks seen one by one: test_interpreted.py, and in bf16 test_gpu.py.
"""

import pytest
import torch

from mosaicbert_ds.ops import reference
from mosaicbert_ds.ops.reference import AttentionWeights, MLPWeights

pytest.importorskip("triton")

from mosaicbert_ds.ops import blocks_triton, layernorm_dropout_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DROPOUT_P, EPS = 0.3, 1e-12
STEP, TOLERANCE = 1e-2, 2e-3  # of the inputs' size; a central difference is off by its step squared


@pytest.fixture(autouse=True)
def _products_in_fp32():
    """TF32, which another test of this process may have left on, is too coarse for differences."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "ieee"
    yield
    products.fp32_precision = before


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def matrix(rows, columns):
    return normal(rows, columns) * columns**-0.5


def attention_half(lengths, heads, head_dim, attention_p, hidden_p):
    width = heads * head_dim
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    slopes = reference.alibi_slopes(heads, DEVICE)

    def half(hidden, *weights):
        return blocks_triton.attention_block(
            hidden, AttentionWeights(*weights), slopes, cu_seqlens, max(lengths), EPS, attention_p, hidden_p
        )[0]

    qkv, dense = (matrix(3 * width, width), normal(3 * width)), (matrix(width, width), normal(width))
    return half, [normal(sum(lengths), width), *qkv, *dense, normal(width), normal(width)]


def mlp_half(rows, width, intermediate):
    def half(hidden, *weights):
        return blocks_triton.mlp_block(hidden, MLPWeights(*weights), EPS, DROPOUT_P)[0]

    matrices = [matrix(2 * intermediate, width), matrix(width, intermediate)]
    return half, [normal(rows, width), *matrices, *(normal(width) for _ in range(3))]


def embedding_norm(rows, width, kinds):
    def norm(*inputs):
        return layernorm_dropout_triton.add_layer_norm_dropout(*inputs, EPS, DROPOUT_P)

    return norm, [normal(rows, width), normal(kinds, width), normal(width), normal(width)]


def error_of_a_product():
    """Relative, against fp64: near 1e-7 in fp32, 3e-4 in TF32, whatever the settings say."""
    x, y = normal(256, 768), normal(768, 256)
    exact = x.double() @ y.double()
    return ((x @ y).double() - exact).norm() / exact.norm()


def assert_gradients_are_differences(function, inputs):
    """Of a weighted sum of the outputs, along a random direction of each input by itself."""
    inputs = [x.requires_grad_() for x in inputs]
    weight = torch.randn_like(inputs[0], dtype=torch.float64)
    # Before `value` sets the seed: made of the same numbers as an input, a direction would not be random.
    directions = [torch.randn_like(x) * x.detach().std() for x in inputs]

    def value(*inputs):
        torch.manual_seed(0)  # decides the masks
        out = function(*inputs)
        return (out * weight[: len(out)]).sum()

    gradients = torch.autograd.grad(value(*inputs), inputs)
    for i, (x, gradient, direction) in enumerate(zip(inputs, gradients, directions, strict=True)):
        with torch.no_grad():
            ahead, behind = (
                value(*inputs[:i], x + sign * STEP * direction, *inputs[i + 1 :]) for sign in (1, -1)
            )
        difference = (ahead - behind) / (2 * STEP)
        expected = (gradient.double() * direction.double()).sum()
        # Along a random direction the slope is about as large as the gradient.
        size = gradient.double().norm() * x.std()
        assert (difference - expected).abs() <= TOLERANCE * size, (
            f"input {i}: the difference is {difference:.6g}, expected {expected:.6g}, size {size:.6g}; "
            f"fp32 products in {torch.backends.cuda.matmul.fp32_precision}, off by {error_of_a_product():.1e}"
        )


SHORT, LONG = [5, 0, 17, 1], [130, 3]  # one tile; blocks
# Heads of 32 dimensions: over larger products in fp32 the compiler takes minutes.
ON_GPU = [
    pytest.param(lengths, heads, 32, marks=pytest.mark.gpu)
    for lengths, heads in (([1, 2, 15, 16, 17, 127, 128], 16), ([129, 511, 2, 1024], 3), ([8192, 3], 1))
]


@pytest.mark.parametrize(("lengths", "heads", "head_dim"), [(SHORT, 2, 16), (LONG, 1, 16), *ON_GPU])
def test_attention_dropout_has_the_gradient_of_finite_differences(lengths, heads, head_dim):
    assert_gradients_are_differences(*attention_half(lengths, heads, head_dim, DROPOUT_P, 0.0))


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 16), pytest.param(24, 32, marks=pytest.mark.gpu)])
def test_dropout_before_the_residual_has_the_gradient_of_finite_differences(heads, head_dim):
    assert_gradients_are_differences(*attention_half(SHORT, heads, head_dim, 0.0, DROPOUT_P))


@pytest.mark.parametrize(
    ("rows", "width", "intermediate"), [(9, 32, 48), pytest.param(600, 768, 3072, marks=pytest.mark.gpu)]
)
def test_geglu_dropout_has_the_gradient_of_finite_differences(rows, width, intermediate):
    assert_gradients_are_differences(*mlp_half(rows, width, intermediate))


@pytest.mark.parametrize("kinds", [1, 9])
def test_embedding_dropout_has_the_gradient_of_finite_differences(kinds):
    assert_gradients_are_differences(*embedding_norm(9, 40, kinds))


def test_embedding_dropout_keeps_its_share():
    rows, width = 40, 264
    ones, zeros = torch.ones(width, device=DEVICE), torch.zeros(rows, width, device=DEVICE)
    # The LayerNorm of zeros is its bias: what is kept of ones.
    out = layernorm_dropout_triton.add_layer_norm_dropout(zeros, zeros[:1], ones, ones, EPS, DROPOUT_P)
    kept = (out != 0).double().mean()
    assert abs(kept - (1 - DROPOUT_P)) < 4 * (DROPOUT_P * (1 - DROPOUT_P) / out.numel()) ** 0.5
    assert out.unique().tolist() == pytest.approx([0, 1 / (1 - DROPOUT_P)], rel=1e-4)
