"""Promises of the sampler, the masks and the loader: what a rank count or a restart must not change."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds.data.config import DataConfig, MaskingConfig
from mosaicbert_ds.data.loader import (
    GlobalBatch,
    evaluation_batches,
    micro_batch_slices,
    pretraining_batches,
    rounded_up,
)
from mosaicbert_ds.data.sampler import samples_at
from mosaicbert_ds.data.shards import ShardSet
from mosaicbert_ds.data.tokenizer import load_tokenizer
from mosaicbert_ds.errors import ConfigError, DataError
from mosaicbert_ds.ops import IGNORED_LABEL

DATA = DataConfig(max_length=32, documents="chunk")  # as the prepared folder was made


@pytest.fixture(scope="module")
def train(prepared):
    return ShardSet.open(prepared, "train")


@pytest.fixture(scope="module")
def val(prepared):
    return ShardSet.open(prepared, "val")


@pytest.fixture(scope="module")
def tokenizer(prepared):
    return load_tokenizer(prepared / "tokenizer")


def batches(shards, tokenizer, *, global_batch_size, num_samples_total, start_sample=0, **layout):
    rate_at, size = MaskingConfig(final_rate=0.15).rate_at, global_batch_size
    stream = (
        GlobalBatch(start=start, size=size, mask_rate=rate_at(start / num_samples_total))
        for start in range(start_sample, num_samples_total, size)
    )
    layout = {"seed": 17, "rank": 0, "world_size": 1, **layout}
    return pretraining_batches(shards, tokenizer, DATA, stream, **layout)


def contents(micro_batches):
    """Sample by sample: the tokens as shown, and the places and ids to guess."""
    samples = []
    for batch in micro_batches:
        for begin, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            positions, labels = batch.masked_positions[: batch.num_masked], batch.labels[: batch.num_masked]
            inside = (positions >= begin) & (positions < end)
            places = (positions[inside] - begin).tolist()
            samples.append((batch.input_ids[begin:end].tolist(), places, labels[inside].tolist()))
    return samples


def same_batch(a, b):
    names = ("input_ids", "cu_seqlens", "masked_positions", "labels")
    return a.max_seqlen == b.max_seqlen and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_every_epoch_holds_every_sample_once(num_samples, seed, epoch):
    epochs, indices = samples_at(seed, num_samples, epoch * num_samples, num_samples)
    assert (epochs == epoch).all()
    assert (np.sort(indices) == np.arange(num_samples)).all()


@given(st.integers(2, 400_000_000), st.integers(0, 2**40), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_any_stretch_of_the_stream_is_the_same_wherever_it_is_begun(num_samples, start, skipped, count):
    whole = samples_at(17, num_samples, start, skipped + count)
    part = samples_at(17, num_samples, start + skipped, count)
    assert all((a[skipped:] == b).all() for a, b in zip(whole, part, strict=True))


def test_order_is_shuffled_anew_each_epoch_and_each_seed():
    orders = [samples_at(seed, 10_000, epoch * 10_000, 10_000)[1] for seed in (1, 2) for epoch in (0, 1)]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.04  # 4 sigma of chance
        for other in orders[:i]:
            assert (order == other).sum() < 10  # chance leaves 1


def test_global_batch_is_the_same_in_all_810_layouts():
    global_batch = np.arange(5040)
    layouts = [(w, m) for w in range(1, 5041) if 5040 % w == 0 for m in range(1, 5041) if 5040 % (w * m) == 0]
    assert len(layouts) == 810
    for world, micro in layouts:
        by_rank = [[global_batch[s] for s in micro_batch_slices(5040, micro, r, world)] for r in range(world)]
        assert len({len(slices) for slices in by_rank}) == 1
        in_order = [slices[a] for a in range(len(by_rank[0])) for slices in by_rank]
        assert all(len(part) == micro for part in in_order)
        assert (np.concatenate(in_order) == global_batch).all()


@given(
    st.sampled_from(
        [(w, m) for w in (1, 2, 3, 4, 6, 8, 12, 24) for m in (1, 2, 4, 8, 12, 24, 48) if 48 % (w * m) == 0]
    )
)
@settings(max_examples=30, deadline=None)
def test_samples_and_masks_do_not_depend_on_the_layout(train, tokenizer, layout):
    world, micro = layout
    start = train.num_samples // 48 * 48 - 48  # the epoch ends within
    sizes = {"global_batch_size": 48, "num_samples_total": start + 144, "start_sample": start}
    whole = [contents(b) for b in batches(train, tokenizer, micro_batch_size=48, **sizes)]
    ranks = [
        batches(train, tokenizer, micro_batch_size=micro, rank=r, world_size=world, **sizes)
        for r in range(world)
    ]
    for expected, by_rank in zip(whole, zip(*ranks, strict=True), strict=True):
        assert contents([b for step in zip(*by_rank, strict=True) for b in step]) == expected


@given(st.integers(1, 2**40))
def test_sizes_are_rounded_up_a_little_and_into_few(count):
    size = rounded_up(count)
    assert count <= size < count + max(64, 1 + count / 64)
    assert size % 64 == 8
    assert len({rounded_up(n) for n in range(count, 2 * count, max(count // 1000, 1))}) <= 130


def test_replay_from_every_position_equals_the_undisturbed_stream(train, tokenizer):
    sizes = {
        "global_batch_size": 32,
        "micro_batch_size": 16,
        "num_samples_total": train.num_samples * 2 // 32 * 32,
    }
    whole = list(batches(train, tokenizer, **sizes))
    for k in range(0, len(whole)):
        replay = batches(train, tokenizer, start_sample=32 * k, **sizes)
        for expected, got in zip(whole[k : k + 3], replay, strict=False):
            assert all(same_batch(a, b) for a, b in zip(expected, got, strict=True))
        replay.close()


def test_restored_tokens_are_the_shards_samples(train, tokenizer):
    sizes = {"global_batch_size": 64, "micro_batch_size": 64, "num_samples_total": 64}
    [[batch]] = batches(train, tokenizer, **sizes)
    _, indices = samples_at(17, train.num_samples, 0, 64)
    restored = batch.input_ids.clone()
    restored[batch.masked_positions[: batch.num_masked]] = batch.labels[: batch.num_masked]
    for begin, index in zip(batch.cu_seqlens[:-1].tolist(), indices.tolist(), strict=True):
        sample = train.sample(index)
        assert sample[0] == tokenizer.cls_id and sample[-1] == tokenizer.sep_id
        assert restored[begin : begin + len(sample)].tolist() == sample.tolist()
    assert batch.num_samples == 64 and batch.num_tokens == batch.cu_seqlens[-1]
    assert train.lengths(indices).max() <= batch.max_seqlen <= train.max_length
    # rounded up, and what is added is nobody's token and nobody's target
    assert len(batch.input_ids) == rounded_up(batch.num_tokens)
    assert len(batch.labels) == len(batch.masked_positions) == rounded_up(batch.num_masked)
    assert (batch.labels[: batch.num_masked] >= 0).all()
    assert (batch.labels[batch.num_masked :] == IGNORED_LABEL).all()
    assert not batch.masked_positions[batch.num_masked :].any()
    assert batch.cu_seqlens.dtype == torch.int32 and batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_gives_all_ranks_the_same_number_of_batches_and_each_sample_once(val, tokenizer, world):
    count = min(50, val.num_samples)
    [*whole] = evaluation_batches(
        val, tokenizer, micro_batch_size=50, rank=0, world_size=1, max_samples=count
    )
    ranks = [
        list(
            evaluation_batches(
                val, tokenizer, micro_batch_size=4, rank=r, world_size=world, max_samples=count
            )
        )
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    in_order = [batch for step in zip(*ranks, strict=True) for batch in step]
    filler = [batch for batch in in_order if batch.num_samples == 0]
    assert all(batch.num_masked == 0 and batch.num_tokens > 0 for batch in filler)
    assert contents([batch for batch in in_order if batch.num_samples]) == contents(whole)
    assert sum(batch.num_samples for batch in in_order) == count


def test_closing_the_stream_ends_its_thread(train, tokenizer):
    before = threading.active_count()
    stream = batches(train, tokenizer, global_batch_size=8, micro_batch_size=8, num_samples_total=8000)
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_error_in_the_thread_reaches_the_consumer_in_its_place(train, tokenizer, monkeypatch):
    gather, calls = ShardSet.gather, []

    def failing(self, indices):
        calls.append(indices)
        if len(calls) == 3:
            raise DataError("the disk is gone")
        return gather(self, indices)

    monkeypatch.setattr(ShardSet, "gather", failing)
    stream = batches(train, tokenizer, global_batch_size=8, micro_batch_size=8, num_samples_total=80)
    next(stream), next(stream)
    with pytest.raises(DataError, match="the disk is gone"):
        next(stream)


def test_a_stream_of_batches_that_grow_is_the_same_stream(train, tokenizer):
    """What is decided late, and how large, does not change which samples come, in which order."""
    fixed = {"seed": 17, "rank": 0, "world_size": 1, "micro_batch_size": 4}
    sizes, asked = [4, 4, 8, 16], []

    def growing():
        for k, size in enumerate(sizes):
            asked.append(size)
            yield GlobalBatch(start=sum(sizes[:k]), size=size, mask_rate=0.3)

    stream = pretraining_batches(train, tokenizer, dataclasses.replace(DATA, prefetch=1), growing(), **fixed)
    first = next(stream)
    assert asked == [4, 4], "no further ahead than it must"
    grown = [first, *stream]
    assert [len(micro_batches) for micro_batches in grown] == [1, 1, 2, 4]
    whole = [GlobalBatch(start=0, size=32, mask_rate=0.3)]
    [at_once] = pretraining_batches(train, tokenizer, DATA, whole, **fixed)
    assert contents([batch for step in grown for batch in step]) == contents(at_once)


def test_a_global_batch_that_does_not_divide_is_refused(train, tokenizer):
    sizes = {"global_batch_size": 16, "micro_batch_size": 3, "num_samples_total": 160, "world_size": 2}
    with pytest.raises(ConfigError, match="16 is not a multiple of micro_batch_size 3 x 2 ranks; use 18"):
        next(batches(train, tokenizer, **sizes))


def test_data_of_another_length_is_refused(train, tokenizer):
    layout = {"seed": 1, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    with pytest.raises(DataError, match="max_length 32, the recipe says 128"):
        pretraining_batches(train, tokenizer, DataConfig(), [], **layout)
