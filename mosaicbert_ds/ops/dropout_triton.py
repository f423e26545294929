"""Dropout masks that are made where they are used, and made again in the backward pass instead of stored.

Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a counter to
128 random bits. The key is a seed drawn from PyTorch's generator, the counter an element's place in its
tensor, so a mask does not depend on how a kernel cuts the tensor into tiles. One call serves eight
neighbouring elements with 16 bits each: a call an element is what bounds a naive kernel on these GPUs, not
the memory. Seven rounds are the fewest that pass BigCrush, according to the paper.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_PER_DRAW = 8  # 128 bits a Philox call, 16 an element
LEVELS = 65536  # of 16 bits


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64 on `device`, from PyTorch's generator: manual_seed decides, and no host waits for it.

    Under a CUDA graph the generator's state advances with each replay, so masks stay fresh.
    """
    return torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64)


def drop_threshold(dropout_p: float) -> int:
    """Elements whose 16 random bits are below it are dropped. 0 switches dropout off."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; give at least 0 and less than 1")
    return min(round(dropout_p * LEVELS), LEVELS - 1)


@triton.jit
def keep_mask(seed, row, octet, stream, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bool: which elements survive.

    row: (ROWS, 1) int32; octet: (1, COLUMNS / 8) int32, the column's number / 8; stream: int32 scalar.
    """
    draws: tl.constexpr = COLUMNS // 8
    c0 = row + tl.zeros([ROWS, draws], tl.int32)
    c1 = octet + tl.zeros([ROWS, draws], tl.int32)
    c2 = tl.zeros([ROWS, draws], tl.int32) + stream
    a, b, c, d = tl.philox(seed, c0, c1, c2, tl.zeros([ROWS, draws], tl.int32), 7)
    # Joined along the last dimension eight neighbours lie in one thread, as a 16-byte load puts them.
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [ROWS, draws * 4])
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS, COLUMNS])
    return halves >= THRESHOLD


@triton.jit
def keep_scale(THRESHOLD: tl.constexpr):
    """1 / (1 - p) for the p that the threshold stands for."""
    return 65536.0 / (65536 - THRESHOLD)
