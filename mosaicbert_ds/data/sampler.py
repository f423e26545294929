"""The order of samples: a pure function of (seed, epoch, number of samples).

Every epoch is its own permutation, computed and not stored: a Feistel network permutes the next
power of four above the number of samples, and indices that fall outside walk on until they are
inside (Black and Rogaway, CT-RSA 2002). Memory is O(1), any position of the stream can be asked for.

    epochs, indices = samples_at(seed=17, num_samples=shards.num_samples, start=4096 * step, count=4096)

Global batch k is positions k * G up to (k + 1) * G of the stream: rank count, micro batch and restarts
only decide who takes which slice.
"""

import numpy as np

from mosaicbert_ds.data.hashing import keys, mix

# Four are enough for a pseudorandom permutation in theory (Luby and Rackoff); small domains want more.
_ROUNDS = 8


def samples_at(seed: int, num_samples: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and sample indices at the positions `start` to `start + count` of the endless stream.

    Both are (count,) int64; 0 <= index < num_samples; each epoch holds every index once.
    """
    epochs, places = np.divmod(start + np.arange(count, dtype=np.int64), num_samples)
    half_bits = np.uint64(max(1, ((num_samples - 1).bit_length() + 1) // 2))
    round_keys = [keys(seed, epochs, r) for r in range(_ROUNDS)]  # each (count,)

    x = places.astype(np.uint64)
    outside = np.arange(count)
    while len(outside):  # the domain is less than four times too large: a few rounds of this
        x[outside] = _feistel(x[outside], [key[outside] for key in round_keys], half_bits)
        outside = outside[x[outside] >= np.uint64(num_samples)]
    return epochs, x.astype(np.int64)


def _feistel(x: np.ndarray, round_keys: list[np.ndarray], half_bits: np.uint64) -> np.ndarray:
    """Permute 0 .. 2 ** (2 * half_bits). A bijection, whatever the round function does."""
    low_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = x >> half_bits, x & low_mask
    for key in round_keys:
        left, right = right, left ^ (mix(right ^ key) & low_mask)
    return (left << half_bits) | right
