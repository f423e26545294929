"""Promises of the sources: every form of the same text is the same text, bad input is named by place."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mosaicbert_ds.data import sources
from mosaicbert_ds.data.sources import BadInput, Document, find_pieces, read_piece
from mosaicbert_ds.errors import DataError

TEXTS = ["One line.", "Two\nlines, größer: 日本 \U0001f600", "[MASK] is text here", "x" * 5000]
JSONL = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
TXT = "\n\n".join(TEXTS).encode()


def long_window_zstd(data):
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, enable_ldm=True)
    # Streamed, so that the frame does not state its size, which would shrink the window.
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


def two_frames(data):
    return zstandard.compress(data[:100]) + zstandard.compress(data[100:])


COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": long_window_zstd,
    ".two.zst": two_frames,
}


def read(*given, text_field="text"):
    return [item for piece in find_pieces(given).pieces for item in read_piece(piece, text_field)]


def texts(items):
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(("suffix", "blob"), [(".jsonl", JSONL), (".json", JSONL), (".txt", TXT)])
def test_all_compressed_forms_hold_the_same_documents(tmp_path, compression, suffix, blob):
    path = tmp_path / (
        compression.removesuffix(".zst").lstrip(".") + suffix + compression.removeprefix(".two")
    )
    path.write_bytes(COMPRESS[compression](blob))
    assert texts(read(path)) == TEXTS


def test_parquet_and_streamed_hugging_face_dataset_hold_the_same_documents(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(2):
        table = pa.table({"body": TEXTS[2 * i : 2 * i + 2], "n": [1, 2]})
        pq.write_table(table, tmp_path / "set" / f"train-{i}.parquet")
    assert texts(read(tmp_path / "set", text_field="body")) == TEXTS
    spec = f"hf:{tmp_path / 'set'}:train"
    assert len(find_pieces([spec]).pieces) == 2
    assert texts(read(spec, text_field="body")) == TEXTS


def test_folder_is_read_in_the_order_of_names_and_tells_what_it_leaves_out(tmp_path):
    for name in ("b/1.txt", "a/2.jsonl.gz", "a/10.txt", "README.md", "a/notes.md", "LICENSE"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(JSONL) if name.endswith("gz") else TXT)
    found = find_pieces([tmp_path])
    assert [piece.name for piece in found.pieces] == ["a/10.txt", "a/2.jsonl.gz", "b/1.txt"]
    assert found.left_out == {".md": 2, "LICENSE": 1}
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    (tmp_path / "more").symlink_to(tmp_path / "a")
    found = find_pieces([tmp_path])
    assert found.left_out == {".md": 2, "LICENSE": 1, "broken link": 1, "linked folder": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.txt", "is no file and no folder"),
        ("table.csv", "cannot read '.csv'; allowed is text"),
        ("folder", "holds no text"),
        ("hf:name", "is not of the form hf:PATH:SPLIT"),
        ("hf:a:b:c:d", "is not of the form"),
    ],
)
def test_source_that_is_none_is_refused(tmp_path, name, message):
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=message):
        find_pieces([name if name.startswith("hf:") else tmp_path / name])
    with pytest.raises(DataError, match="no source given"):
        find_pieces([])


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "not JSON": (b"{broken\n", "invalid JSON", "line 2: not a JSON object"),
    "cut off": (b'{"text": "cut\n', "invalid JSON", "line 2"),
    "deep": (b"[" * 100_000 + b"\n", "invalid JSON", "line 2"),
    "huge number": (b'{"n": ' + b"9" * 5000 + b"}\n", "invalid JSON", "line 2"),
    "no field": (b'{"body": "x"}\n', "no text field", "line 2: field 'text' is .*row has body; --text-field"),
    "null": (b'{"text": null}\n', "no text field", "line 2"),
    "number": (b'{"text": 3}\n', "no text field", "line 2"),
    "array": (b'["text"]\n', "no text field", "line 2"),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8", r"line 2 \(offset 27\): byte 0xff"),
    "latin-1": ('{"text": "größer"}\n'.encode("latin-1"), "not UTF-8", "line 2"),
    "half a surrogate pair": (
        b'{"text": "ab\\ud800"}\n',
        "not UTF-8",
        "line 2: half a surrogate pair at character 2",
    ),
    "long line": (
        b'{"text": "' + b"x" * 3000 + b'"}\n',
        "over-long line",
        "line 2 .*3,013 bytes; allowed 2,000",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line_is_named_by_place_and_the_rest_is_read(tmp_path, monkeypatch, kind):
    line, expected, message = BAD_LINES[kind]
    if kind == "long line":
        monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2000)
    path = tmp_path / "text.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + line + GOOD))
    first, bad, last = read(path)
    assert first == Document("good", 1) and last == Document("good", 3)
    assert isinstance(bad, BadInput) and bad.kind == expected
    with pytest.raises(DataError, match=f"text.jsonl.gz, {message}"):
        sources.refuse_or_count(bad, "refuse", None)


def test_blank_lines_byte_order_mark_nul_and_windows_line_ends_are_harmless(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\u0000c"}')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf\r\n\r\none\r\nline\r\n \t\r\ntwo")
    assert texts(read(tmp_path)) == ["a", "b\0c", "one\r\nline", "two"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_damaged_and_empty_files_are_named(tmp_path, compression, damage):
    whole = COMPRESS[compression](JSONL * 50)
    blob = {"cut": whole[:-20], "garbled": whole[:40] + bytes(40) + whole[80:], "empty": b""}[damage]
    path = tmp_path / f"text.jsonl{compression}"
    path.write_bytes(blob)
    bad = read(path)[-1]
    assert isinstance(bad, BadInput) and str(path) in bad.message
    assert bad.kind == ("empty file" if damage == "empty" else "damaged file")


def test_bad_parquet_is_named(tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"PAR1 is not enough")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "other.parquet")
    invalid = pa.array([b"ok", b"\xff", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": invalid}), tmp_path / "utf8.parquet")
    assert [item.kind for item in read(tmp_path / "no.parquet")] == ["damaged file"]
    [bad] = read(tmp_path / "other.parquet")
    assert "has no column 'text'; it has body; --text-field names another" in bad.message
    good, not_utf8, null = read(tmp_path / "utf8.parquet")
    assert (good.text, not_utf8.kind, null.kind) == ("ok", "not UTF-8", "no text field")


def test_text_without_blank_lines_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2000)
    path = tmp_path / "text.txt"
    path.write_text("a line of text\n" * 1000 + "\n\nshort")
    long, short = read(path)
    assert long.kind == "over-long document" and "line 1" in long.message and "blank lines" in long.message
    assert short.text == "short"


@pytest.mark.parametrize("compression", [".gz", ".xz", ".bz2", ".zst"])
def test_decompression_bomb_is_a_long_line_and_not_a_full_memory(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 2**20)
    path = tmp_path / f"bomb.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](bytes(2**26)))
    tracemalloc.start()
    [bad] = read(path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bad.kind == "over-long line" and "67,108,864 bytes" in bad.message
    assert peak_bytes < 2**28
