"""Promises of the tokenizer: the same text gives the same files, which any BERT tooling reads."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mosaicbert_ds.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from mosaicbert_ds.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def loaded(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The quick brown fox {i} jumps over lazy dogs.\n\n" for i in range(50)))
    return path


def test_same_text_gives_the_same_bytes_in_every_process(tmp_path):
    # Hash maps are seeded by process: many characters with equal counts bring out any tie left to chance.
    path = tmp_path / "text.txt"
    path.write_text(
        " ".join(chr(0x0430 + i % 30) + chr(0x0561 + i % 37) + chr(0x03B1 + i % 23) for i in range(3000))
    )
    code = "import sys, mosaicbert_ds.data.tokenizer as t; t.train_tokenizer(sys.argv[1:2], sys.argv[2], 512)"
    for name in "abc":
        threads = {"RAYON_NUM_THREADS": "1" if name == "a" else "4"}
        command = [sys.executable, "-c", code, str(path), str(tmp_path / name)]
        subprocess.run(command, check=True, env=os.environ | threads)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert len({(tmp_path / name / file).read_bytes() for name in "abc"}) == 1


def test_trained_folder_is_a_bert_tokenizer_for_everyone(tokenizer_dir, loaded):
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = theirs("The first town", "A second")
    assert theirs.convert_ids_to_tokens(range(5)) == list(SPECIAL_TOKENS)
    assert (theirs.pad_token_id, theirs.mask_token_id, theirs.cls_token_id) == (0, 4, 2)
    [[*first], [*second]] = loaded.encode(["The first town", "A second"])
    assert ids["input_ids"] == [2, *first, 3, *second, 3]
    assert ids["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert theirs.decode(first) == "the first town"
    assert loaded.vocab_size == 2048 and loaded.special_ids == [0, 1, 2, 3, 4]
    assert loaded.ordinary_ids.tolist() == list(range(5, 2048))


def test_text_that_spells_a_special_token_stays_text(loaded):
    [ids] = loaded.encode(["a [MASK] and [SEP] or [PAD]"])
    assert not set(ids) & set(loaded.special_ids)


pieces_of_text = st.text(st.sampled_from("abcd  .,-\n\té日\u0301\u200b\x1c\x00[]"), max_size=400)


@given(st.lists(pieces_of_text, max_size=4), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_head_of_a_document_has_the_tokens_that_the_whole_begins_with(loaded, texts, limit):
    assert loaded.encode(texts, limit) == [ids[:limit] for ids in loaded.encode(texts)]


def test_small_text_gives_a_smaller_vocabulary_and_says_so(text, tmp_path):
    summary = str(train_tokenizer([text], tmp_path / "tokenizer", 4096))
    size = load_tokenizer(tmp_path / "tokenizer").vocab_size
    assert size < 200
    assert (
        f"{size} of 4,096 asked for: no more stand in the text twice; model rows {-(-size // 64) * 64}"
        in summary
    )


def test_case_is_kept_on_request(text, tmp_path):
    train_tokenizer([text], tmp_path / "cased", 256, lowercase=False)
    assert load_tokenizer(tmp_path / "cased").tokenizer.encode("The quick").tokens == [
        "[CLS]",
        "The",
        "quick",
        "[SEP]",
    ]


def test_learning_reads_no_more_than_its_share_of_each_file(tmp_path):
    for name, word in (("a", "apple "), ("b", "banana ")):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps({"text": word * 100}) + "\n") * 100)
    (tmp_path / "b.jsonl").open("a").write('{"text": "quux quux"}\n')
    train_tokenizer([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", 64, max_bytes=2000)
    vocabulary = load_tokenizer(tmp_path / "out").tokenizer.get_vocab()
    assert {"apple", "banana"} <= vocabulary.keys() and "q" not in vocabulary


def test_a_large_file_is_read_with_what_small_ones_leave_of_their_shares(tmp_path):
    """Else a folder of notes beside a book would leave the book's later chapters out."""
    (tmp_path / "book.jsonl").write_text('{"text": "apple apple"}\n' * 50 + '{"text": "quux quux"}\n')
    for number in range(50):
        (tmp_path / f"note{number}.txt").write_text("a note")
    train_tokenizer([tmp_path], tmp_path / "out", 128, max_bytes=2000)
    assert "q" in load_tokenizer(tmp_path / "out").tokenizer.get_vocab()


def test_a_language_of_many_characters_keeps_all_but_the_rarest(tmp_path):
    """Of 2,000 characters as frequent as those of a real text (Zipf) and 3,000 that stand there once."""
    common = [chr(0x4E00 + rank) for rank in range(2000)]
    text = "".join(c * (40_000 // (rank + 1)) for rank, c in enumerate(common))
    (tmp_path / "text.txt").write_text(text + "".join(chr(0x6000 + n) for n in range(100)))
    summary = str(train_tokenizer([tmp_path / "text.txt"], tmp_path / "out", 8192))
    found = load_tokenizer(tmp_path / "out")
    (ids,) = found.encode([text])
    assert ids.count(found.unk_id) < 0.001 * len(ids), summary
    assert 1500 < found.vocab_size < 2100 and "of 2,100 characters, 99.9" in summary
    train_tokenizer([tmp_path / "text.txt"], tmp_path / "small", 256)
    assert load_tokenizer(tmp_path / "small").vocab_size <= 256


@pytest.mark.parametrize(("size", "near"), [(30_522, 30_528), (0, 64), (-64, 64)])
def test_vocab_size_must_fill_the_matrix_units(text, tmp_path, size, near):
    with pytest.raises(ConfigError, match=f"vocab_size {size} is not a positive multiple of 64; try {near}"):
        train_tokenizer([text], tmp_path / "tokenizer", size)


def test_existing_folder_is_not_overwritten(text, tmp_path):
    with pytest.raises(DataError, match="exists already"):
        train_tokenizer([text], tmp_path, 64)
    assert list(tmp_path.iterdir()) == [text]


def test_text_without_characters_is_refused(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="no text in it"):
        train_tokenizer([tmp_path / "text.jsonl"], tmp_path / "tokenizer", 64)


def damaged(change):
    def write(source, target):
        tree = json.loads((source / "tokenizer.json").read_text())
        change(tree)
        target.write_text(json.dumps(tree))

    return write


def drop_mask(tree):
    del tree["model"]["vocab"]["[MASK]"]
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "[MASK]"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda source, target: None, "does not exist; give a tokenizer's folder"),
        (lambda source, target: target.write_text("{"), "is not a tokenizer"),
        (damaged(drop_mask), r"has no \[MASK\]"),
        (damaged(lambda tree: tree.update(pre_tokenizer=None)), "does not split words as BERT does"),
    ],
)
def test_folder_without_a_bert_tokenizer_is_refused(tokenizer_dir, tmp_path, write, message):
    write(tokenizer_dir, tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)
