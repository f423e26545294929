"""How attention's kernels are cut into tiles, and which tiles a GPU's shared memory holds.

The tiles are the fastest of those tried on an H200, where a block may take 227 KiB. An A100 gives 163 KiB,
which holds them too in bf16; an A10, L4, RTX 3090, 4090 or 5090 gives 99 KiB, where heads of 128 dimensions
and fp32 need smaller ones. What a kernel takes is bounded here by what lies on chip, not asked of the
compiler: tests/kernels/test_launches.py compares the two.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

H200_SHARED_MEMORY = 232_448  # bytes


class Launch(NamedTuple):
    """Queries and keys of a tile, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int


# For what does not fit otherwise; not tuned.
SMALLER = (Launch(64, 64, 4, 2), Launch(64, 32, 4, 2), Launch(32, 32, 4, 1))

Rows = Callable[[Launch], int]


def forward_rows(launch: Launch) -> int:
    """Rows of head_dim on chip: q, and at each stage k and v."""
    return launch.queries + launch.stages * 2 * launch.keys


def dq_rows(launch: Launch) -> int:
    """Rows of head_dim on chip: q and dO, and at each stage k and v."""
    return 2 * launch.queries + launch.stages * 2 * launch.keys


def dkv_rows(launch: Launch) -> int:
    """Rows of head_dim on chip: k and v, and at each stage q and dO."""
    return 2 * launch.keys + launch.stages * 2 * launch.queries


def fits(launch: Launch, rows: Rows, head_dim: int, itemsize: int, shared_memory: int) -> bool:
    """Whether the rows and one tile of scores fit into so many bytes."""
    return itemsize * (rows(launch) * head_dim + launch.queries * launch.keys) <= shared_memory


def largest_that_fits(first: Launch, rows: Rows, head_dim: int, itemsize: int, shared_memory: int) -> Launch:
    """`first`, or what of SMALLER fits, or the smallest."""
    candidates = (first, *SMALLER)
    return next((c for c in candidates if fits(c, rows, head_dim, itemsize, shared_memory)), SMALLER[-1])


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes that a block may take on `device`; under the interpreter as on an H200."""
    if device.type != "cuda":
        return H200_SHARED_MEMORY
    # The figure that Triton itself holds a launch against.
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
