"""Text in: files, folders and Hugging Face datasets as an ordered list of pieces, each a stream of documents.

A source is
  * a file: `.txt` (documents separated by blank lines), `.jsonl` or `.json` (an object a line, text in
    one of its fields), `.parquet` (text in one of its columns); all but the last may be compressed,
    `.gz .zst .xz .bz2`;
  * a folder: all such files below it, sorted by name;
  * `hf:PATH[:CONFIG]:SPLIT`, such as `hf:allenai/c4:en:train`: streamed with `datasets`, a piece a shard.

Reading never runs code from what it reads. What cannot be read comes out as `BadInput` in its place,
so that whoever reads decides whether to stop or to count.
"""

import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from mosaicbert_ds.errors import DataError

OnError = Literal["refuse", "skip"]

COMPRESSIONS = ("", ".gz", ".zst", ".xz", ".bz2")
TEXT_SUFFIXES = (".txt", ".jsonl", ".json")
READABLE = "text (.txt .jsonl .json, also with .gz .zst .xz .bz2) or .parquet"
# A longer line or document is a damaged or wrong file, and would be read into memory whole.
MAX_DOCUMENT_BYTES = 64 * 2**20


class Document(NamedTuple):
    text: str
    line: int  # where it begins: line of the file from 1, or row of the table


class BadInput(NamedTuple):
    kind: str  # what the manifest counts it under
    message: str  # a sentence that names file and place


@dataclass(frozen=True)
class Piece:
    """The unit that sources come in: one file, or one shard of a Hugging Face dataset."""

    name: str  # relative to its source: the same text elsewhere has the same name
    num_bytes: int | None  # on disk; None if it is streamed
    path: Path | None = None
    hf_spec: str = ""
    hf_shard: int = 0


@dataclass(frozen=True)
class Found:
    """What the sources hold."""

    pieces: tuple[Piece, ...]
    left_out: Counter[str]  # files of folders that are no text, by extension


def refuse_or_count(bad: BadInput, on_error: OnError, skipped: Counter[str]) -> None:
    """Raise DataError, or count it under its kind."""
    if on_error == "refuse":
        raise DataError(
            f"{bad.message}; mend it and take a new --out, or skip and count such input with --on-error skip"
        )
    skipped[bad.kind] += 1


# ---- from sources to pieces


def find_pieces(sources: Sequence[str | Path]) -> Found:
    """All pieces of `sources`, in order. Raises DataError for a source that is missing or no text."""
    pieces: list[Piece] = []
    left_out: Counter[str] = Counter()
    for source in map(str, sources):
        if source.startswith("hf:"):
            dataset = _hf_dataset(source)
            pieces += [
                Piece(f"{source}#{shard}", None, hf_spec=source, hf_shard=shard)
                for shard in range(dataset.num_shards)
            ]
        elif Path(source).is_dir():
            walked = [*os.walk(source, onerror=_refuse_folder)]
            files = [Path(folder) / name for folder, _, names in walked for name in names]
            known = sorted((f for f in files if _format_of(f) and f.is_file()), key=lambda f: f.as_posix())
            if not known:
                raise DataError(f"{source} holds no {READABLE}")
            pieces += [Piece(f.relative_to(source).as_posix(), f.stat().st_size, f) for f in known]
            left_out += Counter(f.suffix or f.name for f in files if not _format_of(f))
            left_out += Counter("broken link" for f in files if _format_of(f) and not f.is_file())
            folders = (Path(folder) / name for folder, names, _ in walked for name in names)
            left_out += Counter("linked folder" for f in folders if f.is_symlink())
        elif Path(source).is_file():
            path = Path(source)
            if not _format_of(path):
                raise DataError(f"{source}: cannot read '{''.join(path.suffixes)}'; allowed is {READABLE}")
            pieces.append(Piece(path.name, path.stat().st_size, path))
        else:
            raise DataError(f"{source} is no file and no folder; give one, or hf:PATH:CONFIG:SPLIT")
    if not pieces:
        raise DataError("no source given; name files, folders or hf:PATH:CONFIG:SPLIT")
    return Found(tuple(pieces), left_out)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}; change its rights, or leave it out")


