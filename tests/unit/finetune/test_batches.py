"""Batches hold every row once, whatever their shape is rounded to, and shapes are few."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds.finetune.batches import (
    Shape,
    buffer_size,
    epoch_batches,
    evaluation_batches,
    pack,
    shape_of,
    views,
)
from mosaicbert_ds.finetune.dataset import EncodedSplit
from mosaicbert_ds.ops.reference import IGNORED_LABEL

LENGTHS = st.lists(st.integers(3, 60), min_size=1, max_size=70).map(np.array)


@given(LENGTHS, st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_an_epoch_has_every_row_once_in_full_batches(lengths, size, window, shuffle) -> None:
    batches = epoch_batches(7, 2, lengths, size, shuffle=shuffle, sort_window=window)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    if not shuffle:
        assert np.concatenate(batches).tolist() == list(range(len(lengths)))


def test_the_order_is_another_in_each_epoch_and_seed_and_sorted_only_within_a_window() -> None:
    lengths = np.random.default_rng(0).integers(3, 100, 512)
    orders = [
        np.concatenate(epoch_batches(seed, epoch, lengths, 8, shuffle=True, sort_window=4)).tolist()
        for seed, epoch in ((1, 0), (1, 1), (2, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    plain = np.concatenate(epoch_batches(1, 0, lengths, 8, shuffle=True, sort_window=1))
    for start in range(0, 512, 32):
        assert sorted(orders[0][start : start + 32]) == sorted(plain[start : start + 32].tolist())
    spread = [np.ptp(lengths[orders[0][i : i + 8]]) for i in range(0, 512, 8)]
    assert np.mean(spread) < 0.5 * np.mean([np.ptp(lengths[plain[i : i + 8]]) for i in range(0, 512, 8)])


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 9), st.booleans(), st.booleans())
def test_packed_buffers_give_back_rows_types_and_labels(lengths, size, padded, is_regression) -> None:
    rng = np.random.default_rng(0)
    split = EncodedSplit(
        tokens=rng.integers(5, 500, lengths.sum()).astype(np.uint16),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        second=rng.integers(1, lengths + 1).astype(np.int32),
        labels=rng.random(len(lengths)) * 5 if is_regression else rng.integers(0, 3, len(lengths)) * 1.0,
        num_broken=0,
    )
    batches = epoch_batches(1, 0, lengths, size, shuffle=True, sort_window=1)
    up_to = int(lengths.max()) if padded else None
    shapes = [shape_of(lengths[rows], size, padded_up_to=up_to) for rows in batches]
    packed, start = pack(split, batches, shapes, is_regression), 0
    for rows, shape in zip(batches, shapes, strict=True):
        inputs = views(packed[start : start + buffer_size(shape)], shape, is_regression)
        start += buffer_size(shape)
        ends = inputs.cu_seqlens.tolist()
        assert len(ends) == size + 1 and set(ends[len(rows) :]) == {ends[len(rows)]}
        assert ends[-1] <= shape.tokens and lengths[rows].max() <= shape.longest
        for place, row in enumerate(rows):
            ids = inputs.input_ids[ends[place] : ends[place + 1]]
            types = inputs.token_type_ids[ends[place] : ends[place + 1]]
            assert ids.tolist() == split.tokens[split.offsets[row] : split.offsets[row + 1]].tolist()
            assert types.sum() == lengths[row] - split.second[row] and types.diff().ge(0).all()
        real, filler = inputs.labels[: len(rows)], inputs.labels[len(rows) :]
        torch.testing.assert_close(real.double(), torch.tensor(split.labels[rows]), rtol=1e-6, atol=0)
        assert filler.isnan().all() if is_regression else filler.eq(IGNORED_LABEL).all()
    assert start == len(packed)


def test_shapes_are_few_and_waste_little() -> None:
    """SST-2-like lengths, 4,000 batches of 16."""
    lengths = np.random.default_rng(0).gamma(2.0, 7.0, (4000, 16)).astype(int).clip(3, 256)
    shapes = [shape_of(batch, 16, padded_up_to=None) for batch in lengths]
    assert len(set(shapes)) <= 40
    common = sorted((shapes.count(shape) for shape in set(shapes)), reverse=True)
    assert sum(common[:12]) > 0.9 * len(shapes), "a dozen captured graphs run nearly all steps"
    # The finest step, 64 tokens, is coarse for batches as short as these.
    assert sum(shape.tokens for shape in shapes) < 1.2 * lengths.sum()
    assert all(shape.tokens % 4 == 0 for shape in shapes), "kernels see 16-byte addresses"


@pytest.mark.parametrize(
    ("longest", "rounded"), [(3, 16), (17, 32), (60, 64), (100, 112), (200, 224), (240, 250), (250, 250)]
)
def test_a_model_that_pads_gets_lengths_near_the_longest(longest: int, rounded: int) -> None:
    assert shape_of(np.array([3, longest]), 4, padded_up_to=250) == Shape(4 * rounded, rounded, 4)


@given(LENGTHS, st.integers(60, 400))
def test_evaluation_covers_every_row_within_its_budget(lengths, budget) -> None:
    batches = evaluation_batches(lengths, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(rows) * lengths[rows].max() <= budget for rows in batches)
