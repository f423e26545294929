"""Sums over rows: the gradient of a bias that no other kernel delivers. One pass, 2 bytes an element in bf16.

Each program adds up a strip of rows in fp32; the strips are added by a second launch, which rounds. No
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS, STAGES = 16, 256, 4, 4
STRIPS = 132 * 2  # fixed: the order of the sums is the same on every GPU
# Of the strips' sums, which are few and wide: 144 programs at three times the width of 768, and one step of
# the loop for up to 512 of them. Short batches wait for its latency and for nothing else.
PARTIAL_ROWS, PARTIAL_COLUMNS, PARTIAL_WARPS = 512, 16, 8


@triton.jit(do_not_specialize=["num_rows"])
def _column_sums(
    x, sums, num_rows, width, zeros_from, zeros_to,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    strip, strips = tl.program_id(0), tl.num_programs(0)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)[None, :]
    is_read = (column < width) & ((column < zeros_from) | (column >= zeros_to))
    # A program whose columns are all known walks over no row.
    is_known = (first_column >= zeros_from) & (first_column + COLUMNS <= zeros_to)
    num_rows = tl.where(is_known, 0, num_rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(strip * ROWS, num_rows, strips * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < num_rows) & is_read
        total += tl.load(x + row.to(tl.int64) * width + column, mask, other=0.0).to(tl.float32)
    column = first_column + tl.arange(0, COLUMNS)
    total = tl.sum(total, axis=0).to(sums.dtype.element_ty)
    tl.store(sums + strip * width + column, total, column < width)


def column_sums(x: Tensor, dtype: torch.dtype = torch.float32, zeros: range = range(0)) -> Tensor:
    """(rows, width) -> (width,), rounded once. Columns in `zeros` are known to be zero and are not read."""
    x = x.contiguous()
    num_rows, width = x.shape
    strips = max(1, min(STRIPS, triton.cdiv(num_rows, ROWS)))
    partial = torch.empty(strips, width, device=x.device, dtype=torch.float32)
    grid = (strips, triton.cdiv(width, COLUMNS))
    _column_sums[grid](
        x, partial, num_rows, width, zeros.start, zeros.stop, ROWS, COLUMNS, STAGES, num_warps=WARPS
    )
    return add_partials(partial, dtype)


def add_partials(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(programs, ...) fp32 -> (...): the sum of what each program of a kernel added up, rounded once."""
    num_partials, *shape = partial.shape
    sums = torch.empty(shape, device=partial.device, dtype=dtype)
    _column_sums[(1, triton.cdiv(sums.numel(), PARTIAL_COLUMNS))](
        partial, sums, num_partials, sums.numel(), 0, 0, PARTIAL_ROWS, PARTIAL_COLUMNS, 1,
        num_warps=PARTIAL_WARPS,
    )  # fmt: skip
    return sums
