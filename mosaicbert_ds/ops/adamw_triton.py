"""AdamW of all tensors of a model in one launch, with the gradients and the weights as the model has them.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    w = w - lr decay w - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Memory traffic an element with a bf16 model: 2 bytes of g and 12 of w, m and v in, those 12 and 2 of the
model's copy of w out: 28 bytes. PyTorch's fused AdamW between a cast of gradients and one of weights: 40.

Each program takes a block of one tensor, found in a table of addresses. Those of the gradients change from
call to call, but in a CUDA graph they stay what they were when it was captured: see `upload`. What depends
on the step alone is computed beforehand in fp64, a row for each step of the schedule.
Source: https://arxiv.org/abs/1711.05101, as torch.optim.AdamW reads it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops import reference

BLOCK, WARPS = 2048, 4  # 28 KiB to read; 96 registers a thread let five programs share a processor
ALIGNMENT = 16  # bytes that a thread moves at a time


@triton.jit
def _address(table, tensor, kind: tl.constexpr):
    """Known to be aligned for four elements and no more, so that a thread has the same four of each tensor:
    with eight of the bf16 ones fp32 would go through shared memory."""
    return tl.multiple_of(tl.load(table + tensor).to(kind), kind.element_ty.primitive_bitwidth // 8 * 4)


@triton.jit
def _update(
    gradient, master, exp_avg, exp_avg_sq, weight, factors, place, mask,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    g = tl.load(gradient + place, mask).to(tl.float32)
    m = BETA1 * tl.load(exp_avg + place, mask) + (1 - BETA1) * g
    v = BETA2 * tl.load(exp_avg_sq + place, mask) + (1 - BETA2) * g * g
    w = tl.load(master + place, mask)
    w -= tl.load(factors) * w
    w -= tl.load(factors + 1) * m / (tl.sqrt(v) * tl.load(factors + 2) + EPS)
    tl.store(exp_avg + place, m, mask)
    tl.store(exp_avg_sq + place, v, mask)
    tl.store(master + place, w, mask)
    tl.store(weight + place, w.to(weight.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_tensors"])
def _adamw(
    owners, blocks, sizes, tables, gradients, factors, step, any_master, any_weight, num_tensors,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor = tl.load(owners + tl.program_id(0))
    first = tl.load(blocks + tl.program_id(0)) * BLOCK
    size = tl.load(sizes + tensor)
    gradient = _address(gradients, tensor, any_weight.dtype)
    master = _address(tables, tensor, any_master.dtype)
    exp_avg = _address(tables + num_tensors, tensor, any_master.dtype)
    exp_avg_sq = _address(tables + 2 * num_tensors, tensor, any_master.dtype)
    weight = _address(tables + 3 * num_tensors, tensor, any_weight.dtype)
    factors += 3 * tl.load(step)
    place = first + tl.arange(0, BLOCK)
    # Only of a whole block does the compiler know that it may be moved 16 bytes at a time.
    if first + BLOCK <= size:
        _update(gradient, master, exp_avg, exp_avg_sq, weight, factors, place, None, BETA1, BETA2, EPS)
    else:
        inside = place < size
        _update(gradient, master, exp_avg, exp_avg_sq, weight, factors, place, inside, BETA1, BETA2, EPS)


class AdamW(reference.AdamW):
    """`reference.AdamW` defines it."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        device = self._rates.device
        sizes = torch.tensor([master.numel() for master in self.masters])
        blocks = (sizes + BLOCK - 1) // BLOCK
        owners = torch.arange(len(sizes)).repeat_interleave(blocks)
        in_tensor = torch.arange(len(owners)) - (blocks.cumsum(0) - blocks)[owners]
        self._owners, self._blocks, self._sizes = (x.int().to(device) for x in (owners, in_tensor, sizes))
        columns = (self.masters, self.exp_avg, self.exp_avg_sq, self.weights)
        assert all(x.data_ptr() == _aligned(x).data_ptr() for column in columns for x in column)
        self._tables = torch.stack([_addresses(column) for column in columns]).to(device)
        lr, steps = self._rates.double(), torch.arange(1, len(self._rates) + 1, device=device).double()
        corrections = [1 - beta**steps for beta in self._betas]
        factors = (lr * self._weight_decay, lr / corrections[0], corrections[1].rsqrt())
        self._factors = torch.stack(factors, 1).float()  # (steps, 3)
        # Not allocated in a capture: what a graph owns, its replay may have written before this kernel reads.
        self._table = torch.empty(len(sizes), dtype=torch.int64, device=device)
        self._addresses: Tensor | None = None  # of the capture that `upload` completes
        self._captured: list[Tensor] = []  # tables that replays read

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], step: Tensor) -> None:
        gradients = [_aligned(gradient) for gradient in gradients]
        addresses = _addresses(gradients)
        if step.is_cuda and torch.cuda.is_current_stream_capturing():
            assert self._addresses is None, "one update a capture, and `upload` after it"
            self._addresses = addresses
        else:
            self._table.copy_(addresses)
        _adamw[(len(self._owners),)](
            self._owners, self._blocks, self._sizes, self._tables, self._table, self._factors, step,
            self.masters[0], self.weights[0], len(gradients), *self._betas, self._eps, BLOCK, num_warps=WARPS,
        )  # fmt: skip

    def upload(self) -> None:
        if self._addresses is not None:
            self._table.copy_(self._addresses)
            self._captured.append(self._table)
            self._table, self._addresses = torch.empty_like(self._table), None


def _aligned(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors,) int64, on the CPU."""
    return torch.tensor([x.data_ptr() for x in tensors])
