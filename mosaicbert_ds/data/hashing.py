"""Randomness as a function: a 64-bit hash of counters, vectorised. The sampler and the masks draw from it.

The mixer is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, variant 13 of Stafford).
It has no state, so the same sample gets the same masks on any rank, after any restart.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """Hash each element of `x`, uint64 of any shape. A bijection on 64 bits."""
    x = x + _GOLDEN  # a copy: the rest works in place
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keys(*parts: int | np.ndarray) -> np.ndarray:
    """One uint64 key from several non-negative numbers; arrays among them broadcast. Order matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = mix(key ^ np.asarray(part).astype(np.uint64))
    return key
