"""WordPiece tokenizers: train one on the user's text, load one, turn documents into token ids.

train_tokenizer(["corpus/"], "tokenizer", vocab_size=30_528)
tokenizer = load_tokenizer("tokenizer")          # any folder with the tokenizer.json of a BERT
"""

import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mosaicbert_ds.data.files import Summary, sha256_of, sync_folder, write_durably
from mosaicbert_ds.data.sources import Document, OnError, find_pieces, read_piece, refuse_or_count
from mosaicbert_ds.errors import ConfigError, DataError

# Their ids are 0 to 4 in the tokenizers that we train; others may place them anywhere.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Rare characters become [UNK]: a corpus with a little Chinese would else fill the vocabulary with them. The
# alphabet has so many characters, or so much of the text, if that is more: in Chinese each one is a word.
MIN_ALPHABET, COVERAGE = 1000, 0.9995
# A token seen once teaches nothing.
MIN_FREQUENCY = 2
# The files of a tokenizer's folder that travel with the shards.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class LoadedTokenizer:
    """A tokenizer and what the data needs to know of it."""

    folder: Path
    tokenizer: Tokenizer
    sha256: str  # of tokenizer.json
    vocab_size: int  # highest id + 1; a model may have more rows
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    ordinary_ids: np.ndarray  # (ordinary,) int64: all ids that are not special, sorted
    is_ordinary: np.ndarray  # (vocab_size,) bool

    @property
    def special_ids(self) -> list[int]:
        """Ids that are never masked and never drawn as a replacement."""
        return np.flatnonzero(~self.is_ordinary).tolist()

    def encode(self, texts: Sequence[str], limit: int | None = None) -> list[list[int]]:
        """Token ids of each text, without [CLS] and [SEP]; the first `limit` of them if it is set."""
        if limit is None:
            return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        # Most of a long document is thrown away, so only its head is tokenised: words are split at spaces
        # and punctuation first, so a text that is cut there begins with the same tokens as the whole.
        heads = [_head(text, 8 * limit) for text in texts]
        ids = [i[:limit] for i in self.encode(heads)]
        short = [n for n, text in enumerate(texts) if len(ids[n]) < limit and len(heads[n]) < len(text)]
        for n, whole in zip(short, self.encode([texts[n] for n in short]), strict=True):
            ids[n] = whole[:limit]
        return ids


def _head(text: str, size: int) -> str:
    if len(text) <= size:
        return text
    places = (place for place in range(size, 0, -1) if _ends_word(text[place]))
    return text[: next(places, len(text))]


def _ends_word(character: str) -> bool:
    """Not `isspace`: the normalizer removes some of those, and so joins what is beside them."""
    return character in " \t\r\n" or unicodedata.category(character)[0] == "P"


def load_tokenizer(folder: str | Path) -> LoadedTokenizer:
    """Load `tokenizer.json` of a BERT from `folder`. Raises DataError if it is none."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give a tokenizer's folder, or make one: mosaicbert tokenizer train"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        kind = json.loads(tokenizer.to_str())["pre_tokenizer"]
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{path} is not a tokenizer: {error}; train or copy it again") from None
    if kind is None or kind["type"] != "BertPreTokenizer":
        raise DataError(
            f"{path} does not split words as BERT does (BertPreTokenizer); give the tokenizer of a BERT"
        )
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise DataError(
            f"{path} has no {', '.join(missing)}; a BERT tokenizer has {', '.join(SPECIAL_TOKENS)}"
        )

    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # a text that spells out "[MASK]" stays text
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special |= {vocabulary[token] for token in SPECIAL_TOKENS}
    ordinary_ids = np.array(sorted(set(vocabulary.values()) - special), np.int64)
    if len(ordinary_ids) == 0:
        raise DataError(f"{path} knows special tokens only; train it on text")
    is_ordinary = np.zeros(max(vocabulary.values()) + 1, bool)
    is_ordinary[ordinary_ids] = True
    pad_id, unk_id, cls_id, sep_id, mask_id = (vocabulary[token] for token in SPECIAL_TOKENS)
    return LoadedTokenizer(
        folder=folder,
        tokenizer=tokenizer,
        sha256=sha256_of(path),
        vocab_size=len(is_ordinary),
        pad_id=pad_id,
        unk_id=unk_id,
        cls_id=cls_id,
        sep_id=sep_id,
        mask_id=mask_id,
        ordinary_ids=ordinary_ids,
        is_ordinary=is_ordinary,
    )


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Its files without their permissions: of a folder that nobody may change, one that may be written again.

    Raises DataError where `target` cannot be written.
    """
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            write_durably(target / name, (folder / name).read_bytes())


