"""The text that benchmarks train on: random ids in rows as long as a corpus has them, no file needed.

Benchmarks measure the trainer, so random rows take the same way as a user's: through `ShardSet` and the
loader, with its masks, its packing and its shapes. Only the shards stand in memory instead of on disk.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models

from mosaicbert_ds.data.config import DataConfig
from mosaicbert_ds.data.shards import Shard, ShardSet, token_dtype
from mosaicbert_ds.data.tokenizer import SPECIAL_TOKENS, LoadedTokenizer

FULL_SHARE = 0.75  # of C4's documents that fill 128 tokens


def lengths_like_c4(num_sequences: int = 512, max_length: int = 128) -> list[int]:
    """Three of four rows are cut at `max_length` tokens, the others end uniformly from an eighth of it on."""
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(max(max_length // 8, 3), max_length, (num_sequences,), generator=generator)
    is_short = torch.rand(num_sequences, generator=generator) < 1 - FULL_SHARE
    return torch.where(is_short, short, max_length).tolist()


def random_text(
    lengths: list[int], vocab_size: int, settings: DataConfig
) -> tuple[ShardSet, LoadedTokenizer]:
    """Rows [CLS] random ids [SEP] of the given lengths, as if prepared with `settings`, and a tokenizer of
    `vocab_size` ids to go with them."""
    num_special = len(SPECIAL_TOKENS)
    pad_id, unk_id, cls_id, sep_id, mask_id = range(num_special)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype("<u4")
    tokens = np.random.default_rng(0).integers(num_special, vocab_size, offsets[-1])
    tokens[offsets[:-1]], tokens[offsets[1:] - 1] = cls_id, sep_id
    name = "random ids"
    is_ordinary = np.arange(vocab_size) >= num_special
    tokenizer = LoadedTokenizer(
        folder=Path(name),
        tokenizer=Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL_TOKENS)})),
        sha256=name,
        vocab_size=vocab_size,
        pad_id=pad_id,
        unk_id=unk_id,
        cls_id=cls_id,
        sep_id=sep_id,
        mask_id=mask_id,
        ordinary_ids=np.flatnonzero(is_ordinary),
        is_ordinary=is_ordinary,
    )
    manifest = {
        "fingerprint": name,
        "tokenizer": {"sha256": name, "vocab_size": vocab_size},
        "settings": {"max_length": settings.max_length, "documents": settings.documents},
        "unigram_entropy_nats": float(np.log(vocab_size - num_special)),
    }
    shard = Shard(Path(name), offsets, tokens.astype(token_dtype(vocab_size)))
    return ShardSet(Path(name), manifest, "train", [shard]), tokenizer
