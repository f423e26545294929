"""From a task's files to token ids that are mapped into memory.

A split is read once, tokenised once and kept in `cache/KEY/`, where KEY is a hash of everything that
decides the result: the file's bytes, the columns and labels, the tokenizer, the length. What is wrong in a
file is one sentence that names file and line.
"""

import csv
import hashlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from mosaicbert_ds.data.files import sha256_of, write_durably
from mosaicbert_ds.data.shards import token_dtype
from mosaicbert_ds.data.tokenizer import LoadedTokenizer
from mosaicbert_ds.errors import DataError
from mosaicbert_ds.finetune.tasks import Task

FORMAT_VERSION = 1
FORMATS = (".tsv", ".csv", ".jsonl")
_LABELS_SAID = 10  # of a message: more are no help to a reader
_ROWS_A_BATCH = 10_000  # tokenised at a time: bounds the memory of the library's objects


@dataclass(frozen=True)
class Rows:
    """A split as it stands in its file."""

    texts: list[tuple[str, ...]]
    labels: list[float]  # class numbers, or values of a regression; empty where the split has none
    num_broken: int  # rows left out, of a task that allows it


# ---- reading


def read_split(task: Task, path: Path, labelled: bool) -> Rows:
    """Read one split. Raises DataError naming the file, and the line of the first thing that is wrong."""
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    num_broken = 0
    wanted = (*task.text_columns, *((task.label_column,) if labelled else ()))
    # Only a task's labelled files come without header: the test files of CoLA have one.
    for line, row in _records(path, wanted, task.header if labelled else ()):
        if isinstance(row, str):
            if not (task.may_be_broken and labelled):  # a test row left out would move the answers below it
                raise DataError(f"{path}:{line}: {row}; mend or remove the row")
            num_broken += 1
            continue
        texts.append(tuple(row[column] for column in task.text_columns))
        if labelled:
            labels.append(_label(task, row[task.label_column], f"{path}:{line}"))
    if not texts:
        raise DataError(f"{path} holds no rows; give a file with at least one")
    return Rows(texts, labels, num_broken)


def labels_in(path: Path, column: str) -> tuple[str, ...]:
    """The different values of `column`, sorted: the classes of a task that does not name them."""
    found = set()
    for line, row in _records(path, (column,), ()):
        if isinstance(row, str):
            raise DataError(f"{path}:{line}: {row}; mend or remove the row")
        if not row[column]:
            raise DataError(f"{path}:{line}: no label in column '{column}'; mend or remove the row")
        found.add(row[column])
    if len(found) < 2:
        raise DataError(
            f"{path}: column '{column}' holds {f'only {found.pop()}' if found else 'no label'}; "
            "a classification has two labels or more"
        )
    alike: dict[str, str] = {}
    for label in sorted(found):
        if (other := alike.setdefault(label.strip().removesuffix(".0"), label)) != label:
            raise DataError(
                f"{path}: labels '{other}' and '{label}' in column '{column}' differ in nothing but how they "
                "are written; write one of them"
            )
    return tuple(sorted(found))


def _label(task: Task, text: str, where: str) -> float:
    if not task.is_regression:
        if text not in task.labels:
            some = ", ".join(task.labels[:_LABELS_SAID])
            more = len(task.labels) - _LABELS_SAID
            end = f" and {more:,} more; numbers need --kind regression" if more > 0 else ""
            raise DataError(f"{where}: label '{text}' is unknown; allowed are {some}{end}")
        return task.labels.index(text)
    low, high = task.label_range or (-math.inf, math.inf)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (low <= value <= high and math.isfinite(value)):
        allowed = f"a number from {low:g} to {high:g}" if task.label_range else "a finite number"
        raise DataError(f"{where}: label '{text}' is not allowed; give {allowed}")
    return value


