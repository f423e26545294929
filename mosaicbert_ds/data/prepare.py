"""Text to tokenised shards: parallel, resumable, and the same bytes however it was run.

    prepare(["corpus/"], "shards", "tokenizer", DataConfig(max_length=128), workers=16)

Sources are cut into units (a large file, a run of small ones, a shard of a Hugging Face dataset). A
unit is tokenised document by document into parts; a part is at most one shard of training and one of
held-out text, and a record in `work/` that says how far in the unit it reaches. The record is written
last: a run that is started again skips what the records cover and goes on. When all units are done the
records become the manifest and `work/` is removed.
"""

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mosaicbert_ds.data.config import DataConfig
from mosaicbert_ds.data.files import Summary, sha256_of, write_durably
from mosaicbert_ds.data.shards import (
    FORMAT_VERSION,
    SPLITS,
    fingerprint_of,
    open_shard,
    read_manifest,
    token_dtype,
    write_shard,
)
from mosaicbert_ds.data.sources import (
    BadInput,
    Document,
    OnError,
    Piece,
    find_pieces,
    read_piece,
    refuse_or_count,
)
from mosaicbert_ds.data.tokenizer import TOKENIZER_FILES, LoadedTokenizer, copy_tokenizer, load_tokenizer
from mosaicbert_ds.errors import ConfigError, DataError

# Large enough for sequential disk reads, small enough that an interruption loses little.
SHARD_BYTES = 64 * 2**20
# Files smaller than this share a unit: 100,000 small files must not become 100,000 shards.
UNIT_BYTES = 8 * 2**20
# A loss over 15 % of so many held-out tokens has a standard error of about 0.1.
_FEW_TOKENS = 5_000
# Text handed to the tokenizer at once: enough for all its threads, little enough for the memory.
BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**22, 2048

Item = tuple[Piece, Document | BadInput]


@dataclass(frozen=True)
class _Unit:
    number: int
    pieces: tuple[Piece, ...]
    held_out: bool  # all of it is held-out text


@dataclass(frozen=True)
class _Job:
    """What every unit is prepared with."""

    folder: Path
    data: DataConfig
    text_field: str
    on_error: OnError
    shard_bytes: int
    held_out_fraction: float
    held_out_hashes: frozenset[int]  # of documents in held-out sources: never to be trained on

    def split_of(self, text: str, unit: _Unit) -> str | None:
        """The side of a document; None for one to be trained on that also stands in a held-out source.

        Decided by the text alone, so that copies of a document never stand on both sides.
        """
        if unit.held_out:
            return "val"
        text_hash = _hash(text)
        if text_hash in self.held_out_hashes:
            return None
        return "val" if text_hash < self.held_out_fraction * 2**64 else "train"


def prepare(
    sources: Sequence[str | Path],
    out_dir: str | Path,
    tokenizer_dir: str | Path,
    data: DataConfig,
    *,
    workers: int | None = None,
    held_out_fraction: float = 0.005,
    held_out_sources: Sequence[str | Path] = (),
    text_field: str = "text",
    on_error: OnError = "refuse",
    shard_bytes: int = SHARD_BYTES,
) -> Summary:
    """Tokenise `sources` into `out_dir`; go on where an interrupted run stopped.

    workers: processes, all cores by default. held_out_sources, if given, are the held-out split, and
    held_out_fraction is not used. Raises DataError for unreadable input (with on_error "refuse"), for
    text without any held-out document, and for a folder made with other settings.
    """
    folder = Path(out_dir)
    workers = workers or os.cpu_count() or 1
    if not 0 < held_out_fraction <= 0.5:
        raise ConfigError(
            f"held_out_fraction {held_out_fraction} is not above 0 and at most 0.5; 0.005 is usual"
        )
    if workers < 1 or shard_bytes < 1:
        raise ConfigError(f"workers {workers} and shard_bytes {shard_bytes} must be at least 1")
    tokenizer = load_tokenizer(tokenizer_dir)
    train, held_out = find_pieces(sources), find_pieces(held_out_sources) if held_out_sources else None
    held_out_pieces = held_out.pieces if held_out else ()
    settings = {
        "tokenizer_sha256": tokenizer.sha256,
        "max_length": data.max_length,
        "documents": data.documents,
        "text_field": text_field,
        "shard_bytes": shard_bytes,
        "held_out_fraction": None if held_out else held_out_fraction,
        "copies": "by words",
        "sources": [[piece.name, piece.num_bytes] for piece in train.pieces],
        "held_out_sources": [[piece.name, piece.num_bytes] for piece in held_out_pieces],
    }
    if _is_finished(folder, settings):
        _tell_newer_sources((*train.pieces, *held_out_pieces), folder / "manifest.json")
    else:
        copy_tokenizer(tokenizer.folder, folder / "tokenizer")
        job = _Job(
            folder=folder,
            data=data,
            text_field=text_field,
            on_error=on_error,
            shard_bytes=shard_bytes,
            held_out_fraction=0 if held_out else held_out_fraction,
            held_out_hashes=_hashes_of(held_out_pieces, text_field),
        )
        units = [*_units(train.pieces, held_out=False)]
        units += _units(held_out_pieces, held_out=True, first=len(units))
        _run_units(job, units, workers)
        left_out = train.left_out + (held_out.left_out if held_out else Counter())
        _finish(job, units, settings, tokenizer, left_out)
    shutil.rmtree(folder / "work", ignore_errors=True)
    return _summary(folder)


