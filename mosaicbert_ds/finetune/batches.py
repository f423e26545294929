"""Which rows make a batch, and batches as flat buffers of a few fixed shapes.

A step reads one int32 buffer: token ids, token types, `cu_seqlens` and labels one behind the other. The
number of tokens and the longest length are rounded up to a few values, and a batch that has too few rows
is filled up with empty sequences, so that a whole epoch needs a handful of shapes and each can be captured
in a CUDA graph once. Rows behind `cu_seqlens[-1]` belong to no sequence; empty sequences have no label.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mosaicbert_ds.data.sampler import samples_at
from mosaicbert_ds.finetune.dataset import EncodedSplit
from mosaicbert_ds.ops.reference import IGNORED_LABEL

_SMALLEST_TOKENS, _SMALLEST_LENGTH = 64, 16
# Steps in an octave of sizes. Tokens cost time, so their steps are fine: 6 % is lost on average. Where the
# model pads, the length is what costs.
_TOKEN_STEPS, _PADDED_LENGTH_STEPS = 8, 4
_ALIGNMENT = 4  # int32 numbers: kernels are compiled for addresses that are multiples of 16 bytes


class Shape(NamedTuple):
    """What a captured step is made for."""

    tokens: int
    longest: int  # of a sequence
    sequences: int


class Inputs(NamedTuple):
    """A batch as views of its buffer."""

    input_ids: Tensor  # (tokens,) int32
    token_type_ids: Tensor  # (tokens,) int32
    cu_seqlens: Tensor  # (sequences + 1,) int32
    labels: Tensor  # (sequences,) int32 with IGNORED_LABEL, or float32 with NaN, where there is none


def epoch_batches(
    seed: int, epoch: int, lengths: np.ndarray, batch_size: int, *, shuffle: bool, sort_window: int
) -> list[np.ndarray]:
    """The rows (indices into `lengths`) of each batch of an epoch: every row once, the last batch short.

    A function of its arguments alone. With `sort_window` over 1, so many batches of the shuffled order are
    sorted by length, cut, and shuffled again as batches.
    """
    num_rows = len(lengths)
    if not shuffle:
        return _cut(np.arange(num_rows), batch_size)
    _, order = samples_at(seed, num_rows, epoch * num_rows, num_rows)
    if sort_window == 1:
        return _cut(order, batch_size)
    batches: list[np.ndarray] = []
    for window in _cut(order, batch_size * sort_window):
        cut = _cut(window[np.argsort(lengths[window], kind="stable")], batch_size)
        _, again = samples_at(seed, len(cut), (epoch * num_rows + len(batches)) * len(cut), len(cut))
        batches += [cut[place] for place in again]
    return batches


def evaluation_batches(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """All rows, the longest first, in batches of at most `max_tokens` slots of their longest row."""
    batches, order = [], np.argsort(-lengths, kind="stable")
    while len(order):
        size = max(1, max_tokens // int(lengths[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def shape_of(lengths: np.ndarray, sequences: int, *, padded_up_to: int | None) -> Shape:
    """The shape that rows of `lengths` are rounded up to. `padded_up_to`: of a model that computes every
    slot, the longest row that it takes; None for a model that does not."""
    longest = int(lengths.max())
    if padded_up_to is not None:
        longest = min(_round_up(longest, _SMALLEST_LENGTH, _PADDED_LENGTH_STEPS), padded_up_to)
        return Shape(sequences * longest, longest, sequences)
    tokens = _round_up(int(lengths.sum()), _SMALLEST_TOKENS, _TOKEN_STEPS)
    return Shape(tokens, _round_up(longest, _SMALLEST_LENGTH, 1), sequences)


def _round_up(n: int, smallest: int, steps: int) -> int:
    """The next of `steps` evenly spaced sizes in an octave, in multiples of `smallest`."""
    octave = 1 << (max(n, 1) - 1).bit_length()  # the power of two that is not below n
    step = max(smallest, octave // 2 // steps)
    return -(-n // step) * step


def buffer_size(shape: Shape) -> int:
    """Numbers (int32) in the buffer of a batch of this shape."""
    return 2 * shape.tokens + _aligned(shape.sequences + 1) + _aligned(shape.sequences)


def views(buffer: Tensor, shape: Shape, is_regression: bool) -> Inputs:
    """The parts of `buffer`, (buffer_size,) int32."""
    start = 2 * shape.tokens
    labels = start + _aligned(shape.sequences + 1)
    return Inputs(
        input_ids=buffer[: shape.tokens],
        token_type_ids=buffer[shape.tokens : start],
        cu_seqlens=buffer[start : start + shape.sequences + 1],
        labels=buffer[labels : labels + shape.sequences].view(
            torch.float32 if is_regression else torch.int32
        ),
    )


def pack(
    split: EncodedSplit, batches: Sequence[np.ndarray], shapes: Sequence[Shape], is_regression: bool
) -> Tensor:
    """The buffers of `batches`, one behind the other: (sum of buffer_size,) int32 on the CPU."""
    sizes = [buffer_size(shape) for shape in shapes]
    starts = np.cumsum([0, *sizes[:-1]])
    packed = np.zeros(sum(sizes), np.int32)

    # The tokens of all batches in one go: from where in the split, to where in the buffers.
    rows = np.concatenate(batches)
    first = np.asarray(split.offsets)[rows]
    lengths = np.asarray(split.offsets)[rows + 1] - first
    begin = np.cumsum(lengths) - lengths  # of each row in the stream of all tokens
    stream = np.arange(int(lengths.sum()))
    source = stream + np.repeat(first - begin, lengths)
    edges = np.cumsum([0, *map(len, batches)])
    tokens_before = np.concatenate([begin, [len(stream)]])[edges]  # (batches + 1,)
    target = stream + np.repeat(starts - tokens_before[:-1], np.diff(tokens_before))
    packed[target] = split.tokens[source]
    is_second = stream - np.repeat(begin, lengths) >= np.repeat(np.asarray(split.second)[rows], lengths)
    offset = np.repeat([shape.tokens for shape in shapes], np.diff(tokens_before))
    packed[target + offset] = is_second

    nothing = np.float32(np.nan) if is_regression else np.int32(IGNORED_LABEL)
    for batch, shape, start, low, high in zip(batches, shapes, starts, edges[:-1], edges[1:], strict=True):
        at = start + 2 * shape.tokens
        cu_seqlens = packed[at : at + shape.sequences + 1]
        np.cumsum(lengths[low:high], out=cu_seqlens[1 : len(batch) + 1])
        cu_seqlens[len(batch) + 1 :] = cu_seqlens[len(batch)]
        at += _aligned(shape.sequences + 1)
        labels = packed[at : at + shape.sequences].view(nothing.dtype)
        labels[:] = nothing
        if len(split.labels):
            labels[: len(batch)] = split.labels[batch]
    return torch.from_numpy(packed)


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT
