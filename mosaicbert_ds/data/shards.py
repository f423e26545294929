"""Tokenised text on disk: shards that are mapped into memory, and the manifest that vouches for them.

    folder/
      manifest.json             what is in it, the size and sha256 of each file, its own fingerprint
      tokenizer/                the tokenizer that made the tokens
      train/00000-00000.shard   part 0 of unit 0 of the sources
      val/00000-00000.shard

A shard, little-endian:

    header   64 bytes: magic, version, bytes a token, samples, tokens, its own name
    offsets  (samples + 1,) uint32: sample i is tokens[offsets[i] : offsets[i + 1]]
    tokens   (tokens,) uint16, or uint32 when the vocabulary has more than 65,535 ids;
             each sample is [CLS] ... [SEP]

Opening checks sizes, headers and the manifest; `verify` reads every byte. Mapped pages are shared by
the ranks of a host, and text that fits its memory is read from disk once.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mosaicbert_ds.data.config import DataConfig
from mosaicbert_ds.data.files import Summary, sha256_of, sha256_of_facts, write_durably
from mosaicbert_ds.data.tokenizer import LoadedTokenizer
from mosaicbert_ds.errors import DataError

FORMAT_VERSION = 1
SPLITS = ("train", "val")
_MAGIC = b"MBDSHARD"
_HEADER = struct.Struct("<8sIIQQ32s")
_PREPARE_AGAIN = "prepare the data again, or copy it again from where it is whole"


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type on disk that holds every id."""
    return np.dtype("<u2") if vocab_size <= 65_535 else np.dtype("<u4")


def write_shard(path: Path, samples: list[np.ndarray], dtype: np.dtype) -> dict[str, Any]:
    """Write `samples`, each (length,) ids, durably. Returns the shard's entry in the manifest."""
    offsets = np.zeros(len(samples) + 1, "<u4")
    np.cumsum([len(sample) for sample in samples], out=offsets[1:])
    tokens = np.concatenate(samples).astype(dtype)
    name = f"{path.parent.name}/{path.name}"
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, dtype.itemsize, len(samples), len(tokens), name.encode())
    blob = b"".join((header, offsets.tobytes(), tokens.tobytes()))
    write_durably(path, blob)
    return {
        "file": name,
        "samples": len(samples),
        "tokens": len(tokens),
        "bytes": len(blob),
        "sha256": hashlib.sha256(blob).hexdigest(),
    }


@dataclass(frozen=True, eq=False)
class Shard:
    """One mapped file."""

    path: Path
    offsets: np.ndarray  # (samples + 1,) uint32
    tokens: np.ndarray  # (tokens,) uint16 or uint32


def open_shard(folder: Path, entry: dict[str, Any], dtype: np.dtype) -> Shard:
    """Map the shard that a manifest's `entry` describes. Raises DataError unless size and header agree."""
    path = folder / entry["file"]
    if not path.is_file():
        raise DataError(f"{path} is missing; {_PREPARE_AGAIN}")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise DataError(
            f"{path} has {size:,} bytes, not {entry['bytes']:,} as its manifest says; {_PREPARE_AGAIN}"
        )
    import torch  # here, so that the workers of a preparation, which only write, start without it

    # torch.from_file and not np.memmap, which keeps a file descriptor for each of thousands of shards.
    blob = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    samples, num_tokens = entry["samples"], entry["tokens"]
    header = _HEADER.pack(_MAGIC, FORMAT_VERSION, dtype.itemsize, samples, num_tokens, entry["file"].encode())
    middle = len(header) + 4 * (samples + 1)
    if blob[: len(header)].tobytes() != header or size != middle + dtype.itemsize * num_tokens:
        raise DataError(
            f"{path} is not the shard that its manifest describes: {_describe(blob)}; {_PREPARE_AGAIN}"
        )
    return Shard(path, blob[len(header) : middle].view("<u4"), blob[middle:].view(dtype))


def _describe(blob: np.ndarray) -> str:
    if len(blob) < _HEADER.size or blob[:8].tobytes() != _MAGIC:
        return "its first bytes are no shard's"
    _, version, itemsize, samples, tokens, name = _HEADER.unpack(blob[: _HEADER.size].tobytes())
    label = name.rstrip(b"\0").decode(errors="replace")
    return (
        f"it says '{label}', version {version}, {itemsize} bytes a token, {samples} samples, {tokens} tokens"
    )


# ---- the manifest


def fingerprint_of(manifest: dict[str, Any]) -> str:
    """sha256 over everything that the manifest states: content, order and settings."""
    stated = {key: value for key, value in manifest.items() if key != "fingerprint"}
    return sha256_of_facts(stated)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder. Raises DataError if it is missing, damaged or edited."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; make it with: mosaicbert data prepare (again, if it was interrupted)"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, stated = manifest["format_version"], manifest["fingerprint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error!r}; {_PREPARE_AGAIN}") from None
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}; this version reads {FORMAT_VERSION}; {_PREPARE_AGAIN}"
        )
    if stated != fingerprint_of(manifest):
        raise DataError(f"{path} was edited or damaged: its fingerprint does not fit; {_PREPARE_AGAIN}")
    return manifest


