"""Which tokens the model has to guess: BERT's 80/10/10 rule, drawn from a hash of the token's place.

Every ordinary token is chosen with probability `rate`, independently. Of the chosen, 80 % become
[MASK], 10 % a random ordinary token, 10 % stay as they are (Devlin et al., NAACL 2019, 3.1). All of it
is a function of (seed, epoch, sample, position): ranks, micro batches and restarts do not enter.
"""

import numpy as np

from mosaicbert_ds.data.hashing import keys, mix
from mosaicbert_ds.data.tokenizer import LoadedTokenizer

_TO_MASK, _TO_RANDOM = 0.8, 0.1


def mask_tokens(
    tokens: np.ndarray,
    lengths: np.ndarray,
    sample_keys: np.ndarray,
    rate: float,
    tokenizer: LoadedTokenizer,
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens in place; return (masked_positions, labels), both (masked,) int64.

    tokens: (tokens,) int64, the samples one after the other. lengths: (samples,) tokens of each.
    sample_keys: (samples,) uint64 from `sample_keys`.
    """
    starts = np.cumsum(lengths) - lengths
    place = np.arange(len(tokens)) - np.repeat(starts, lengths)  # (tokens,) position in its sample
    draw = mix(np.repeat(sample_keys, lengths) + place.astype(np.uint64))
    # The upper 32 bits decide whether; a second hash of the few that are chosen decides how.
    chosen = (draw >> np.uint64(32)) < np.uint64(round(rate * 2**32))
    positions = np.flatnonzero(chosen & tokenizer.is_ordinary[tokens])  # (masked,)
    labels = tokens[positions]

    draw = mix(draw[positions])
    how = (draw >> np.uint64(32)) / 2.0**32  # (masked,) in [0, 1)
    ordinary = tokenizer.ordinary_ids
    which = ((draw & np.uint64(0xFFFFFFFF)) * np.uint64(len(ordinary))) >> np.uint64(32)
    shown = np.where(how < _TO_MASK + _TO_RANDOM, ordinary[which], labels)
    tokens[positions] = np.where(how < _TO_MASK, tokenizer.mask_id, shown)
    return positions, labels


def sample_keys(seed: int, epochs: np.ndarray | int, indices: np.ndarray) -> np.ndarray:
    """(samples,) uint64: what the masks of each sample are drawn from."""
    # The constant keeps masks apart from the sampler's round keys, which hash the same numbers.
    return keys(seed, 0x6D61736B, epochs, indices)
