"""Sums over rows: the gradient of a bias that no other kernel delivers. One pass, 2 bytes an element in bf16.

Each program adds up a strip of rows in fp32; the strips are added by a second, small sum. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS, STAGES = 16, 256, 4, 4
STRIPS = 132 * 2  # fixed: the order of the sums is the same on every GPU


@triton.jit(do_not_specialize=["num_rows"])
def _column_sums(
    x, partial, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    strip, strips = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(strip * ROWS, num_rows, strips * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < num_rows) & (column < width)
        total += tl.load(x + row.to(tl.int64) * width + column, mask, other=0.0).to(tl.float32)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(partial + strip * width + column, tl.sum(total, axis=0), column < width)


def column_sums(x: Tensor) -> Tensor:
    """(rows, width) -> (width,) fp32"""
    x = x.contiguous()
    num_rows, width = x.shape
    strips = max(1, min(STRIPS, triton.cdiv(num_rows, ROWS)))
    partial = torch.empty(strips, width, device=x.device, dtype=torch.float32)
    grid = (strips, triton.cdiv(width, COLUMNS))
    _column_sums[grid](x, partial, num_rows, width, ROWS, COLUMNS, STAGES, num_warps=WARPS)
    return partial.sum(0)
