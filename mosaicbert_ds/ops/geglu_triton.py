"""GeGLU with dropout: y = dropout(gate * Phi(gate) * value), Phi the normal distribution's integral.

    d value = g * gate * Phi(gate)
    d gate  = g * value * (Phi(gate) + gate * phi(gate)),  phi = exp(-x^2 / 2) / sqrt(2 pi),
    g = dropout's mask and scale applied to the gradient of y

Memory traffic an output element in bf16: forward 4 bytes in, 2 out; backward 6 in, 6 out. Nothing but the
input and an 8-byte seed is kept for the backward pass, which makes y again on its way: the product that
follows needs it for its weight gradient, and 12 layers of it would be a fifth of a step's memory. At 4.2 TB/s
an H200 has about 41 instructions a forward element, so Phi and the random bits must be cheap: one Philox call
serves eight elements.
Source: GLU variants, https://arxiv.org/abs/2002.05202; Phi: erfc of Numerical Recipes (3rd ed., 6.2.2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops.dropout_triton import draw_seed, drop_threshold, keep_mask, keep_scale

# Tile of a program and its warps: the fastest of those tried on an H200 at width 3,072.
ROWS, COLUMNS, WARPS = 4, 512, 4
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _normal_cdf(x):
    """Phi(x) with a relative error near 1e-7 in both tails: 0.5 erfc(-x / sqrt(2)), no cancellation."""
    # t = 1 / (1 + z / 2) with z = |x| / sqrt(2); the square of an rsqrt costs half of a division.
    t = tl.rsqrt(tl.abs(x) * 0.3535533905932738 + 1.0)
    t = t * t
    # The source's polynomial times log2(e), less 1 for the factor 1 / 2 of the result.
    poly = 0.17087277 * LOG2_E
    poly = poly * t - 0.82215223 * LOG2_E
    poly = poly * t + 1.48851587 * LOG2_E
    poly = poly * t - 1.13520398 * LOG2_E
    poly = poly * t + 0.27886807 * LOG2_E
    poly = poly * t - 0.18628806 * LOG2_E
    poly = poly * t + 0.09678418 * LOG2_E
    poly = poly * t + 0.37409196 * LOG2_E
    poly = poly * t + 1.00002368 * LOG2_E
    poly = poly * t - (1.26551223 * LOG2_E + 1.0)
    tail = t * tl.exp2(poly - x * x * (0.5 * LOG2_E))  # Phi(-|x|)
    return tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def _tile(num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows (ROWS, 1), columns (1, COLUMNS), octets and mask."""
    blocks_across = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0)
    first_row = (program // blocks_across) * ROWS
    first_column = (program % blocks_across) * COLUMNS
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    octet = first_column // 8 + tl.arange(0, COLUMNS // 8)[None, :]
    return row, column, octet, (row < num_rows) & (column < width)


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_forward(
    gate_value, out, seed, num_rows, width,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, octet, mask = _tile(num_rows, width, ROWS, COLUMNS)
    source = gate_value + row.to(tl.int64) * (2 * width) + column
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    value = tl.load(source + width, mask, other=0.0).to(tl.float32)
    y = gate * _normal_cdf(gate) * value
    if THRESHOLD > 0:
        keep = keep_mask(tl.load(seed), row, octet, 0, THRESHOLD, ROWS, COLUMNS)
        y = tl.where(keep, y * keep_scale(THRESHOLD), 0.0)
    tl.store(out + row.to(tl.int64) * width + column, y.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def _geglu_backward(
    gate_value, d_out, d_gate_value, out, seed, num_rows, width,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, octet, mask = _tile(num_rows, width, ROWS, COLUMNS)
    source = gate_value + row.to(tl.int64) * (2 * width) + column
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    value = tl.load(source + width, mask, other=0.0).to(tl.float32)
    narrow = row.to(tl.int64) * width + column
    g = tl.load(d_out + narrow, mask, other=0.0).to(tl.float32)
    cdf = _normal_cdf(gate)
    y = gate * cdf * value
    if THRESHOLD > 0:
        keep = keep_mask(tl.load(seed), row, octet, 0, THRESHOLD, ROWS, COLUMNS)
        g = tl.where(keep, g * keep_scale(THRESHOLD), 0.0)
        y = tl.where(keep, y * keep_scale(THRESHOLD), 0.0)
    tl.store(out + narrow, y.to(out.dtype.element_ty), mask)
    density = 0.3989422804014327 * tl.exp2(gate * gate * (-0.5 * LOG2_E))
    target = d_gate_value + row.to(tl.int64) * (2 * width) + column
    d_gate = g * value * (cdf + gate * density)
    tl.store(target, d_gate.to(d_gate_value.dtype.element_ty), mask)
    tl.store(target + width, (g * gate * cdf).to(d_gate_value.dtype.element_ty), mask)


def _grid(num_rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(num_rows, ROWS) * triton.cdiv(width, COLUMNS),)


@torch.library.custom_op("mosaicbert_ds::geglu", mutates_args=())
def geglu_forward(gate_value: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    gate_value = gate_value.contiguous()
    num_rows, width = gate_value.shape[0], gate_value.shape[1] // 2
    out = gate_value.new_empty(num_rows, width)
    if num_rows:
        _geglu_forward[_grid(num_rows, width)](
            gate_value, out, seed, num_rows, width,
            drop_threshold(dropout_p), ROWS, COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return out


@torch.library.custom_op("mosaicbert_ds::geglu_backward", mutates_args=())
def geglu_backward(
    gate_value: Tensor, d_out: Tensor, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """d_gate_value, and the forward's output once more."""
    gate_value, d_out = gate_value.contiguous(), d_out.contiguous()
    num_rows, width = d_out.shape
    d_gate_value, out = torch.empty_like(gate_value), torch.empty_like(d_out)
    if num_rows:
        _geglu_backward[_grid(num_rows, width)](
            gate_value, d_out, d_gate_value, out, seed, num_rows, width,
            drop_threshold(dropout_p), ROWS, COLUMNS, num_warps=WARPS,
        )  # fmt: skip
    return d_gate_value, out


@geglu_forward.register_fake
def _(gate_value, seed, dropout_p):
    return gate_value.new_empty(gate_value.shape[0], gate_value.shape[1] // 2)


@geglu_backward.register_fake
def _(gate_value, d_out, seed, dropout_p):
    return gate_value.new_empty(gate_value.shape), d_out.new_empty(d_out.shape)


def _save(ctx, inputs, output):
    gate_value, seed, ctx.dropout_p = inputs
    ctx.save_for_backward(gate_value, seed)


def _backward(ctx, d_out):
    gate_value, seed = ctx.saved_tensors
    return geglu_backward(gate_value, d_out, seed, ctx.dropout_p)[0], None, None


geglu_forward.register_autograd(_backward, setup_context=_save)


def geglu(gate_value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """dropout(GELU(gate) * value): (tokens, 2 * intermediate) -> (tokens, intermediate)."""
    seed = draw_seed(gate_value.device) if drop_threshold(dropout_p) else None
    return geglu_forward(gate_value, seed, dropout_p)
