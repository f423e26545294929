"""Promises of the masks: the published rates, and nothing special ever hidden."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mosaicbert_ds.data.config import MaskingConfig
from mosaicbert_ds.data.masking import mask_tokens, sample_keys
from mosaicbert_ds.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Ids 0 to 94 are words, 95 to 99 the special tokens: `labels > 0` would lose the word 0."""
    folder = tmp_path_factory.mktemp("words")
    words = [f"word{i}" for i in range(95)] + ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def within_four_sigma(count, trials, probability):
    sigma = (trials * probability * (1 - probability)) ** 0.5
    return abs(count - trials * probability) <= 4 * sigma


def draw(tokenizer, rate, num_samples=4000, length=100, seed=17, epoch=0):
    tokens = np.tile(np.arange(length), num_samples)  # ids 0 to 99: a fifth of a tenth is special
    before = tokens.copy()
    keys = sample_keys(seed, epoch, np.arange(num_samples))
    positions, labels = mask_tokens(tokens, np.full(num_samples, length), keys, rate, tokenizer)
    return before, tokens, positions, labels


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.5])
def test_rate_and_80_10_10_hold_within_four_sigma(tokenizer, rate):
    before, after, positions, labels = draw(tokenizer, rate)
    ordinary = tokenizer.is_ordinary[before].sum()
    assert within_four_sigma(len(positions), ordinary, rate)
    shown = after[positions]
    masked = shown == tokenizer.mask_id
    assert within_four_sigma(masked.sum(), len(positions), 0.8)
    # A random word is the old one by chance, once in 95.
    assert within_four_sigma((shown == labels).sum(), len(positions), 0.1 + 0.1 / 95)
    replaced = shown[~masked & (shown != labels)]
    assert tokenizer.is_ordinary[replaced].all()
    counts = np.bincount(replaced, minlength=95)
    assert all(within_four_sigma(n, len(replaced), 1 / 95) for n in counts)
    # Each of the 95 places is hidden at the same rate: no stripes. 95 tests at once: 5 sigma.
    by_place = np.bincount(positions % 100, minlength=100)[:95]
    assert (abs(by_place - 4000 * rate) < 5 * (4000 * rate * (1 - rate)) ** 0.5).all()


def test_special_tokens_are_never_hidden_and_all_else_stays(tokenizer):
    before, after, positions, labels = draw(tokenizer, rate=0.999)
    assert tokenizer.is_ordinary[before[positions]].all() and (labels == before[positions]).all()
    untouched = np.ones(len(before), bool)
    untouched[positions] = False
    assert (after[untouched] == before[untouched]).all()


def test_id_0_is_a_target_like_any_other(tokenizer):
    labels = draw(tokenizer, rate=0.3)[3]
    assert within_four_sigma((labels == 0).sum(), 4000, 0.3)


def test_masks_change_with_seed_epoch_and_sample_and_with_nothing_else(tokenizer):
    def positions(**kw):
        return draw(tokenizer, 0.3, num_samples=10, **kw)[2]

    assert (positions() == positions()).all()
    assert not np.array_equal(positions(), positions(seed=18))
    assert not np.array_equal(positions(), positions(epoch=1))
    by_sample = [positions()[positions() // 100 == i] % 100 for i in range(10)]
    assert len({tuple(p) for p in by_sample}) == 10
    # A higher rate only adds: runs with other rates see related masks.
    low, high = draw(tokenizer, 0.15)[2], draw(tokenizer, 0.3)[2]
    assert np.isin(low, high).all()


def test_scheduled_rate_is_linear():
    masking = MaskingConfig(rate=0.3, final_rate=0.15)
    assert [masking.rate_at(p) for p in (0, 0.5, 1)] == pytest.approx([0.3, 0.225, 0.15])
    assert MaskingConfig(rate=0.3).rate_at(0.7) == 0.3
