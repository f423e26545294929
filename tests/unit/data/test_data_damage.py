"""Promise: no damage to a prepared folder goes unseen, and the message names the file."""

import json
import shutil

import numpy as np
import pytest

from mosaicbert_ds.data.config import DataConfig
from mosaicbert_ds.data.loader import GlobalBatch, pretraining_batches
from mosaicbert_ds.data.shards import ShardSet, fingerprint_of, open_shard, token_dtype, verify, write_shard
from mosaicbert_ds.data.tokenizer import load_tokenizer, train_tokenizer
from mosaicbert_ds.errors import DataError

FIRST, SECOND = "train/00000-00000.shard", "train/00000-00001.shard"


def edit_manifest(folder, change, fix_fingerprint):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if fix_fingerprint:
        manifest["fingerprint"] = fingerprint_of(manifest)
    path.write_text(json.dumps(manifest))


def flip(path, at):
    blob = bytearray(path.read_bytes())
    blob[at] ^= 1
    path.write_bytes(blob)


def swap(folder):
    (folder / FIRST).rename(folder / "kept")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "kept").rename(folder / SECOND)


def swap_as_if_of_equal_size(folder):
    """The header alone must tell them apart."""

    def change(manifest):
        a, b = manifest["train"]["shards"][:2]
        for key in ("bytes", "samples", "tokens", "sha256"):
            a[key], b[key] = b[key], a[key]

    swap(folder)
    edit_manifest(folder, change, fix_fingerprint=True)


def wrong_dtype(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = open_shard(folder, manifest["train"]["shards"][0], token_dtype(2048))
    samples = np.split(shard.tokens, shard.offsets[1:-1])
    entry = write_shard(folder / FIRST, samples, np.dtype("<u4"))
    edit_manifest(folder, lambda m: m["train"]["shards"].__setitem__(0, entry), fix_fingerprint=True)


SEEN_WHEN_OPENED = {
    "missing shard": (lambda f: (f / FIRST).unlink(), FIRST, "is missing"),
    "truncated shard": (
        lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes()[:-1]),
        FIRST,
        "bytes, not",
    ),
    "empty shard": (lambda f: (f / FIRST).write_bytes(b""), FIRST, "0 bytes, not"),
    "longer shard": (lambda f: (f / FIRST).write_bytes((f / FIRST).read_bytes() + b"x"), FIRST, "bytes, not"),
    "swapped shards": (swap, FIRST, "bytes, not|it says"),
    "swapped shards of equal size": (swap_as_if_of_equal_size, FIRST, "it says 'train/00000-00001.shard'"),
    "no shard": (lambda f: (f / FIRST).write_bytes(b"0" * (f / FIRST).stat().st_size), FIRST, "no shard's"),
    "wrong dtype": (wrong_dtype, FIRST, "4 bytes a token"),
    "flipped header": (lambda f: flip(f / FIRST, 20), FIRST, "is not the shard"),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json", "does not exist"),
    "cut manifest": (lambda f: (f / "manifest.json").write_text('{"format'), "manifest.json", "is damaged"),
    "manifest of another kind": (
        lambda f: (f / "manifest.json").write_text("[]"),
        "manifest.json",
        "is damaged",
    ),
    "edited manifest": (
        lambda f: edit_manifest(f, lambda m: m["train"]["shards"].pop(), False),
        "manifest.json",
        "was edited",
    ),
    "newer format": (
        lambda f: edit_manifest(f, lambda m: m.update(format_version=2), True),
        "manifest.json",
        "has format version 2",
    ),
}


@pytest.mark.parametrize("kind", SEEN_WHEN_OPENED)
def test_damage_is_seen_when_the_folder_is_opened(copied, kind):
    damage, file, message = SEEN_WHEN_OPENED[kind]
    damage(copied)
    for look in (lambda: ShardSet.open(copied, "train"), lambda: verify(copied)):
        with pytest.raises(DataError, match=f"{file}.*({message})"):
            look()


@pytest.mark.parametrize("part", ["offsets", "middle", "end"])
def test_flipped_bit_is_seen_by_verify(copied, part):
    at = {"offsets": 70, "middle": (copied / FIRST).stat().st_size // 2, "end": -1}[part]
    flip(copied / FIRST, at)
    with pytest.raises(DataError, match=f"{FIRST}.*sha256"):
        verify(copied)


def test_changed_tokenizer_file_is_seen_by_verify(copied):
    (copied / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer_config.json is missing or changed"):
        verify(copied)


def read_all(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    data = DataConfig(max_length=32, documents="chunk")
    shards = ShardSet.open(folder, "train")
    whole = [
        GlobalBatch(start=start, size=16, mask_rate=0.3) for start in range(0, shards.num_samples - 15, 16)
    ]
    layout = {"micro_batch_size": 16, "rank": 0, "world_size": 1}
    for _ in pretraining_batches(shards, tokenizer, data, whole, seed=1, **layout):
        pass


def test_unknown_token_id_is_an_error_before_it_reaches_a_model(copied):
    blob = bytearray((copied / FIRST).read_bytes())
    blob[-4:-2] = (2048).to_bytes(2, "little")
    (copied / FIRST).write_bytes(blob)
    with pytest.raises(DataError, match=f"{FIRST} is damaged: token id 2048 in a vocabulary of 2048"):
        read_all(copied)


def test_impossible_offsets_are_an_error_while_training(copied):
    blob = bytearray((copied / FIRST).read_bytes())
    blob[68:72] = (60_000).to_bytes(4, "little")
    (copied / FIRST).write_bytes(blob)
    with pytest.raises(DataError, match=f"{FIRST} is damaged: sample [01] has -?[0-9]+ tokens"):
        read_all(copied)


def test_another_tokenizer_is_an_error(copied, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("another text\n" * 9)
    train_tokenizer([text], tmp_path / "other", 64)
    shards = ShardSet.open(copied, "train")
    with pytest.raises(DataError, match="was tokenised with"):
        shards.check_tokenizer(load_tokenizer(tmp_path / "other"))
    shutil.copy(tmp_path / "other" / "tokenizer.json", copied / "tokenizer" / "tokenizer.json")
    with pytest.raises(DataError, match=r"tokenizer.json is missing or changed"):
        verify(copied)


def test_unknown_split_is_an_error(prepared):
    with pytest.raises(DataError, match="no split 'test'; allowed are train, val"):
        ShardSet.open(prepared, "test")
