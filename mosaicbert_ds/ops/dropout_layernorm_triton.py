"""Bias, dropout, residual and LayerNorm in one pass: y = weight (h - mean(h)) / std(h) + bias,
h = dropout(x + x_bias) + r. x is a matrix product whose bias is added here, because its gradient, a sum over
all rows, then costs no pass of its own.

With n the normalised row, g = dy * weight and all means over the row:

    dh = (g - mean(g) - n * mean(g * n)) / std,   dr = dh,   dx = dropout's mask and scale applied to dh
    dweight = sum over rows of dy * n,   dbias = sum over rows of dy,   dx_bias = sum over rows of dx

Memory traffic an element in bf16: forward 4 bytes in, 2 out. Backward 6 in, 4 out; without dropout dx is dr
and 2 out. h is made again from x and r instead of stored, mean and 1 / std are kept in fp32. A backward
program walks over many rows and adds up its share of the three sums in registers; the shares go to memory
once, and one sum over them ends it, rounded once: no atomics, so the same bits each time.

With `keep_sum` (pre-LN) h goes to memory too, and y is the norm of what went there. Its own gradient is added
to dh in the same pass; h is then read instead of x and r: forward 4 bytes in, 4 out; backward 6 in, 4 out.

Without a bias it is RMSNorm: the same without mean(h) and mean(g).
Sources: https://arxiv.org/abs/1607.06450 and https://arxiv.org/abs/1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops.column_sums_triton import add_partials
from mosaicbert_ds.ops.dropout_triton import draw_seed, drop_threshold, keep_mask, keep_scale

# The fastest of those tried on an H200 at width 768. One warp holds a whole row, so its means need no shared
# memory, and a program walks over many rows, so that weight and bias are read once.
ROWS, WARPS = 1, 1
FORWARD_PROGRAMS, FORWARD_STAGES = 132 * 16, 1
BACKWARD_PROGRAMS, BACKWARD_STAGES = 132 * 8, 1  # fixed: the order of the sums is the same on every GPU


@triton.jit
def _kept(seed, row, mask, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What dropout keeps of these rows; without dropout everything."""
    keep = mask
    if THRESHOLD > 0:
        octet = tl.arange(0, COLUMNS // 8)[None, :]
        keep = keep_mask(tl.load(seed), row, octet, 0, THRESHOLD, ROWS, COLUMNS)
    return keep


@triton.jit
def _sum_of(x, shift, residual, keep, place, mask, THRESHOLD: tl.constexpr):
    """h = dropout(x + shift) + residual in fp32."""
    h = tl.load(x + place, mask, other=0.0).to(tl.float32) + shift
    if THRESHOLD > 0:
        h = tl.where(keep, h * keep_scale(THRESHOLD), 0.0)
    return h + tl.load(residual + place, mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_forward(
    x, x_bias, residual, weight, bias, out, sum_out, mean_out, rstd_out, seed, num_rows, eps,
    width: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SUM: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    if not RMS:
        offset = tl.load(bias + column, inside, other=0.0).to(tl.float32)
    shift = tl.load(x_bias + column, inside, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < num_rows) & inside
        place = row.to(tl.int64) * width + column
        keep = _kept(seed, row, mask, THRESHOLD, ROWS, COLUMNS)
        h = _sum_of(x, shift, residual, keep, place, mask, THRESHOLD)
        if KEEP_SUM:
            rounded = h.to(sum_out.dtype.element_ty)
            tl.store(sum_out + place, rounded, mask)
            h = rounded.to(tl.float32)
        centred = h  # zero outside
        if not RMS:
            mean = tl.sum(h, axis=1, keep_dims=True) / width
            centred = tl.where(inside, h - mean, 0.0)
            tl.store(mean_out + row, mean, row < num_rows)
        variance = tl.sum(centred * centred, axis=1, keep_dims=True) / width
        rstd = 1.0 / tl.sqrt(variance + eps)
        y = centred * rstd * scale
        if not RMS:
            y += offset
        tl.store(out + place, y.to(out.dtype.element_ty), mask)
        tl.store(rstd_out + row, rstd, row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_backward(
    x, x_bias, residual, total, weight, d_out, d_sum, mean_in, rstd_in, d_x, d_residual, partial, seed,
    num_rows,
    width: tl.constexpr, THRESHOLD: tl.constexpr, KEEP_SUM: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With KEEP_SUM h is `total` and its gradient `d_sum`; else it is made of x, x_bias and residual."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    if not KEEP_SUM:
        shift = tl.load(x_bias + column, inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_x_bias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(program * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < num_rows) & inside
        place = row.to(tl.int64) * width + column
        keep = _kept(seed, row, mask, THRESHOLD, ROWS, COLUMNS)
        if KEEP_SUM:
            h = tl.load(total + place, mask, other=0.0).to(tl.float32)
        else:
            h = _sum_of(x, shift, residual, keep, place, mask, THRESHOLD)
        dy = tl.load(d_out + place, mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + row, row < num_rows, other=0.0)
        g = dy * scale
        if RMS:
            n = h * rstd
            mean_gn = tl.sum(g * n, axis=1, keep_dims=True) / width
            dh = (g - n * mean_gn) * rstd
        else:
            mean = tl.load(mean_in + row, row < num_rows, other=0.0)
            n = tl.where(inside, (h - mean) * rstd, 0.0)
            mean_g = tl.sum(g, axis=1, keep_dims=True) / width
            mean_gn = tl.sum(g * n, axis=1, keep_dims=True) / width
            dh = (g - mean_g - n * mean_gn) * rstd
        if KEEP_SUM:
            dh += tl.load(d_sum + place, mask, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            tl.store(d_residual + place, dh.to(d_x.dtype.element_ty), mask)
            dh = tl.where(keep, dh * keep_scale(THRESHOLD), 0.0)
        tl.store(d_x + place, dh.to(d_x.dtype.element_ty), mask)
        d_weight += dy * n
        if not RMS:
            d_bias += dy
        d_x_bias += dh
    column = tl.arange(0, COLUMNS)
    target = partial + program * 3 * width + column  # partial: (programs, 3, width)
    tl.store(target, tl.sum(d_weight, axis=0), column < width)
    tl.store(target + width, tl.sum(d_bias, axis=0), column < width)
    tl.store(target + 2 * width, tl.sum(d_x_bias, axis=0), column < width)


@torch.library.custom_op("mosaicbert_ds::dropout_add_layer_norm", mutates_args=())
def layer_norm_forward(
    x: Tensor, x_bias: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None,
    seed: Tensor | None, eps: float, dropout_p: float, keep_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """LayerNorm(h), mean (empty in RMSNorm) and 1 / std of each row in fp32, and with `keep_sum` h in x's
    dtype (else empty); h = dropout(x + x_bias) + residual."""
    x, residual = x.contiguous(), residual.contiguous()
    num_rows, width = x.shape
    out = torch.empty_like(x)
    total = torch.empty_like(x) if keep_sum else x.new_empty(0)
    rms = bias is None
    mean, rstd = (
        torch.empty(rows, device=x.device, dtype=torch.float32) for rows in (0 if rms else num_rows, num_rows)
    )
    if num_rows:
        programs = min(FORWARD_PROGRAMS, triton.cdiv(num_rows, ROWS))
        _layer_norm_forward[(programs,)](
            x, x_bias, residual, weight, bias, out, total, mean, rstd, seed, num_rows, eps,
            width, drop_threshold(dropout_p), keep_sum, rms, ROWS, triton.next_power_of_2(max(width, 8)),
            FORWARD_STAGES, num_warps=WARPS,
        )  # fmt: skip
    return out, mean, rstd, total


@torch.library.custom_op("mosaicbert_ds::dropout_add_layer_norm_backward", mutates_args=())
def layer_norm_backward(
    x: Tensor | None, x_bias: Tensor | None, residual: Tensor | None, total: Tensor | None, weight: Tensor,
    d_out: Tensor, d_sum: Tensor | None, mean: Tensor, rstd: Tensor, seed: Tensor | None, dropout_p: float,
    sums_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_x, d_residual (empty without dropout: it is d_x) and (3, width) of `sums_dtype`: d_weight, d_bias
    (zero in RMSNorm), d_x_bias.

    Give x, x_bias and residual, or where the forward kept the sum `total` and its own gradient `d_sum`.
    """
    x, residual, d_sum = (None if t is None else t.contiguous() for t in (x, residual, d_sum))
    d_out = d_out.contiguous()
    num_rows, width = d_out.shape
    threshold = drop_threshold(dropout_p)
    d_x = torch.empty_like(d_out)
    d_residual = torch.empty_like(d_out) if threshold else d_out.new_empty(0)
    programs = max(1, min(BACKWARD_PROGRAMS, triton.cdiv(num_rows, ROWS)))
    partial = torch.empty(programs, 3, width, device=d_out.device, dtype=torch.float32)
    _layer_norm_backward[(programs,)](
        x, x_bias, residual, total, weight, d_out, d_sum, mean, rstd, d_x, d_residual, partial, seed,
        num_rows, width, threshold, total is not None, len(mean) < num_rows, ROWS,
        triton.next_power_of_2(max(width, 8)), BACKWARD_STAGES, num_warps=WARPS,
    )  # fmt: skip
    return d_x, d_residual, add_partials(partial, sums_dtype)


@layer_norm_forward.register_fake
def _(x, x_bias, residual, weight, bias, seed, eps, dropout_p, keep_sum=False):
    mean, rstd = (
        x.new_empty(rows, dtype=torch.float32) for rows in (0 if bias is None else x.shape[0], x.shape[0])
    )
    return x.new_empty(x.shape), mean, rstd, x.new_empty(x.shape if keep_sum else 0)


@layer_norm_backward.register_fake
def _(x, x_bias, residual, total, weight, d_out, d_sum, mean, rstd, seed, dropout_p, sums_dtype):
    d_residual = d_out.new_empty(d_out.shape if drop_threshold(dropout_p) else 0)
    return d_out.new_empty(d_out.shape), d_residual, d_out.new_empty(3, d_out.shape[1], dtype=sums_dtype)


def _save(ctx, inputs, output):
    x, x_bias, residual, weight, bias, seed, _, ctx.dropout_p, ctx.keep_sum = inputs
    ctx.rms = bias is None
    _, mean, rstd, total = output
    summands = (None, None, None, total) if ctx.keep_sum else (x, x_bias, residual, None)
    ctx.save_for_backward(*summands, weight, mean, rstd, seed)


def _backward(ctx, d_out, d_mean, d_rstd, d_sum):
    *summands, weight, mean, rstd, seed = ctx.saved_tensors
    d_x, d_residual, sums = layer_norm_backward(
        *summands, weight, d_out, d_sum if ctx.keep_sum else None, mean, rstd, seed, ctx.dropout_p,
        weight.dtype,
    )  # fmt: skip
    if not drop_threshold(ctx.dropout_p):
        d_residual = d_x
    d_weight, d_bias, d_x_bias = sums
    d_bias = None if ctx.rms else d_bias
    return d_x, d_x_bias, d_residual, d_weight, d_bias, None, None, None, None


layer_norm_forward.register_autograd(_backward, setup_context=_save)


def dropout_add_layer_norm(
    x: Tensor,
    x_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual): x, residual (tokens, hidden) -> (tokens, hidden)."""
    seed = draw_seed(x.device) if drop_threshold(dropout_p) else None
    return layer_norm_forward(x, x_bias, residual, weight, bias, seed, eps, dropout_p)[0]
