"""The embedding table's gradient: to each word's row, the sum of the gradients of the tokens that are it.

    d_table[id] += sum of d_out[t] over the tokens t with ids[t] == id

Tokens are sorted by id, so a word is a run of neighbours. A program adds up the runs in its block of places:
a run that lies in one block goes straight to the table, of a longer one each block leaves its part, which a
second kernel adds in order. Sums in fp32, a row of the table is read and written once, so rounded once: the
same bits each time, no atomics. Memory traffic: 2 bytes an element of d_out in bf16, and 8 an element of the
rows that occur; autograd fills and adds a whole table.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops.main_grad import main_grads_of

BLOCK, ROWS, WARPS = 32, 8, 4  # places a program at most, rows that are loaded at a time
BLOCKS = 128  # wanted before a block is full: a program's runs wait for one another


@triton.jit(do_not_specialize=["num_rows"])
def _add_runs(
    d_out, order, ids, table, parts, num_rows,
    width: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < width
    first = block * BLOCK
    end = tl.minimum(first + BLOCK, num_rows)
    while first < end:
        word = tl.load(ids + first)
        place = first + tl.arange(0, BLOCK)
        count = tl.sum((tl.load(ids + place, place < end, other=-1) == word).to(tl.int32))
        total = tl.zeros([COLUMNS], tl.float32)
        for start in tl.range(0, count, ROWS):
            row = start + tl.arange(0, ROWS)
            token = tl.load(order + first + row, row < count, other=0).to(tl.int64)
            mask = (row < count)[:, None] & inside[None, :]
            values = tl.load(d_out + token[:, None] * width + column[None, :], mask, other=0.0)
            total += tl.sum(values.to(tl.float32), axis=0)
        before = tl.load(ids + first - 1, first > 0, other=-1)
        after = tl.load(ids + first + count, first + count < num_rows, other=-1)
        if (before == word) | (after == word):
            part = 2 * block + (first > block * BLOCK).to(tl.int32)  # a run that comes in, one that goes out
            tl.store(parts + part.to(tl.int64) * width + column, total, inside)
        else:
            target = table + word.to(tl.int64) * width + column
            total += tl.load(target, inside, other=0.0).to(tl.float32)
            tl.store(target, total.to(table.dtype.element_ty), inside)
        first += count


@triton.jit(do_not_specialize=["num_rows"])
def _add_parts(
    ids, table, parts, num_rows,
    width: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the run that begins in this block and goes on in the next, if there is one, all parts."""
    block = tl.program_id(0)
    next_place = (block + 1) * BLOCK
    if next_place < num_rows:
        word = tl.load(ids + next_place)
        begins_here = tl.load(ids + next_place - 1) == word
        fills_block = tl.load(ids + block * BLOCK) == word
        comes_in = fills_block & (tl.load(ids + block * BLOCK - 1, block > 0, other=-1) == word)
        if begins_here & (comes_in == 0):
            column = tl.arange(0, COLUMNS)
            inside = column < width
            part = 2 * block + (fills_block == 0).to(tl.int32)
            total = tl.load(parts + part.to(tl.int64) * width + column, inside, other=0.0)
            follower, found = block + 1, ROWS
            while found == ROWS:
                blocks = follower + tl.arange(0, ROWS)
                mine = tl.load(ids + blocks * BLOCK, blocks * BLOCK < num_rows, other=-1) == word
                mask = mine[:, None] & inside[None, :]
                values = parts + 2 * blocks.to(tl.int64)[:, None] * width + column[None, :]
                total += tl.sum(tl.load(values, mask, other=0.0), axis=0)
                found = tl.sum(mine.to(tl.int32))
                follower += ROWS
            target = table + word.to(tl.int64) * width + column
            total += tl.load(target, inside, other=0.0).to(tl.float32)
            tl.store(target, total.to(table.dtype.element_ty), inside)


def add_table_gradient(table: Tensor, d_out: Tensor, ids: Tensor) -> None:
    """Add the gradient to `table` (words, width), which rounds; d_out (tokens, width), ids (tokens,)."""
    num_rows, width = d_out.shape
    if num_rows == 0:
        return
    ordered, order = ids.int().sort(stable=True)
    block = min(BLOCK, triton.next_power_of_2(triton.cdiv(num_rows, BLOCKS)))
    blocks = triton.cdiv(num_rows, block)
    parts = torch.empty(2 * blocks, width, device=d_out.device, dtype=torch.float32)
    sizes = (width, triton.next_power_of_2(width), block, ROWS)
    _add_runs[(blocks,)](d_out.contiguous(), order, ordered, table, parts, num_rows, *sizes, num_warps=WARPS)
    _add_parts[(blocks,)](ordered, table, parts, num_rows, *sizes, num_warps=WARPS)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.main_grad = weight.shape, weight.dtype, main_grad
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        table = ctx.main_grad
        if table is None:
            table = torch.zeros(ctx.shape, device=d_out.device, dtype=ctx.dtype)
        add_table_gradient(table, d_out, ids)
        return None, table if ctx.main_grad is None else None, None


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """`reference.embedding` defines it."""
    main_grads = main_grads_of((weight,))
    return _Embedding.apply(ids, weight, main_grads and main_grads[0])
