"""One tokenizer and one small prepared folder for all data tests."""

import shutil
from pathlib import Path

import pytest

import mosaicbert_ds
from mosaicbert_ds.data.config import DataConfig
from mosaicbert_ds.data.prepare import prepare
from mosaicbert_ds.data.tokenizer import train_tokenizer

TEXT = Path(mosaicbert_ds.__file__).parent / "samples" / "pretrain"
DATA = DataConfig(max_length=32, documents="chunk")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train_tokenizer([TEXT / "val.jsonl"], folder, vocab_size=2048)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, tokenizer_dir):
    """About 1,300 samples of 32 tokens at most, in several shards."""
    folder = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(
        [TEXT / "val.jsonl"],
        folder,
        tokenizer_dir,
        DATA,
        workers=1,
        held_out_fraction=0.3,
        shard_bytes=16_384,
    )
    return folder


@pytest.fixture
def copied(prepared, tmp_path):
    """The prepared folder, free to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "copied"))
