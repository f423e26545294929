"""Published MosaicBERT checkpoints, and such as others trained with the published code, made ours.

What comes out is a folder as `export.py` writes it: it loads without the published code, which needs a
Triton of its time.
"""

import json
import logging
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mosaicbert_ds.errors import CheckpointError, UserError
from mosaicbert_ds.model.build import load_weights
from mosaicbert_ds.model.export import write_folder
from mosaicbert_ds.model.mosaicbert import (
    MosaicBertConfig,
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
)

SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
# Keys with one value in every published model, hence sometimes left out, and a classifier's names.
OTHER_KEYS = (
    "type_vocab_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "layer_norm_eps",
    "initializer_range",
    "norm",
    "norm_placement",
    "masked_only_layers",
    "pad_token_id",
    "id2label",
    "label2id",
    "problem_type",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"

log = logging.getLogger(__name__)


def import_published(
    src: Path, out: Path, trust_pickle: bool = False, tokenizer_dir: Path | None = None
) -> None:
    """Read the published checkpoint in folder `src` and write it to `out` as an exported folder.

    tokenizer_dir: of the tokenizer that it was trained with, where `src` holds none.

    A classifier keeps its classifier. pytorch_model.bin is a pickle and read only with `trust_pickle`, and
    then without running code from it. Raises CheckpointError listing every name and shape that does not
    fit, UserError when `out` is not empty.
    """
    weights = _without_prefix(_read_weights(src, trust_pickle), src)
    config = _read_config(src)
    model: MosaicBertForMaskedLM | MosaicBertForSequenceClassification
    if "classifier.weight" in weights:
        config.num_labels = weights["classifier.weight"].shape[0]
        model = MosaicBertForSequenceClassification(config)
    else:
        model = MosaicBertForMaskedLM(config)
    load_weights(model, weights, str(src))

    if tokenizer_dir is None and any((src / name).exists() for name in TOKENIZER_FILES):
        tokenizer_dir = src
    if tokenizer_dir is None:
        log.warning(
            "%s holds no tokenizer, so %s gets none either; give --tokenizer DIR, the published models were "
            "trained with bert-base-uncased's",
            src,
            out,
        )
    write_folder(model, tokenizer_dir, out)


def _read_config(src: Path) -> MosaicBertConfig:
    path = src / "config.json"
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; give the folder of a MosaicBERT checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    missing = [key for key in SHAPE_KEYS if key not in published]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    facts = {key: published[key] for key in (*SHAPE_KEYS, *OTHER_KEYS) if key in published}
    config = MosaicBertConfig(**facts)
    try:
        config.check()
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return config


def _read_weights(src: Path, trust_pickle: bool) -> dict[str, Tensor]:
    if not src.is_dir():
        raise CheckpointError(
            f"{src} is no folder; download the model first: hf download {src} --local-dir DIR"
        )
    safe, pickled = src / "model.safetensors", src / "pytorch_model.bin"
    try:
        if safe.exists():
            return load_file(safe)
        if not pickled.exists():
            raise CheckpointError(f"{src} holds neither {safe.name} nor {pickled.name}")
        if not trust_pickle:
            raise UserError(
                f"{pickled} is a pickle, a format that can carry code; convert it to {safe.name}, or pass "
                "--trust-pickle if you trust where it comes from"
            )
        return torch.load(pickled, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{safe} is damaged: {error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{pickled} cannot be read as plain weights: {error}") from None


def _without_prefix(weights: dict[str, Tensor], src: Path) -> dict[str, Tensor]:
    """Names from `bert.` or a head on: training programs put `model.` or the like before all of them."""
    prefixes = [name.removesuffix(WORD_EMBEDDINGS) for name in weights if name.endswith(WORD_EMBEDDINGS)]
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{src} is no MosaicBERT: {len(prefixes)} of its weights are called {WORD_EMBEDDINGS}"
        )
    return {name.removeprefix(prefixes[0]): weight.float() for name, weight in weights.items()}
