"""Promises of preparation: the same bytes however it was run, interrupted runs go on, nothing leaks."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mosaicbert_ds
from mosaicbert_ds.data import prepare as prepare_module
from mosaicbert_ds.data.config import DataConfig
from mosaicbert_ds.data.files import write_durably
from mosaicbert_ds.data.prepare import prepare
from mosaicbert_ds.data.shards import ShardSet, read_manifest, token_dtype, verify
from mosaicbert_ds.data.tokenizer import load_tokenizer
from mosaicbert_ds.errors import ConfigError, DataError

SAMPLES = Path(mosaicbert_ds.__file__).parent / "samples" / "pretrain"
CHUNKS = DataConfig(max_length=32, documents="chunk")
CUT = DataConfig(max_length=32)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(folder, split):
    tokenizer = load_tokenizer(folder / "tokenizer").tokenizer
    shards = ShardSet.open(folder, split)
    return [tokenizer.decode(shards.sample(i).tolist()) for i in range(shards.num_samples)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six files of real text, and units so small that each file is one."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = (SAMPLES / "train.jsonl").read_text().splitlines(keepends=True)
    for i in range(6):
        (folder / f"{i}.jsonl").write_text("".join(lines[i::6]))
    return folder


def run_in_subprocess(corpus, out, tokenizer_dir, workers):
    code = f"""
from mosaicbert_ds.data import prepare as p
from mosaicbert_ds.data.config import DataConfig
if __name__ == "__main__":
    p.UNIT_BYTES = 1
    data = DataConfig(max_length=32, documents="chunk")
    p.prepare([{str(corpus)!r}], {str(out)!r}, {str(tokenizer_dir)!r}, data,
              workers={workers}, held_out_fraction=0.1, shard_bytes=8192)
