"""Attention's tiles fit into the shared memory of the GPU at hand, and an H200 gets those tuned for it."""

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

from mosaicbert_ds.ops import attention_triton
from mosaicbert_ds.ops.launches import (
    H200_SHARED_MEMORY,
    SMALLER,
    dkv_rows,
    dq_rows,
    fits,
    forward_rows,
    largest_that_fits,
)

A100, RTX = 166_912, 101_376  # bytes a block; RTX: all of compute capability 8.6, 8.9 and 12.0
BY_BLOCKS = [
    (attention_triton.FORWARD, forward_rows),
    (attention_triton.BACKWARD_DQ, dq_rows),
    (attention_triton.BACKWARD_DKV, dkv_rows),
]
ONE_TILE = [
    (attention_triton.ONE_TILE_FORWARD, forward_rows),
    (attention_triton.ONE_TILE_BACKWARD, dq_rows),
]
BF16, FP32 = 2, 4


def chosen(head_dim, itemsize, shared_memory):
    return [
        largest_that_fits(table[head_dim], rows, head_dim, itemsize, shared_memory)
        for table, rows in BY_BLOCKS
    ]


def tiles_that_fit(head_dim, itemsize, shared_memory):
    """Of sequences of 128 tokens, forward and backward."""
    return [fits(table[128], rows, head_dim, itemsize, shared_memory) for table, rows in ONE_TILE]


@pytest.mark.parametrize("shared_memory", [H200_SHARED_MEMORY, A100])
@pytest.mark.parametrize("head_dim", attention_triton.HEAD_DIMS)
def test_in_bf16_an_h200_and_an_a100_get_the_tuned_tiles(head_dim, shared_memory):
    assert chosen(head_dim, BF16, shared_memory) == [table[head_dim] for table, _ in BY_BLOCKS]
    assert tiles_that_fit(head_dim, BF16, shared_memory) == [True, True]


def test_with_99_kib_heads_of_128_get_smaller_tiles():
    for head_dim in (16, 32, 64):
        assert chosen(head_dim, BF16, RTX) == [table[head_dim] for table, _ in BY_BLOCKS]
        assert tiles_that_fit(head_dim, BF16, RTX) == [True, True]
    assert chosen(128, BF16, RTX) == [SMALLER[0], SMALLER[1], SMALLER[1]]
    assert tiles_that_fit(128, BF16, RTX) == [True, False]


@pytest.mark.parametrize("shared_memory", [H200_SHARED_MEMORY, A100, RTX])
@pytest.mark.parametrize("itemsize", [BF16, FP32])
@pytest.mark.parametrize("head_dim", attention_triton.HEAD_DIMS)
def test_what_is_chosen_fits(head_dim, itemsize, shared_memory):
    for launch, (_, rows) in zip(chosen(head_dim, itemsize, shared_memory), BY_BLOCKS, strict=True):
        assert fits(launch, rows, head_dim, itemsize, shared_memory)


# Prints what each launch took and may take. No GPU: a driver that only names one.
COMPILE = """
    import sys, torch, triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction
    from mosaicbert_ds.ops import attention_triton

    capability, shared_memory = map(int, sys.argv[1:])

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        print(kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **kwargs).metadata.shared)

    driver.set_active(Driver())
    JITFunction.run = compile_only
    attention_triton.shared_memory_of = lambda device: shared_memory
    for head_dim in (64, 128):
        for longest in (128, 300):
            qkv = torch.zeros(512, 3, 2, head_dim, dtype=torch.bfloat16)
            slopes, cu_seqlens = torch.zeros(2), torch.tensor([0, longest], dtype=torch.int32)
            arguments = (slopes, cu_seqlens, longest, torch.zeros(1, dtype=torch.int64), 0.1)
            out, lost, lse = attention_triton.attention_forward(qkv, *arguments)
            attention_triton.attention_backward(qkv, out, lost, out, lse, *arguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "shared_memory"), [(80, A100), (86, RTX), (90, H200_SHARED_MEMORY)])
def test_compiled_the_kernels_take_no_more_than_the_gpu_has(capability, shared_memory):
    """The largest of all, with dropout. A minute for each GPU."""
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), str(capability), str(shared_memory)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    taken = [(int(size), name) for name, size in map(str.split, found.stdout.splitlines())]
    assert len({name for _, name in taken}) >= 4
    assert max(taken)[0] <= shared_memory, taken