# ---- settings and resuming


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether `folder` is complete; starts it if it is new. Raises DataError if it was made otherwise."""
    work = folder / "work" / "settings.json"
    is_finished = (folder / "manifest.json").exists()
    if is_finished:
        # One by a version that told copies by the bytes of their text is whole, and nothing is added to it.
        earlier = {"copies": settings["copies"]} | read_manifest(folder)["settings"]
    elif work.exists():
        earlier = json.loads(work.read_text())
    elif folder.exists() and (not folder.is_dir() or any(path.name != "work" for path in folder.iterdir())):
        raise DataError(f"{folder} holds other things; choose a new folder")
    else:
        write_durably(work, json.dumps(settings).encode())
        return False
    if unknown := [key for key in settings if key not in earlier]:
        raise DataError(
            f"{folder} was begun by another version, without {', '.join(unknown)}; choose a new folder"
        )
    changed = [
        _difference(key, earlier[key], settings[key]) for key in settings if earlier[key] != settings[key]
    ]
    if changed:
        raise DataError(
            f"{folder} has other settings: {'; '.join(changed)}; restore them, or choose a new folder"
        )
    return is_finished


def _tell_newer_sources(pieces: Iterable[Piece], manifest: Path) -> None:
    """Sources are known by name and size: one that was edited to the same size would pass for unchanged."""
    made_s = manifest.stat().st_mtime
    newer = [piece.path for piece in pieces if piece.path and piece.path.stat().st_mtime > made_s]
    if newer:
        more = f" and {len(newer) - 1:,} more were" if newer[1:] else " was"
        print(
            f"{newer[0]}{more} written after {manifest.parent} was made of files of that size; if the text "
            "has changed, prepare it into a new folder",
            file=sys.stderr,
        )


def _difference(key: str, earlier: Any, now: Any) -> str:
    if not isinstance(now, list) or not isinstance(earlier, list):
        return f"{key} was {earlier}, is {now}"
    for old, new in itertools.zip_longest(earlier, now):
        if old != new:
            old, new = (f"{entry[0]} ({entry[1]} bytes)" if entry else "nothing" for entry in (old, new))
            return f"{key} had {old} where {new} stands"
    raise AssertionError(key)


def _units(pieces: Iterable[Piece], held_out: bool, first: int = 0) -> Iterator[_Unit]:
    """Neighbouring small files together, all else alone. Depends on the pieces only, not on the workers."""
    number, size = first, 0
    group: list[Piece] = []
    for piece in pieces:
        num_bytes = UNIT_BYTES if piece.num_bytes is None else piece.num_bytes
        if group and size + num_bytes > UNIT_BYTES:
            yield _Unit(number, tuple(group), held_out)
            number, group, size = number + 1, [], 0
        group.append(piece)
        size += num_bytes
    if group:
        yield _Unit(number, tuple(group), held_out)


# ---- one unit


@dataclass
class _Part:
    """Samples on their way to a shard."""

    samples: dict[str, list[np.ndarray]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    num_tokens: int = 0
    items: int = 0
    documents: int = 0
    skipped: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # by file, by kind


def _record_path(job: _Job, unit: _Unit, part: int) -> Path:
    return job.folder / "work" / f"{unit.number:05d}-{part:05d}.json"


def _records(job: _Job, unit: _Unit) -> list[dict[str, Any]]:
    """Records of the unit's parts that are complete on disk, up to the first that is not."""
    records: list[dict[str, Any]] = []
    while (path := _record_path(job, unit, len(records))).is_file():
        record = json.loads(path.read_text())
        entries = [record[split] for split in SPLITS if record[split]]
        if any(_size_of(job.folder / entry["file"]) != entry["bytes"] for entry in entries):
            break
        records.append(record)
    return records


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def _prepare_unit(job: _Job, unit: _Unit, advance: Callable[[int], None]) -> None:
    """Write the parts of `unit` that are missing. `advance` is told of finished documents."""
    records = _records(job, unit)
    if records and records[-1]["last"]:
        return
    tokenizer = load_tokenizer(job.folder / "tokenizer")
    dtype = token_dtype(tokenizer.vocab_size)
    items: Iterator[Item] = (
        (piece, item) for piece in unit.pieces for item in read_piece(piece, job.text_field)
    )
    for _ in itertools.islice(items, sum(record["items"] for record in records)):
        pass

    number, part = len(records), _Part()
    for batch in _batches(items):
        advance(len(batch))
        for (piece, item), samples in zip(batch, _tokenise(batch, tokenizer, job.data, dtype), strict=True):
            part.items += 1
            if isinstance(item, BadInput):
                refuse_or_count(item, job.on_error, part.skipped[piece.name])
            elif not samples:
                part.skipped[piece.name]["no tokens"] += 1
            elif (split := job.split_of(item.text, unit)) is None:
                part.skipped[piece.name]["held out"] += 1
            else:
                part.documents += 1
                part.samples[split] += samples
                part.num_tokens += sum(map(len, samples))
            if part.num_tokens * dtype.itemsize >= job.shard_bytes:
                _commit(job, unit, number, part, dtype, last=False)
                number, part = number + 1, _Part()
    _commit(job, unit, number, part, dtype, last=True)


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for piece, item in items:
        batch.append((piece, item))
        size += len(item.text) if isinstance(item, Document) else 0
        if size >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenise(
    batch: list[Item], tokenizer: LoadedTokenizer, data: DataConfig, dtype: np.dtype
) -> Iterator[list[np.ndarray]]:
    """For each item its samples, [CLS] ... [SEP]; none for what has no tokens."""
    room = data.max_length - 2
    texts = [item.text if isinstance(item, Document) else "" for _, item in batch]
    for ids in tokenizer.encode(texts, limit=room if data.documents == "cut" else None):
        chunks = (ids[start : start + room] for start in range(0, len(ids), room))
        yield [np.array([tokenizer.cls_id, *chunk, tokenizer.sep_id], dtype) for chunk in chunks]