def _records(
    path: Path, columns: tuple[str, ...], header: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Line number and `columns` of each row, or in place of them what is wrong with the row."""
    if path.suffix not in FORMATS:
        raise DataError(f"{path} is no {', '.join(FORMATS)}; convert it")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # with or without a BOM
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; give the path of a file") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file") from None
    if path.suffix == ".jsonl":
        yield from _json_records(text, columns)
        return
    rows = _tsv_rows(text) if path.suffix == ".tsv" else _csv_rows(text, path)
    if not header:
        first = next(rows, (1, []))[1]
        header = tuple(first)
    missing = [column for column in columns if column not in header]
    if missing:
        separator = "tabs" if path.suffix == ".tsv" else "commas"
        hint = f"; columns are separated by {separator}" if len(header) == 1 else ""
        raise DataError(
            f"{path}:1: no column '{missing[0]}' in the header; its columns are "
            f"{', '.join(header) or 'none'}{hint}"
        )
    if twice := [column for column in columns if header.count(column) > 1]:
        raise DataError(f"{path}:1: two columns are named '{twice[0]}'; rename one")
    places = [header.index(column) for column in columns]
    for line, fields in rows:
        if len(fields) != len(header):
            yield line, f"{len(fields)} fields, but {len(header)} columns ({', '.join(header)})"
        else:
            yield line, {column: fields[place] for column, place in zip(columns, places, strict=True)}


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """GLUE's format: a tab always separates and a quote is only a character."""
    lines = text.split("\n")  # not splitlines(), which also splits at characters inside sentences
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield number, line.removesuffix("\r").split("\t")


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """RFC 4180: fields in quotes may hold commas, quotes and line breaks."""
    csv.field_size_limit(sys.maxsize)  # the process's; unasked 131,072 characters, and articles are longer
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:  # not a blank line
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV ({error}); mend the row") from None


def _json_records(text: str, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str] | str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield number, "not a JSON object"
            continue
        missing = [column for column in columns if not _is_text_or_number(row.get(column))]
        if missing:
            yield number, f"no text or number in field '{missing[0]}'"
            continue
        texts = {column: _as_text(row[column]) for column in columns}
        halves = [column for column, value in texts.items() if _has_half_a_pair(value)]
        yield number, f"half a surrogate pair in field '{halves[0]}'" if halves else texts


def _is_text_or_number(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


def _as_text(value: str | int | float) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # true is "true", 1.0 is "1.0"


def _has_half_a_pair(text: str) -> bool:
    """Whether JSON's escapes spell half a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# ---- tokenising


@dataclass(frozen=True, eq=False)
class EncodedSplit:
    """A tokenised split, mapped into memory. Row i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, each row [CLS] ... [SEP] or [CLS] ... [SEP] ... [SEP]
    offsets: np.ndarray  # (rows + 1,) int64
    second: np.ndarray  # (rows,) int32: where in the row the second text begins, its length if there is none
    labels: np.ndarray  # (rows,) float64: class numbers or values; empty where the split has none
    num_broken: int

    @property
    def num_rows(self) -> int:
        return len(self.second)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64: tokens of each row."""
        return np.diff(self.offsets)


_ARRAYS = ("tokens", "offsets", "second", "labels")


def cache_key(task: Task, path: Path, labelled: bool, tokenizer_sha256: str, max_length: int) -> str:
    """Hash of everything that decides what `encode_split` writes. Raises DataError without the file."""
    if not path.is_file():
        raise DataError(f"{path} is no file; give the path of one")
    facts = {
        "format": FORMAT_VERSION,
        "file": sha256_of(path),
        "suffix": path.suffix,
        "columns": task.text_columns,
        "label": [task.label_column, task.labels, task.label_range] if labelled else None,
        "header": task.header,
        "tokenizer": tokenizer_sha256,
        "max_length": max_length,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def encode_split(
    task: Task, path: Path, labelled: bool, tokenizer: LoadedTokenizer, max_length: int, cache: Path
) -> Path:
    """Read and tokenise a split, unless that was done before. Returns its folder in `cache`."""
    folder = cache / cache_key(task, path, labelled, tokenizer.sha256, max_length)
    if folder.is_dir():
        return folder
    rows = read_split(task, path, labelled)
    arrays = _tokenise(rows.texts, tokenizer, max_length)
    arrays["labels"] = np.array(rows.labels, np.float64)
    temporary = folder.with_name(f"{folder.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    for name, array in arrays.items():
        data = io.BytesIO()
        np.save(data, array, allow_pickle=False)
        write_durably(temporary / f"{name}.npy", data.getbuffer())
    about = {"source": str(path), "rows": len(rows.texts), "num_broken": rows.num_broken}
    write_durably(temporary / "about.json", json.dumps(about).encode())
    try:
        temporary.rename(folder)
    except OSError:  # another process was faster: the same bytes
        shutil.rmtree(temporary)
    return folder


def open_split(folder: Path) -> EncodedSplit:
    """Map what `encode_split` wrote."""
    arrays: dict[str, Any] = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return EncodedSplit(**arrays, num_broken=json.loads((folder / "about.json").read_text())["num_broken"])


def _tokenise(
    texts: list[tuple[str, ...]], tokenizer: LoadedTokenizer, max_length: int
) -> dict[str, np.ndarray]:
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP]; too long a row loses the ends of its longer text first."""
    library = Tokenizer.from_str(tokenizer.tokenizer.to_str())  # a copy: the settings below are ours alone
    library.encode_special_tokens = True  # a text that spells out "[SEP]" stays text; not kept by to_str
    library.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.sep_id), ("[CLS]", tokenizer.cls_id)
    )
    library.enable_truncation(max_length, strategy="longest_first")
    tokens, lengths, second = [], [], []
    for start in range(0, len(texts), _ROWS_A_BATCH):
        batch = [row if len(row) == 2 else row[0] for row in texts[start : start + _ROWS_A_BATCH]]
        for encoding in library.encode_batch_fast(batch):
            types = encoding.type_ids
            tokens.append(np.array(encoding.ids, token_dtype(tokenizer.vocab_size)))
            lengths.append(len(types))
            second.append(len(types) - sum(types))  # types are 0 up to the first [SEP], then 1
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return {"tokens": np.concatenate(tokens), "offsets": offsets, "second": np.array(second, np.int32)}
