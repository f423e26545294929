"""Unpadded batches for one rank, prepared ahead of the step in a background thread.

    for micro_batches in pretraining_batches(shards, tokenizer, data, global_batches, seed=17, ...):
        for batch in micro_batches:
            loss = model(batch.to(device))

The stream of samples is cut into global batches, a global batch into micro batches, and micro batch
m goes to rank m % world_size: rank count and micro batch size decide who computes, never what.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import torch

from mosaicbert_ds.data.config import EVALUATION_MASK_RATE, DataConfig
from mosaicbert_ds.data.masking import mask_tokens, sample_keys
from mosaicbert_ds.data.sampler import samples_at
from mosaicbert_ds.data.shards import ShardSet
from mosaicbert_ds.data.tokenizer import LoadedTokenizer
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.ops import IGNORED_LABEL

S = TypeVar("S")
T = TypeVar("T")

# Held-out samples and their masks are the same in every run, whatever its seed.
EVALUATION_SEED = 0
# Micro batches that evaluation prepares ahead.
_EVALUATION_PREFETCH = 8


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples one after the other, without padding between them, rounded up at the end by `rounded_up`.

    Counts are Python numbers and leave the rounding out: nobody waits for the device to learn them.
    """

    input_ids: torch.Tensor  # (tokens,) int64, some hidden; what stands behind cu_seqlens[-1] is nobody's
    cu_seqlens: torch.Tensor  # (sequences + 1,) int32: sequence i is cu_seqlens[i] : cu_seqlens[i + 1]
    max_seqlen: int  # at least the tokens of the longest sequence
    masked_positions: torch.Tensor  # (masked,) int64, places in input_ids to guess
    labels: torch.Tensor  # (masked,) int64, the ids that stood there, IGNORED_LABEL to round up
    num_tokens: int
    num_masked: int
    num_samples: int  # sequences that count; 0 in an evaluation batch that only fills up

    def model_inputs(self) -> dict[str, Any]:
        """The unpadded call that every pretraining model answers."""
        return {
            "input_ids": self.input_ids,
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "masked_positions": self.masked_positions,
            "labels": self.labels,
        }

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`. A copy to a GPU is not waited for."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in memory that a GPU can read while the host goes on; without a GPU the batch itself."""
        return self._each(torch.Tensor.pin_memory) if torch.cuda.is_available() else self

    def _each(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {k: move(v) if torch.is_tensor(v) else v for k, v in values.items()}
        return Batch(**moved)


def rounded_up(count: int) -> int:
    """The size that stands for `count`: in steps of a 64th of its power of two, at least 64, plus 8.

    Batches then come in a few sizes, so that recorded and compiled code is used again, and what is added
    is computed for nothing: 0.4 % on average from 4,096 on. The 8, because for a multiple of 64 rows cuBLAS
    picks tiles that are 1 to 3 % slower on an H200.
    """
    if count == 0:
        return 0
    step = max(64, 1 << max(count.bit_length() - 7, 0))
    return max(0, -(-(count - 8) // step)) * step + 8


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """Positions `start` to `start + size` of the stream of `sampler.samples_at`, masked at `mask_rate`."""

    start: int
    size: int
    mask_rate: float


def pretraining_batches(
    shards: ShardSet,
    tokenizer: LoadedTokenizer,
    data: DataConfig,
    global_batches: Iterable[GlobalBatch],
    *,
    seed: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> Generator[list[Batch], None, None]:
    """This rank's micro batches, one list for each of `global_batches`, which are asked for `data.prefetch`
    ahead, in the consumer's thread.

    Micro batch m of a global batch goes to rank m % world_size. Raises DataError for data of another
    length or tokenizer, before the first batch; DataError later for damaged shards, and ConfigError for
    a global batch that does not divide.
    """
    shards.check_tokenizer(tokenizer)
    shards.check_settings(data)

    def make(batch: GlobalBatch) -> list[Batch]:
        epochs, indices = samples_at(seed, shards.num_samples, batch.start, batch.size)
        mine = micro_batch_slices(batch.size, micro_batch_size, rank, world_size)
        return [
            _collate(shards, tokenizer, sample_keys(seed, epochs[m], indices[m]), indices[m], batch.mask_rate)
            for m in mine
        ]

    return _ahead(make, iter(global_batches), data.prefetch)


def evaluation_batches(
    shards: ShardSet,
    tokenizer: LoadedTokenizer,
    *,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int = EVALUATION_SEED,
    max_samples: int | None = None,
) -> Generator[Batch, None, None]:
    """This rank's share of the held-out samples (`max_samples` of them at most), masked at 15 %.

    Samples and masks depend on `seed` alone. All ranks yield the same number of batches, so that
    collectives stay aligned: a rank without samples left yields sample 0 with nothing to guess
    (num_samples 0, num_masked 0), which adds nothing to sums of losses and counts.
    """
    shards.check_tokenizer(tokenizer)
    count = shards.num_samples if max_samples is None else min(max_samples, shards.num_samples)
    _, indices = samples_at(seed, shards.num_samples, 0, count)

    def make(start: int) -> Batch:
        first = start + rank * micro_batch_size
        mine = indices[first : first + micro_batch_size]
        if len(mine) == 0:
            return _collate(
                shards, tokenizer, np.zeros(1, np.uint64), np.zeros(1, np.int64), rate=0.0, counts=False
            )
        return _collate(shards, tokenizer, sample_keys(seed, 0, mine), mine, EVALUATION_MASK_RATE)

    return _ahead(make, iter(range(0, count, micro_batch_size * world_size)), _EVALUATION_PREFETCH)


def micro_batch_slices(
    global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[slice]:
    """The parts of a global batch that `rank` computes: its micro batches rank, rank + world_size, ...

    Raises ConfigError if ranks would get parts of unequal size.
    """
    share = micro_batch_size * world_size
    if global_batch_size % share:
        near = max(1, round(global_batch_size / share)) * share
        raise ConfigError(
            f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} "
            f"x {world_size} ranks; use {near}, or another micro batch"
        )
    firsts = range(rank * micro_batch_size, global_batch_size, world_size * micro_batch_size)
    return [slice(first, first + micro_batch_size) for first in firsts]


def _collate(
    shards: ShardSet,
    tokenizer: LoadedTokenizer,
    keys: np.ndarray,
    indices: np.ndarray,
    rate: float,
    counts: bool = True,
) -> Batch:
    """Fetch, mask and pack the samples `indices` (samples,)."""
    tokens, lengths = shards.gather(indices)
    positions, labels = mask_tokens(tokens, lengths, keys, rate, tokenizer)
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])

    def filled(values: np.ndarray, fill: int) -> torch.Tensor:
        return torch.from_numpy(
            np.pad(values, (0, rounded_up(len(values)) - len(values)), constant_values=fill)
        )

    return Batch(
        input_ids=filled(tokens, tokenizer.pad_id),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=min(rounded_up(int(lengths.max())), shards.max_length),
        masked_positions=filled(positions, 0),
        labels=filled(labels, IGNORED_LABEL),
        num_tokens=len(tokens),
        num_masked=len(labels),
        num_samples=len(indices) if counts else 0,
    ).pinned()


def _ahead(make: Callable[[S], T], parts: Iterator[S], prefetch: int) -> Generator[T, None, None]:
    """`make(part)` for each part, in order, `prefetch` of them ahead of the consumer in one thread.

    An error comes out where its batch would have. Closing the generator ends the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
    pending: deque[Future[T]] = deque()
    try:
        for part in parts:
            pending.append(pool.submit(make, part))
            if len(pending) > prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