# ---- the samples of a split


class ShardSet:
    """All samples of one split, in the order of the sources: index 0 to num_samples - 1."""

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str, shards: list[Shard]):
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_sha256: str = manifest["tokenizer"]["sha256"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.max_length: int = manifest["settings"]["max_length"]
        self.unigram_entropy_nats: float = manifest["unigram_entropy_nats"]
        self._shards = shards
        sizes = [len(shard.offsets) - 1 for shard in shards]
        self._first = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))  # (shards + 1,)

    @classmethod
    def open(cls, folder: str | Path, split: str) -> "ShardSet":
        """Map the shards of `split` ("train" or "val"). Raises DataError for any damage seen on the way."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if split not in SPLITS:
            raise DataError(f"{folder} has no split '{split}'; allowed are {', '.join(SPLITS)}")
        dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
        return cls(
            folder, manifest, split, [open_shard(folder, entry, dtype) for entry in manifest[split]["shards"]]
        )

    @property
    def num_samples(self) -> int:
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        return sum(len(shard.tokens) for shard in self._shards)

    def sample(self, index: int) -> np.ndarray:
        """(length,) int64: one sample, [CLS] ... [SEP]."""
        return self.gather(np.array([index]))[0]

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """(samples,) int64: tokens of each sample."""
        return self.gather(indices)[1]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples one after the other: tokens (tokens,) int64 and lengths (samples,) int64.

        Raises DataError naming the shard where a sample is longer than allowed or an id is unknown.
        """
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.num_samples):
            raise IndexError(f"sample {indices.min()} to {indices.max()} of {self.num_samples}")
        numbers = np.searchsorted(self._first, indices, side="right") - 1
        parts, lengths = [], []
        for number, place in zip(numbers.tolist(), (indices - self._first[numbers]).tolist(), strict=True):
            shard = self._shards[number]
            begin, end = int(shard.offsets[place]), int(shard.offsets[place + 1])
            if not 3 <= end - begin <= self.max_length:
                fault = f"sample {place} has {end - begin} tokens, allowed are 3 to {self.max_length}"
                raise DataError(f"{shard.path} is damaged: {fault}; {_PREPARE_AGAIN}")
            parts.append(shard.tokens[begin:end])
            lengths.append(end - begin)
        tokens = np.concatenate(parts).astype(np.int64)
        if tokens.max() >= self.vocab_size:
            at = int(np.searchsorted(np.cumsum(lengths), tokens.argmax(), side="right"))
            fault = f"token id {tokens.max()} in a vocabulary of {self.vocab_size}"
            raise DataError(f"{self._shards[numbers[at]].path} is damaged: {fault}; {_PREPARE_AGAIN}")
        return tokens, np.array(lengths)

    def check_tokenizer(self, tokenizer: LoadedTokenizer) -> None:
        """Raises DataError unless `tokenizer` is the one that made the tokens."""
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{self.folder} was tokenised with {self.tokenizer_sha256[:12]}, {tokenizer.folder} is"
                f" {tokenizer.sha256[:12]}; use {self.folder / 'tokenizer'}, or prepare the data again"
            )

    def check_settings(self, data: DataConfig) -> None:
        """Raises DataError unless the samples were cut as `data` says."""
        stated = self.manifest["settings"]
        for key in ("max_length", "documents"):
            if stated[key] != getattr(data, key):
                raise DataError(
                    f"{self.folder} was prepared with {key} {stated[key]}, the recipe says"
                    f" {getattr(data, key)}; set data.{key}={stated[key]}, or prepare the data again"
                )


def verify(folder: str | Path) -> Summary:
    """Read every byte of a prepared folder. Raises DataError naming the first file that has changed."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for name, expected in manifest["tokenizer"]["files"].items():
        path = folder / "tokenizer" / name
        if not path.is_file() or sha256_of(path) != expected:
            raise DataError(f"{path} is missing or changed; {_PREPARE_AGAIN}")
    rows = []
    for split in SPLITS:
        shards = ShardSet.open(folder, split)
        for entry in manifest[split]["shards"]:
            if sha256_of(folder / entry["file"]) != entry["sha256"]:
                raise DataError(
                    f"{folder / entry['file']} is damaged: its sha256 is not the manifest's; {_PREPARE_AGAIN}"
                )
        files = len(manifest[split]["shards"])
        rows.append(
            (split, f"{shards.num_samples:,} samples, {shards.num_tokens:,} tokens, {files:,} shards whole")
        )
    return Summary(f"{folder} is whole", (*rows, ("fingerprint", manifest["fingerprint"])))