def _commit(job: _Job, unit: _Unit, number: int, part: _Part, dtype: np.dtype, last: bool) -> None:
    record: dict[str, Any] = {
        "items": part.items,
        "documents": part.documents,
        "skipped": part.skipped,
        "last": last,
    }
    for split, samples in part.samples.items():
        path = job.folder / split / f"{unit.number:05d}-{number:05d}.shard"
        record[split] = write_shard(path, samples, dtype) if samples else None
    write_durably(_record_path(job, unit, number), json.dumps(record).encode())


# ---- all units


def _run_units(job: _Job, units: list[_Unit], workers: int) -> None:
    processes = min(workers, len(units))
    progress = _Progress(len(units))
    if processes == 1:  # the tokenizer's own threads use the other cores
        for unit in units:
            _prepare_unit(job, unit, functools.partial(progress.show, unit.number))
        progress.close()
        return

    context = multiprocessing.get_context("spawn")  # the tokenizer's threads do not survive a fork
    documents, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(
        processes, context, _start_worker, (job, documents, stop, max(1, workers // processes))
    )
    try:
        pending: set[Future[None]] = {pool.submit(_prepare_in_worker, unit) for unit in units}
        shown = 0
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            progress.show(len(units) - len(pending), documents.value - shown)
            shown = documents.value
    except BrokenProcessPool:
        raise DataError(
            "a worker process was killed, perhaps out of memory; run it again with fewer workers"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        progress.close()


_worker: dict[str, Any] = {}  # set once in each worker process


def _start_worker(job: _Job, documents: Any, stop: Any, threads: int) -> None:
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops us
    # A killed parent must not leave workers behind that write into a folder in which the next run works.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(job=job, documents=documents, stop=stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _prepare_in_worker(unit: _Unit) -> None:
    def advance(documents: int) -> None:
        if _worker["stop"].is_set():
            raise InterruptedError("another worker failed")
        with _worker["documents"].get_lock():
            _worker["documents"].value += documents

    _prepare_unit(_worker["job"], unit, advance)


class _Progress:
    """A bar on a terminal, a line every half minute elsewhere."""

    def __init__(self, num_units: int):
        self._num_units = num_units
        self._bar = tqdm(desc="prepare", unit=" documents", unit_scale=True, disable=None)
        self._documents = 0
        self._printed_at = time.monotonic()

    def show(self, units_done: int, new_documents: int) -> None:
        self._documents += new_documents
        self._bar.set_postfix_str(f"unit {units_done} of {self._num_units}", refresh=False)
        self._bar.update(new_documents)
        if self._bar.disable and time.monotonic() - self._printed_at > 30:
            self._printed_at = time.monotonic()
            line = f"prepare: {self._documents:,} documents, unit {units_done} of {self._num_units}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()


# ---- the manifest


def _finish(
    job: _Job,
    units: list[_Unit],
    settings: dict[str, Any],
    tokenizer: LoadedTokenizer,
    left_out: Counter[str],
) -> None:
    """Join the records into the manifest and clear away what is not part of the result."""
    by_unit = [_records(job, unit) for unit in units]
    if not all(records and records[-1]["last"] for records in by_unit):
        raise DataError(
            f"{job.folder}: records of finished units are gone; another prepare works in this folder; "
            "let it end, and run it again"
        )
    records = list(itertools.chain.from_iterable(by_unit))
    copied = [path for name in TOKENIZER_FILES if (path := job.folder / "tokenizer" / name).is_file()]
    manifest: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "tokenizer": {
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "files": {path.name: sha256_of(path) for path in copied},
        },
        "documents": sum(record["documents"] for record in records),
        "skipped": _added(record["skipped"] for record in records),
        "left_out": dict(sorted(left_out.items())),
    }
    for split in SPLITS:
        shards = [record[split] for record in records if record[split]]
        totals = {key: sum(shard[key] for shard in shards) for key in ("samples", "tokens")}
        manifest[split] = {**totals, "shards": shards}
    if not manifest["train"]["samples"] or not manifest["val"]["samples"]:
        empty = "held-out" if manifest["train"]["samples"] else "training"
        raise DataError(
            f"{job.folder}: {manifest['documents']} documents (.txt: between blank lines) left no {empty} "
            "text; give another --held-out-fraction, as 0.05, or --held-out-sources, or more text, and a new "
            "folder"
        )
    counts = _token_counts(job.folder, manifest, tokenizer)
    manifest["unknown_tokens"] = sum(int(of_split[tokenizer.unk_id]) for of_split in counts.values())
    manifest["unigram_entropy_nats"] = _unigram_entropy_nats(
        *(counts[split][tokenizer.ordinary_ids] for split in SPLITS)
    )
    if manifest["unigram_entropy_nats"] is None:
        raise DataError(
            f"{job.folder}: the tokenizer knows no word of the held-out text; train one on text of this "
            "kind, and choose a new folder"
        )
    manifest["fingerprint"] = fingerprint_of(manifest)

    named = {job.folder / shard["file"] for split in SPLITS for shard in manifest[split]["shards"]}
    for name in ("tokenizer", *SPLITS):
        for path in (job.folder / name).iterdir():
            if path not in named and path not in copied:  # left by a killed writer
                path.unlink()
    write_durably(job.folder / "manifest.json", json.dumps(manifest, indent=1).encode())


def _added(skipped: Iterable[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    sums: dict[str, Counter[str]] = {}
    for by_file in skipped:
        for name, kinds in by_file.items():
            sums.setdefault(name, Counter()).update(kinds)
    return {name: dict(sorted(kinds.items())) for name, kinds in sorted(sums.items()) if kinds}


def _token_counts(
    folder: Path, manifest: dict[str, Any], tokenizer: LoadedTokenizer
) -> dict[str, np.ndarray]:
    """Split to how often each id stands in it, (vocab_size,)."""
    counts = {split: np.zeros(tokenizer.vocab_size, np.int64) for split in SPLITS}  # (vocab_size,)
    for split in SPLITS:
        for entry in manifest[split]["shards"]:
            tokens = open_shard(folder, entry, token_dtype(tokenizer.vocab_size)).tokens
            counts[split] += np.bincount(tokens, minlength=tokenizer.vocab_size)
    return counts


def _unigram_entropy_nats(train: np.ndarray, val: np.ndarray) -> float | None:
    """Loss on held-out text of a model that knows only how often each word is used in training; None if no
    ordinary token is held out.

    Cross entropy in nats over ordinary tokens, (ordinary,) counts, with one added to each: what masked tokens
    cost before anything about context is learned.
    """
    if not val.any():
        return None
    nats = -np.log((train + 1) / (train + 1).sum())
    # Rounded, so that the last bit of another machine's logarithm does not change the fingerprint.
    return round(float((val * nats).sum() / val.sum()), 6)


def _summary(folder: Path) -> Summary:
    manifest = read_manifest(folder)
    kinds = sum((Counter(kinds) for kinds in manifest["skipped"].values()), Counter[str]())
    nats = manifest["unigram_entropy_nats"]
    rows = [
        ("documents", f"{manifest['documents']:,}"),
        *((s, f"{manifest[s]['samples']:,} samples, {manifest[s]['tokens']:,} tokens") for s in SPLITS),
        ("skipped", ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items())) or "nothing"),
        ("files not read", ", ".join(f"{n:,} {kind}" for kind, n in manifest["left_out"].items()) or "none"),
        ("unknown words", _unknown_said(manifest)),
        ("unigram entropy", f"{nats:.3f} nats (perplexity {math.exp(nats):,.0f})"),
        ("fingerprint", manifest["fingerprint"]),
    ]
    if full := _full_rows(folder, manifest):
        cut = f"{full:,} documents at {manifest['settings']['max_length']} tokens, the rest of them left out"
        rows.insert(3, ("cut", f"{cut}; to keep it: --set data.documents=chunk, and a new folder"))
    if manifest["val"]["tokens"] < _FEW_TOKENS:
        by = "fraction" if manifest["settings"]["held_out_fraction"] else "sources"
        few = f"so little that its loss says little; give more by --held-out-{by}, and a new folder"
        rows.insert(3, ("held out", few))
    return Summary(f"shards in {folder}", tuple(rows))


def _full_rows(folder: Path, manifest: dict[str, Any]) -> int:
    """Documents that fill their only sample: all but the few of just that length were longer."""
    if manifest["settings"]["documents"] != "cut":
        return 0
    dtype = token_dtype(manifest["tokenizer"]["vocab_size"])
    entries = (entry for split in SPLITS for entry in manifest[split]["shards"])
    lengths = (np.diff(open_shard(folder, entry, dtype).offsets) for entry in entries)
    return sum(int(np.count_nonzero(each == manifest["settings"]["max_length"])) for each in lengths)


def _unknown_said(manifest: dict[str, Any]) -> str:
    """The share of the tokens that are words: not [CLS] and [SEP], two a sample."""
    if "unknown_tokens" not in manifest:
        return "not counted by the version that made it"
    words = sum(manifest[split]["tokens"] - 2 * manifest[split]["samples"] for split in SPLITS)
    return f"{manifest['unknown_tokens'] / max(words, 1):.2%} of the tokens are [UNK]"


def _hash(text: str) -> int:
    """64 bits that depend on the words alone: white space makes no other tokens, and no other document."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def _hashes_of(pieces: Iterable[Piece], text_field: str) -> frozenset[int]:
    """Hashes of all documents. What cannot be read is met again, and judged, when it is tokenised."""
    items = (item for piece in pieces for item in read_piece(piece, text_field))
    return frozenset(_hash(item.text) for item in items if isinstance(item, Document))