def train_tokenizer(
    sources: Sequence[str],
    out_dir: str | Path,
    vocab_size: int = 30_528,
    *,
    lowercase: bool = True,
    text_field: str = "text",
    on_error: OnError = "refuse",
    max_bytes: int = 2**30,
) -> Summary:
    """Train a WordPiece vocabulary on `sources` and write it to the new folder `out_dir`.

    vocab_size: a multiple of 64, special tokens included; less comes out if the text has less.
    max_bytes: text to learn from; with more, the large files give their first documents, in equal shares.
    The same text gives the same files. Raises ConfigError, and DataError for text that cannot be read.
    """
    if vocab_size < 64 or vocab_size % 64:
        near = max(64, round(vocab_size / 64) * 64)
        raise ConfigError(f"vocab_size {vocab_size} is not a positive multiple of 64; try {near}")
    out_dir = Path(out_dir)
    if out_dir.resolve() == Path.cwd():
        raise DataError(f"{out_dir} is the folder that you are in; name a new one in it")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir} exists already; choose another folder or remove it")

    pieces = find_pieces(sources).pieces
    skipped: Counter[str] = Counter()

    def texts() -> Iterator[str]:
        skipped.clear()
        unused = max_bytes
        # Small files first: what they leave of their shares is the larger ones'.
        for done, piece in enumerate(sorted(pieces, key=lambda piece: piece.num_bytes or math.inf)):
            left = share = unused // (len(pieces) - done)
            for item in read_piece(piece, text_field):
                if not isinstance(item, Document):
                    refuse_or_count(item, on_error, skipped)
                    continue
                yield item.text
                left -= len(item.text.encode())
                if left <= 0:
                    break
            unused -= share - max(left, 0)

    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    # Counted here, by (count, code point): the library's own cut at the limit breaks ties by chance.
    characters = _count_characters(texts(), normalizer)
    if not characters:
        raise DataError(f"{', '.join(map(str, sources))}: no text in it to learn a vocabulary from")
    ranked = sorted(sorted(characters), key=lambda c: -characters[c])
    covered = np.cumsum([characters[c] for c in ranked]) / characters.total()
    enough = max(MIN_ALPHABET, int(np.searchsorted(covered, COVERAGE)) + 1)
    alphabet = ranked[: min(enough, (vocab_size - len(SPECIAL_TOKENS)) // 2)]  # each may be two: c and ##c
    vocabulary = _learn_vocabulary(texts(), normalizer, alphabet, vocab_size)
    tokenizer = _bert_tokenizer(vocabulary, normalizer)
    _write_folder(out_dir, tokenizer, lowercase)

    found = tokenizer.get_vocab_size()
    rows = -(-found // 64) * 64
    share = covered[len(alphabet) - 1]
    note = (
        ""
        if found == vocab_size
        else f" of {vocab_size:,} asked for: no more stand in the text twice; model rows {rows:,}"
    )
    return Summary(
        f"tokenizer in {out_dir}",
        (
            ("vocabulary", f"{found:,}{note}"),
            ("alphabet", f"{len(alphabet):,} of {len(characters):,} characters, {share:.2%} of the text"),
            ("files read", f"{len(pieces):,}"),
            ("skipped", ", ".join(f"{n:,} {kind}" for kind, n in sorted(skipped.items())) or "nothing"),
            ("sha256", sha256_of(out_dir / "tokenizer.json")),
        ),
    )


def _bert_tokenizer(vocabulary: dict[str, int], normalizer: normalizers.Normalizer) -> Tokenizer:
    """BERT's pipeline around a vocabulary: split at spaces and punctuation, longest piece first."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _learn_vocabulary(
    texts: Iterable[str], normalizer: normalizers.Normalizer, alphabet: list[str], vocab_size: int
) -> dict[str, int]:
    """Token to id: the special tokens, the alphabet (also as `##c`), then what the text merges."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The library numbers `##c` as it meets them in a randomly ordered hash map, and breaks ties between
    # merges by number: two runs would differ. Given as special tokens they have fixed numbers; the
    # tokenizer that holds them as such is thrown away.
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    inside_words = [f"##{c}" for c in alphabet if len(split(normalizer.normalize_str("a" + c))) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*SPECIAL_TOKENS, *inside_words],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def _count_characters(texts: Iterable[str], normalizer: normalizers.Normalizer) -> Counter[str]:
    """How often each character stands in the normalised texts, spaces left out."""
    counts: Counter[str] = Counter()
    for text in texts:
        code_points = np.frombuffer(normalizer.normalize_str(text).encode("utf-32-le"), np.uint32)
        found, times = np.unique(code_points, return_counts=True)
        for code_point, n in zip(found.tolist(), times.tolist(), strict=True):
            counts[chr(code_point)] += n
    return Counter({c: n for c, n in counts.items() if not c.isspace()})


def _write_folder(out_dir: Path, tokenizer: Tokenizer, lowercase: bool) -> None:
    """All files or none: written beside `out_dir`, then renamed."""
    temporary = out_dir.with_name(f"{out_dir.name}.{os.getpid()}.tmp")
    write_durably(temporary / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "do_lower_case": lowercase,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, SPECIAL_TOKENS, strict=True)),
    }
    write_durably(temporary / "tokenizer_config.json", json.dumps(settings, indent=2).encode())
    temporary.replace(out_dir)  # an empty folder may stand there
    sync_folder(out_dir.parent)