"""
    script = out.with_suffix(".py")
    script.write_text(code)
    return subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, start_new_session=True)


@pytest.fixture(scope="module")
def undisturbed(corpus, tokenizer_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "UNIT_BYTES", 1)
        prepare([corpus], out, tokenizer_dir, CHUNKS, workers=1, held_out_fraction=0.1, shard_bytes=8192)
    return out


def test_two_workers_write_the_same_bytes_as_one(corpus, undisturbed, tokenizer_dir, tmp_path):
    process = run_in_subprocess(corpus, tmp_path / "two", tokenizer_dir, workers=2)
    assert process.wait(60) == 0, process.stderr.read()
    assert contents(tmp_path / "two") == contents(undisturbed)
    assert len(read_manifest(undisturbed)["train"]["shards"]) > 20
    verify(undisturbed)


@pytest.mark.parametrize(("workers", "records_at_kill"), [(1, 1), (1, 17), (2, 9)])
def test_killed_run_goes_on_and_ends_with_the_same_bytes(
    corpus, undisturbed, tokenizer_dir, tmp_path, workers, records_at_kill
):
    out = tmp_path / "killed"
    process = run_in_subprocess(corpus, out, tokenizer_dir, workers)
    while len(list(out.glob("work/0*.json"))) < records_at_kill:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)  # the parent alone: its workers must follow
    process.wait()
    deadline = time.monotonic() + 10
    while _alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive their killed parent"
        time.sleep(0.02)
    assert not (out / "manifest.json").exists()
    with pytest.raises(DataError, match="does not exist; make it with"):
        ShardSet.open(out, "train")

    recorded = [json.loads(path.read_text()) for path in out.glob("work/0*.json")]
    finished = {out / record[s]["file"] for record in recorded for s in ("train", "val") if record[s]}
    written = {path: path.stat().st_mtime_ns for path in finished}
    assert run_in_subprocess(corpus, out, tokenizer_dir, workers).wait(60) == 0
    assert contents(out) == contents(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in finished} == written, "finished work was done again"


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_second_run_finds_nothing_to_do_and_other_settings_are_refused(
    corpus, tokenizer_dir, tmp_path, capsys
):
    out = tmp_path / "shards"
    first = prepare([corpus], out, tokenizer_dir, CUT, workers=1, held_out_fraction=0.1)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert str(prepare([corpus], out, tokenizer_dir, CUT, workers=2, held_out_fraction=0.1)) == str(first)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "was written after" not in capsys.readouterr().err
    edited = tmp_path / "edited" / "0.jsonl"  # a file of the same name and size
    shutil.copytree(corpus, edited.parent)
    os.utime(edited, (time.time() + 5,) * 2)
    prepare([edited.parent], out, tokenizer_dir, CUT, workers=1, held_out_fraction=0.1)
    assert f"{edited} was written after {out} was made of files of that size" in capsys.readouterr().err
    with pytest.raises(DataError, match="max_length was 32, is 64"):
        prepare([corpus], out, tokenizer_dir, DataConfig(max_length=64), workers=1, held_out_fraction=0.1)
    with pytest.raises(DataError, match=r"sources had 0.jsonl \(\d+ bytes\) where 1.jsonl"):
        prepare([corpus / "1.jsonl"], out, tokenizer_dir, CUT, workers=1, held_out_fraction=0.1)
    begun = tmp_path / "begun" / "work"
    begun.mkdir(parents=True)
    (begun / "settings.json").write_text('{"max_length": 32}')
    with pytest.raises(DataError, match=r"begun by another version, without .*copies.*; choose a new folder"):
        prepare([corpus], begun.parent, tokenizer_dir, CUT, workers=1, held_out_fraction=0.1)


def test_foreign_folder_is_left_alone(corpus, tokenizer_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(DataError, match="holds other things"):
        prepare([corpus], tmp_path, tokenizer_dir, CUT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_cut_keeps_the_beginning_and_chunk_keeps_all(tokenizer_dir, tmp_path):
    source = SAMPLES / "val.jsonl"
    documents = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    tokenizer = load_tokenizer(tokenizer_dir)
    whole = [tokenizer.encode([text])[0] for text in documents]
    held_out = write_jsonl(tmp_path / "other.jsonl", ["another text"])
    for mode in ("cut", "chunk"):
        data = DataConfig(max_length=32, documents=mode)
        said = str(
            prepare([source], tmp_path / mode, tokenizer_dir, data, workers=1, held_out_sources=[held_out])
        )
        assert (f"{sum(len(ids) >= 30 for ids in whole)} documents at 32 tokens" in said) == (mode == "cut")
        shards = ShardSet.open(tmp_path / mode, "train")
        samples = [shards.sample(i) for i in range(shards.num_samples)]
        assert {s[0] for s in samples} == {tokenizer.cls_id} and {s[-1] for s in samples} == {
            tokenizer.sep_id
        }
        inner = [s[1:-1].tolist() for s in samples]
        if mode == "cut":
            assert inner == [ids[:30] for ids in whole]
        else:
            assert inner == [ids[i : i + 30] for ids in whole for i in range(0, len(ids), 30)]


def test_copies_of_a_document_fall_on_one_side(tokenizer_dir, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", [f"document number {i % 200}" for i in range(600)])
    prepare([source], tmp_path / "shards", tokenizer_dir, CUT, workers=1, held_out_fraction=0.2)
    train, val = (Counter(texts_of(tmp_path / "shards", split)) for split in ("train", "val"))
    assert not train.keys() & val.keys()
    assert set(train.values()) | set(val.values()) == {3}
    assert 20 < len(val) < 60  # a fifth of 200, 4 sigma


def test_held_out_sources_are_the_held_out_split_and_are_not_trained_on(tokenizer_dir, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", ["one apple", "two pears", "three plums", "two  pears\n"])
    held_out = write_jsonl(tmp_path / "held.jsonl", ["two pears", "four figs"])
    summary = prepare(
        [source], tmp_path / "shards", tokenizer_dir, CUT, workers=1, held_out_sources=[held_out]
    )
    assert "its loss says little; give more by --held-out-sources, and" in str(summary)
    assert texts_of(tmp_path / "shards", "train") == ["one apple", "three plums"]
    assert texts_of(tmp_path / "shards", "val") == ["two pears", "four figs"]
    assert read_manifest(tmp_path / "shards")["skipped"] == {"text.jsonl": {"held out": 2}}, (
        "white space makes no other document"
    )


def test_bad_input_is_refused_by_place_or_skipped_and_recorded(tokenizer_dir, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", [f"document {i}" for i in range(50)])
    with source.open("ab") as file:
        file.write(b'{"text": "cut off\n{"text": "\xff"}\n{"txt": "x"}\n{"text": " \\u0000 "}\n')
    arguments = ([source], tmp_path / "shards", tokenizer_dir, CUT)
    with pytest.raises(DataError, match=r"text.jsonl, line 51: not a JSON object.*--on-error skip"):
        prepare(*arguments, workers=1, held_out_fraction=0.2)
    summary = prepare(*arguments, workers=1, held_out_fraction=0.2, on_error="skip")
    kinds = {"invalid JSON": 1, "no text field": 1, "no tokens": 1, "not UTF-8": 1}
    assert read_manifest(tmp_path / "shards")["skipped"] == {"text.jsonl": kinds}
    assert "1 invalid JSON, 1 no text field, 1 no tokens, 1 not UTF-8" in str(summary)


def test_failing_worker_ends_the_run_with_its_error(corpus, tokenizer_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1)
    write_jsonl(tmp_path / "good.jsonl", ["text"])
    (tmp_path / "bad.jsonl").write_bytes(b"nothing\n")
    with pytest.raises(DataError, match=r"bad.jsonl, line 1: not a JSON object"):
        prepare([tmp_path / "bad.jsonl", corpus], tmp_path / "out", tokenizer_dir, CUT, workers=2)


def test_a_second_prepare_at_the_same_time_removes_nothing(corpus, tokenizer_dir, tmp_path, monkeypatch):
    """A command given twice: the first to end takes away the records that the other needs."""
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1)
    arguments = ([corpus], tmp_path / "shards", tokenizer_dir, CHUNKS)
    run_units = prepare_module._run_units

    def and_the_first_ends_meanwhile(job, units, workers):
        run_units(job, units[:-1], workers)
        monkeypatch.setattr(prepare_module, "_run_units", run_units)
        prepare(*arguments, workers=1)
        run_units(job, units[-1:], workers)

    monkeypatch.setattr(prepare_module, "_run_units", and_the_first_ends_meanwhile)
    with pytest.raises(DataError, match="another prepare works in this folder"):
        prepare(*arguments, workers=1)
    verify(tmp_path / "shards")
    assert len(read_manifest(tmp_path / "shards")["train"]["shards"]) == 6


def test_a_second_prepare_that_ends_first_is_named_by_the_one_that_lost_its_file(tmp_path, monkeypatch):
    temporary = tmp_path / f"00000-00000.shard.{os.getpid()}.tmp"
    monkeypatch.setattr(os, "fsync", lambda _: temporary.unlink())
    with pytest.raises(
        DataError, match=r"shard was taken away while it was written; another command works in this"
    ):
        write_durably(tmp_path / "00000-00000.shard", b"x")


def test_words_that_the_tokenizer_does_not_know_are_told(tokenizer_dir, tmp_path):
    texts = [f"{'a' if i % 4 else chr(0x0E01)} {i % 7}" for i in range(400)]  # a word in eight is Thai
    source = write_jsonl(tmp_path / "text.jsonl", texts)
    summary = prepare([source], tmp_path / "shards", tokenizer_dir, CUT, workers=1, held_out_fraction=0.2)
    assert read_manifest(tmp_path / "shards")["unknown_tokens"] == 100
    assert "12.50% of the tokens are [UNK]" in str(summary)
    assert "held out         so little that its loss says little; give more by --held-out-fraction" in str(
        summary
    )
    thai = write_jsonl(tmp_path / "thai.jsonl", [chr(0x0E01 + i) for i in range(40)])
    with pytest.raises(DataError, match="the tokenizer knows no word of the held-out text; train one"):
        prepare([thai], tmp_path / "other", tokenizer_dir, CUT, workers=1, held_out_fraction=0.2)


def test_no_held_out_text_is_an_error(tokenizer_dir, tmp_path):
    source = write_jsonl(tmp_path / "text.jsonl", ["a single document"])
    with pytest.raises(DataError, match="left no held-out text"):
        prepare([source], tmp_path / "shards", tokenizer_dir, CUT, workers=1)
    with pytest.raises(ConfigError, match=r"held_out_fraction 0.*0.005 is usual"):
        prepare([source], tmp_path / "other", tokenizer_dir, CUT, held_out_fraction=0)


def test_unigram_entropy_is_the_loss_of_word_frequencies(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    train, val = (ShardSet.open(prepared, split) for split in ("train", "val"))
    counts = Counter(t for i in range(train.num_samples) for t in train.sample(i).tolist())
    total = sum(counts[t] + 1 for t in tokenizer.ordinary_ids.tolist())
    ordinary = set(tokenizer.ordinary_ids.tolist())
    losses = [
        -math.log((counts[t] + 1) / total)
        for i in range(val.num_samples)
        for t in val.sample(i).tolist()
        if t in ordinary
    ]
    assert val.unigram_entropy_nats == pytest.approx(np.mean(losses), abs=1e-6)
    assert 4 < val.unigram_entropy_nats < math.log(2048)


def test_ids_beyond_65535_take_four_bytes():
    assert token_dtype(65_535).itemsize == 2 and token_dtype(65_536 + 1).itemsize == 4