def _format_of(path: Path) -> str:
    """ ".txt", ".jsonl" or ".parquet"; "" if the name says neither."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return ".parquet"
    for suffix in TEXT_SUFFIXES:
        if any(name.endswith(suffix + compression) for compression in COMPRESSIONS):
            return ".txt" if suffix == ".txt" else ".jsonl"
    return ""


@functools.lru_cache(maxsize=8)  # a worker reads many shards of the same dataset
def _hf_dataset(spec: str) -> Any:
    """The dataset that `hf:PATH[:CONFIG]:SPLIT` names, as a stream."""
    import datasets  # takes seconds, and few runs need it

    parts = spec.removeprefix("hf:").split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"'{spec}' is not of the form hf:PATH:SPLIT or hf:PATH:CONFIG:SPLIT")
    config = parts[1] if len(parts) == 3 else None
    try:
        return datasets.load_dataset(parts[0], config, split=parts[-1], streaming=True)
    except Exception as error:  # hub, network and format errors of many libraries
        raise DataError(f"{spec} cannot be opened: {type(error).__name__}: {error}") from None


# ---- from a piece to documents


def read_piece(piece: Piece, text_field: str = "text") -> Iterator[Document | BadInput]:
    """The documents of `piece` in order, with what could not be read in its place.

    Raises DataError where reading fails for reasons outside the text: permissions, disk, network.
    """
    if piece.path is None:
        yield from _read_hf(piece, text_field)
        return
    if piece.num_bytes == 0:
        yield BadInput("empty file", f"{piece.path} is empty")
        return
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers[_format_of(piece.path)](piece.path, text_field)
    except (EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, pa.ArrowException) as error:
        yield BadInput("damaged file", f"{piece.path} is damaged: {error}")
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{piece.path} cannot be read: {error.strerror}") from None
        yield BadInput("damaged file", f"{piece.path} is damaged: {error}")  # gzip and bz2 say it so


def _read_txt(path: Path, _text_field: str) -> Iterator[Document | BadInput]:
    """Documents are separated by blank lines; a line that is not UTF-8 is left out of its document."""
    lines: list[str] = []
    begin, size = 1, 0
    for number, line in _lines(path):
        if isinstance(line, BadInput):
            yield line
        elif line.strip():
            begin = begin if size else number
            size += len(line)
            if size <= MAX_DOCUMENT_BYTES:
                lines.append(line)
            else:
                lines.clear()
        elif size:
            yield _joined(lines, path, begin, size)
            lines.clear()
            size = 0
    if size:
        yield _joined(lines, path, begin, size)


def _joined(lines: list[str], path: Path, begin: int, size: int) -> Document | BadInput:
    if size > MAX_DOCUMENT_BYTES:
        message = f"{path}, line {begin}: a document of {size:,} characters; allowed {MAX_DOCUMENT_BYTES:,}"
        return BadInput("over-long document", f"{message}; separate documents with blank lines")
    return Document("".join(lines).rstrip(), begin)


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document | BadInput]:
    for number, line in _lines(path):
        if isinstance(line, BadInput):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield BadInput(
                    "invalid JSON", f"{path}, line {number}: not a JSON object in one line: {error}"
                )
                continue
            yield _field(row, text_field, f"{path}, line {number}", number)


def _read_parquet(path: Path, text_field: str) -> Iterator[Document | BadInput]:
    with pq.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            message = f"{path} has no column '{text_field}'; it has {columns}; --text-field names another"
            yield BadInput("no text field", message)
            return
        number = 0
        for batch in file.iter_batches(columns=[text_field], batch_size=1024):
            for value in batch.column(0):
                number += 1
                try:
                    row = {text_field: value.as_py()}
                except UnicodeDecodeError:
                    yield BadInput("not UTF-8", f"{path}, row {number}: not UTF-8")
                    continue
                yield _field(row, text_field, f"{path}, row {number}", number)


def _read_hf(piece: Piece, text_field: str) -> Iterator[Document | BadInput]:
    dataset = _hf_dataset(piece.hf_spec)
    try:
        rows = dataset.shard(num_shards=dataset.num_shards, index=piece.hf_shard)
        for number, row in enumerate(rows, start=1):
            yield _field(row, text_field, f"{piece.name}, row {number}", number)
    except Exception as error:  # hub, network and format errors of many libraries
        raise DataError(f"{piece.name} cannot be read: {type(error).__name__}: {error}") from None


def _field(row: Any, text_field: str, where: str, number: int) -> Document | BadInput:
    """The text of one JSON object or table row."""
    text = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        message = f"{where}: field '{text_field}' is missing or not a string"
        if isinstance(row, dict) and text_field not in row:
            message += f"; the row has {', '.join(map(str, row)) or 'none'}; --text-field names another"
        return BadInput("no text field", message)
    if len(text) > MAX_DOCUMENT_BYTES:
        return BadInput(
            "over-long document", f"{where}: {len(text):,} characters; allowed {MAX_DOCUMENT_BYTES:,}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadInput("not UTF-8", f"{where}: half a surrogate pair at character {error.start}")
    return Document(text, number)


def _lines(path: Path) -> Iterator[tuple[int, str | BadInput]]:
    """Line numbers from 1 and lines, each with its line end."""
    offset = 0  # of the line, in the decompressed bytes
    with _open(path) as file:
        for number in itertools.count(1):
            raw = file.readline(MAX_DOCUMENT_BYTES)
            if not raw:
                return
            size = len(raw)
            if size == MAX_DOCUMENT_BYTES and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(2**20)
                    size += len(raw)
                where = f"{path}, line {number} (offset {offset:,})"
                yield (
                    number,
                    BadInput("over-long line", f"{where}: {size:,} bytes; allowed {MAX_DOCUMENT_BYTES:,}"),
                )
            else:
                try:
                    line = raw.decode()
                    yield number, line.removeprefix("\ufeff") if number == 1 else line
                except UnicodeDecodeError as error:
                    where = f"{path}, line {number} (offset {offset + error.start:,})"
                    yield (
                        number,
                        BadInput("not UTF-8", f"{where}: byte 0x{raw[error.start]:02x} is not UTF-8"),
                    )
            offset += size


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed as its last suffix says."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".bz2":
        return bz2.open(path)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), 2**17)
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """The bytes in a `.zst` file of any number of frames.

    The library's own reader takes a file that was cut short for a whole one.
    """

    # A frame may ask for this window; `zstd --long=31` writes the largest.
    MAX_WINDOW_BYTES = 2**31
    # Zstandard expands up to 2**15 times, so a hostile block of this size still fits the memory.
    READ_BYTES = 2**12

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._blocks = self._decompressed()
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._block:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._block = memoryview(block)
        size = min(len(buffer), len(self._block))
        buffer[:size] = self._block[:size]
        self._block = self._block[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompressed(self) -> Iterator[bytes]:
        frame = None
        while data := self._file.read(self.READ_BYTES):
            while data:
                if frame is None:
                    frame = zstandard.ZstdDecompressor(max_window_size=self.MAX_WINDOW_BYTES).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame is not None:
            raise EOFError("it ends in the middle of a zstd frame")
