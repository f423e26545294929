"""Sum, LayerNorm and dropout in one pass, for the embedding:
y = dropout(weight (h - mean(h)) / std(h) + bias), h = x + kind.

With n the normalised row, g = dropout's mask and scale applied to dy, times weight, and means over the row:

    dh = (g - mean(g) - n * mean(g * n)) / std,   dx = dh,   dkind = dh, or its sum over the rows

`kind` is one row for all tokens (all of one type) or a row for each. Memory traffic an element in bf16 with
one row: forward 2 bytes in, 2 out; backward 4 in, 2 out. Without a bias it is RMSNorm: the same without
mean(h) and mean(g).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops.column_sums_triton import add_partials
from mosaicbert_ds.ops.dropout_triton import draw_seed, drop_threshold, keep_mask, keep_scale
from mosaicbert_ds.ops.main_grad import main_grads_of, settle, sums_dtype

# As in dropout_layernorm_triton: one warp holds a row, a program walks over many.
WARPS = 1
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 132 * 16, 132 * 8


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_dropout_forward(
    x, kind, kind_stride, weight, bias, out, mean_out, rstd_out, seed, num_rows, eps,
    width: tl.constexpr, THRESHOLD: tl.constexpr, RMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    if not RMS:
        offset = tl.load(bias + column, inside, other=0.0).to(tl.float32)
    for first in tl.range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = first + tl.zeros([1, 1], tl.int32)
        place = row.to(tl.int64) * width + column
        h = tl.load(x + place, inside, other=0.0).to(tl.float32)
        h += tl.load(kind + row.to(tl.int64) * kind_stride + column, inside, other=0.0).to(tl.float32)
        centred = h  # zero outside
        if not RMS:
            mean = tl.sum(h) / width
            centred = tl.where(inside, h - mean, 0.0)
            tl.store(mean_out + first, mean)
        rstd = 1.0 / tl.sqrt(tl.sum(centred * centred) / width + eps)
        y = centred * rstd * scale
        if not RMS:
            y += offset
        if THRESHOLD > 0:
            octet = tl.arange(0, COLUMNS // 8)[None, :]
            keep = keep_mask(tl.load(seed), row, octet, 0, THRESHOLD, 1, COLUMNS)
            y = tl.where(keep, y * keep_scale(THRESHOLD), 0.0)
        tl.store(out + place, y.to(out.dtype.element_ty), inside)
        tl.store(rstd_out + first, rstd)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_dropout_backward(
    x, kind, kind_stride, weight, d_out, mean_in, rstd_in, d_x, partial, seed, num_rows,
    width: tl.constexpr, THRESHOLD: tl.constexpr, RMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = column < width
    scale = tl.load(weight + column, inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([1, COLUMNS], tl.float32)
    d_bias = tl.zeros([1, COLUMNS], tl.float32)
    d_sum = tl.zeros([1, COLUMNS], tl.float32)
    for first in tl.range(program, num_rows, tl.num_programs(0)):
        row = first + tl.zeros([1, 1], tl.int32)
        place = row.to(tl.int64) * width + column
        dy = tl.load(d_out + place, inside, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            octet = tl.arange(0, COLUMNS // 8)[None, :]
            keep = keep_mask(tl.load(seed), row, octet, 0, THRESHOLD, 1, COLUMNS)
            dy = tl.where(keep, dy * keep_scale(THRESHOLD), 0.0)
        h = tl.load(x + place, inside, other=0.0).to(tl.float32)
        h += tl.load(kind + row.to(tl.int64) * kind_stride + column, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + first)
        g = dy * scale
        if RMS:
            n = h * rstd
            dh = (g - n * (tl.sum(g * n) / width)) * rstd
        else:
            n = tl.where(inside, (h - tl.load(mean_in + first)) * rstd, 0.0)
            dh = (g - tl.sum(g) / width - n * (tl.sum(g * n) / width)) * rstd
        tl.store(d_x + place, dh.to(d_x.dtype.element_ty), inside)
        d_weight += dy * n
        d_bias += dy
        d_sum += dh
    target = partial + program * 3 * width + column  # partial: (programs, 3, width)
    tl.store(target, d_weight, inside)
    tl.store(target + width, d_bias, inside)
    tl.store(target + 2 * width, d_sum, inside)


class _LayerNormDropout(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, kind: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout_p: float,
        main_grads: tuple[Tensor | None, ...] | None,
    ) -> Tensor:  # fmt: skip
        x, kind = x.contiguous(), kind.contiguous()
        num_rows, width = x.shape
        seed = draw_seed(x.device) if drop_threshold(dropout_p) else None
        out = torch.empty_like(x)
        mean, rstd = (torch.empty(num_rows, device=x.device, dtype=torch.float32) for _ in range(2))
        if num_rows:
            _layer_norm_dropout_forward[(min(FORWARD_PROGRAMS, num_rows),)](
                x, kind, width if len(kind) > 1 else 0, weight, bias, out, mean, rstd, seed, num_rows, eps,
                width, drop_threshold(dropout_p), bias is None, triton.next_power_of_2(max(width, 8)),
                num_warps=WARPS,
            )  # fmt: skip
        ctx.save_for_backward(x, kind, weight, bias, mean, rstd, seed)
        ctx.dropout_p, ctx.main_grads = dropout_p, main_grads
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, kind, weight, bias, mean, rstd, seed = ctx.saved_tensors
        num_rows, width = x.shape
        d_x = torch.empty_like(x)
        programs = max(1, min(BACKWARD_PROGRAMS, num_rows))
        partial = torch.empty(programs, 3, width, device=x.device, dtype=torch.float32)
        _layer_norm_dropout_backward[(programs,)](
            x, kind, width if len(kind) > 1 else 0, weight, d_out.contiguous(), mean, rstd, d_x, partial,
            seed, num_rows, width, drop_threshold(ctx.dropout_p), bias is None,
            triton.next_power_of_2(max(width, 8)), num_warps=WARPS,
        )  # fmt: skip
        d_weight, d_bias, d_sum = add_partials(partial, sums_dtype(ctx.main_grads, weight))
        d_kind = d_x if len(kind) > 1 else d_sum[None].to(kind.dtype)
        return d_x, d_kind, *settle((d_weight, d_bias), ctx.main_grads, (weight, bias)), None, None, None


def add_layer_norm_dropout(
    x: Tensor, kind: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout_p: float
) -> Tensor:
    """`reference.add_layer_norm_dropout` defines it."""
    main_grads = main_grads_of((weight, bias))
    return _LayerNormDropout.apply(x, kind, weight, bias, eps, dropout_p, main_grads)
