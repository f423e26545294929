"""Pretrained models as classifiers: what `--model` may name, and one call that all of them answer.

`--model` is a run or a step of this package (exported first), an exported or imported MosaicBERT, or any
Hugging Face folder of BERT's architecture. MosaicBERT is built from this package's own classes, not from
the code in the folder.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.data.files import sha256_of, sha256_of_facts, write_durably
from mosaicbert_ds.data.tokenizer import LoadedTokenizer, load_tokenizer
from mosaicbert_ds.errors import CheckpointError, ConfigError, DataError, UserError
from mosaicbert_ds.finetune.tasks import Task
from mosaicbert_ds.model import ModelConfig
from mosaicbert_ds.model.build import load_weights, to_hf_config
from mosaicbert_ds.model.export import FORMAT_VERSION, export_model, read_tokenizer
from mosaicbert_ds.model.mosaicbert import (
    MosaicBertConfig,
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
)
from mosaicbert_ds.ops.reference import token_of_slot
from mosaicbert_ds.training.checkpoint import Checkpoint, find_checkpoint
from mosaicbert_ds.typed_yaml import from_tree

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_NEW = ("bert.pooler.", "classifier.")  # what a pretrained model need not have
_CONFIGS: dict[str, type[MosaicBertConfig] | type[BertConfig]] = {
    "mosaicbert": MosaicBertConfig,
    "bert": BertConfig,
}
# What decides a network and stands in its config.json; rates of dropout may change.
_NETWORK = (
    *("model_type", "vocab_size", "type_vocab_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "layer_norm_eps"),
)
_NETWORK_OF = {
    "mosaicbert": ("norm", "norm_placement", "masked_only_layers"),
    "bert": ("max_position_embeddings", "hidden_act"),
}


@dataclass(frozen=True)
class Pretrained:
    """A model to start from. `fingerprint`: of weights and config; `folder`: a Hugging Face folder."""

    source: Path
    fingerprint: str
    folder: Path
    checkpoint: Checkpoint | None  # of a run; `folder` is there once `prepare` has written it

    def prepare(self) -> None:
        """Make sure that `folder` exists."""
        if self.checkpoint is None or self.folder.is_dir():
            return
        try:
            export_checkpoint(self.checkpoint, self.folder)
        except (OSError, UserError):
            if not self.folder.is_dir():  # else another process was faster: the same weights
                raise

    def tokenizer(self, scratch: Path) -> LoadedTokenizer:
        """The model's tokenizer; where there is only a vocab.txt, a tokenizer.json is made in `scratch`."""
        folder = self.folder if self.checkpoint is None else _tokenizer_of(self.checkpoint)
        has_json, has_words = ((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
        if self.checkpoint is None and not has_json and not has_words:
            raise DataError(
                f"{folder} holds a model without its tokenizer; copy the one that it was trained with into it"
            )
        if has_json or not has_words:
            return load_tokenizer(folder)
        backend: Any = read_tokenizer(folder)
        if not backend.is_fast:
            kind = type(backend).__name__
            raise DataError(
                f"{folder}: {kind} is no WordPiece of the tokenizers library; give a model with one"
            )
        made = scratch / f"tokenizer-{self.fingerprint[:12]}"
        write_durably(made / "tokenizer.json", backend.backend_tokenizer.to_str().encode())
        return load_tokenizer(made)

    def longest(self) -> int | None:
        """Positions that the model has, None where it has no limit."""
        if self.checkpoint is not None:
            facts = self.checkpoint.state["recipe"]["model"]
            return facts["max_position_embeddings"] if facts["architecture"] == "bert" else None
        config = _read_config(self.folder)
        return config.max_position_embeddings if isinstance(config, BertConfig) else None

    def pads(self) -> bool:
        """Whether the model computes padding: BERT does, MosaicBERT does not."""
        return self.longest() is not None


def find_pretrained(source: Path, exports: Path) -> Pretrained:
    """What `--model` names. A run's step will be exported below `exports`. Raises CheckpointError."""
    if (source / "config.json").is_file():
        files = sorted(path for pattern in _WEIGHT_FILES for path in source.glob(pattern))
        if not files:
            raise CheckpointError(
                f"{source} holds a config.json but no model.safetensors; give a whole folder"
            )
        _read_config(source)
        return Pretrained(
            source,
            sha256_of_facts({p.name: sha256_of(p) for p in (source / "config.json", *files)}),
            source,
            None,
        )
    if not (source / "manifest.json").is_file() and not (source / "checkpoints").is_dir():
        raise CheckpointError(
            f"{source} is no model; give a run, one of its checkpoints/step-N, or a Hugging Face folder"
        )
    return of_checkpoint(find_checkpoint(source), exports)


def of_checkpoint(checkpoint: Checkpoint, exports: Path) -> Pretrained:
    """A step of a run as a model to start from, to be exported below `exports`."""
    fingerprint = sha256_of_facts(
        {
            "files": sha256_of(checkpoint.path / "manifest.json"),
            "model": checkpoint.state["recipe"]["model"],
            "export": FORMAT_VERSION,
        }
    )
    return Pretrained(checkpoint.path, fingerprint, exports / fingerprint[:12], checkpoint)


def export_checkpoint(checkpoint: Checkpoint, out: Path) -> None:
    """Write the step's model as a Hugging Face folder. Raises as `model.export.export_model` does."""
    recipe = from_tree(RunConfig, checkpoint.state["recipe"], str(checkpoint.path / "state.json"))
    with checkpoint.open("weights") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    export_model(weights, recipe.model, _tokenizer_of(checkpoint), out)


def _tokenizer_of(checkpoint: Checkpoint) -> Path:
    """The run's copy. Raises CheckpointError where there is none, or another one."""
    # The run is two folders up, of the path as given or of where a link leads.
    steps = (checkpoint.path.absolute(), checkpoint.path.resolve())
    for folder in (step.parent.parent / "tokenizer" for step in steps):
        file = folder / "tokenizer.json"
        if file.is_file() and sha256_of(file) == checkpoint.state["tokenizer_sha256"]:
            return folder
    raise CheckpointError(
        f"{steps[0].parent.parent / 'tokenizer'} does not hold the tokenizer of {checkpoint.path} (sha256 "
        f"{checkpoint.state['tokenizer_sha256'][:12]}...); put it there, or give the step in its run's folder"
    )


def _read_config(folder: Path) -> MosaicBertConfig | BertConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no config.json; give a folder as of `mosaicbert export RUN MODEL`"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    kind = facts.get("model_type") if isinstance(facts, dict) else None
    if kind not in _CONFIGS:
        raise CheckpointError(f"{path}: model_type is {kind!r}; allowed are {' and '.join(_CONFIGS)}")
    if kind == "bert" and "alibi_starting_size" in facts:
        raise CheckpointError(
            f"{folder} is a published MosaicBERT; read it with: mosaicbert import {folder} OUT"
        )
    # transformers would hide later tokens from earlier ones, and drop relative positions without a word.
    for key, allowed in (("is_decoder", False), ("position_embedding_type", "absolute")):
        if facts.get(key) not in (None, allowed):
            raise CheckpointError(f"{path}: {key} is {facts[key]!r}; the only BERT here has {allowed!r}")
    try:
        config = _CONFIGS[kind].from_pretrained(folder)
        if isinstance(config, MosaicBertConfig):
            config.check()
        return config
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no {kind} model's: {' '.join(str(error).split())}") from None


# ---- the classifier


class UnpaddedBertForSequenceClassification(BertForSequenceClassification):
    """Hugging Face's BERT with MosaicBERT's unpadded face; inside it pads to `max_seqlen`, as it must."""

    def forward(  # type: ignore[override]
        self, *args: Any, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None, **kwargs: Any
    ) -> Any:
        """Unpadded: input_ids (tokens,) -> logits (sequences, labels), meaningless for empty ones."""
        if cu_seqlens is None:
            return super().forward(*args, **kwargs)
        assert max_seqlen is not None
        token, filled = token_of_slot(cu_seqlens, max_seqlen)  # (sequences, max_seqlen)
        # In four dimensions, and no row all hidden: see model/hf_bert.py.
        mask = (filled | ~filled[:, :1])[:, None, None, :]
        padded = {name: values[token] for name, values in kwargs.items() if values is not None}
        return super().forward(attention_mask=mask, **padded).logits


Classifier = MosaicBertForSequenceClassification | UnpaddedBertForSequenceClassification


def load_classifier(
    folder: Path,
    task: Task,
    seed: int,
    device: torch.device | str = "cpu",
    hidden_dropout: float | None = None,
) -> Classifier:
    """The model in `folder` under a new classifier for `task`, drawn from `seed` on `device`; fp32.

    Encoder and pooler are the folder's; a pooler that it does not have is drawn too. hidden_dropout: None for
    the folder's. Raises CheckpointError listing what is missing.
    """
    config = _read_config(folder)
    if hidden_dropout is not None:
        config.hidden_dropout_prob = hidden_dropout
    config.num_labels = task.num_outputs
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    names = (task.label_column,) if task.is_regression else task.labels
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    given = _read_encoder(folder, config)
    torch.manual_seed(seed)
    model: Classifier
    with torch.device(device):  # drawing 137 M numbers takes a CPU more than a second
        if isinstance(config, MosaicBertConfig):
            model = MosaicBertForSequenceClassification(config)
        else:
            model = UnpaddedBertForSequenceClassification._from_config(config, attn_implementation="sdpa")
    fresh = {name: weight.detach() for name, weight in model.named_parameters() if name.startswith(_NEW)}
    load_weights(model, fresh | given, str(folder))
    return model


def plain_classifier(model: Classifier) -> PreTrainedModel:
    """The model under a class that everyone has: what is written to a folder."""
    if isinstance(model, MosaicBertForSequenceClassification):
        return model
    plain = BertForSequenceClassification(model.config)
    plain.load_state_dict(model.state_dict())
    return plain


def load_masked_lm(folder: Path) -> MosaicBertForMaskedLM | BertForMaskedLM:
    """The pretrained model in `folder` with its masked-LM head, for evaluation. Raises CheckpointError."""
    config = _read_config(folder)
    if isinstance(config, BertConfig):
        bert, missing = _from_pretrained(BertForMaskedLM, folder)
        if missing:
            raise CheckpointError(
                f"{folder} has no masked-LM head: {', '.join(sorted(missing)[:3])} is missing"
            )
        return bert.eval()
    model = MosaicBertForMaskedLM(config)
    load_weights(model, _load_file(folder / "model.safetensors"), str(folder))
    return model.eval()


def initial_weights(folder: Path, model: ModelConfig, tokenizer: LoadedTokenizer) -> dict[str, Tensor]:
    """fp32 weights by parameter name for a run of `model` that begins from the masked-LM model in `folder`.

    A vocabulary is rounded up to the recipe's, as BERT's 30,522 words to 30,528. Raises CheckpointError for
    another network, and for a tokenizer that numbers words otherwise.
    """
    given, wanted = load_masked_lm(folder), to_hf_config(model)
    if given.config.vocab_size < wanted.vocab_size:
        given.resize_token_embeddings(wanted.vocab_size, mean_resizing=False)
    for key in (*_NETWORK, *_NETWORK_OF[wanted.model_type]):
        theirs, ours = getattr(given.config, key, None), getattr(wanted, key)
        if theirs != ours:
            raise CheckpointError(
                f"{folder} has {key} {theirs}, the recipe {ours}; change the recipe's model"
            )
    with tempfile.TemporaryDirectory() as scratch:
        words = find_pretrained(folder, Path(scratch)).tokenizer(Path(scratch)).tokenizer.get_vocab()
    if words != tokenizer.tokenizer.get_vocab():
        raise CheckpointError(
            f"{folder} has another vocabulary than the shards; prepare them with --tokenizer {folder}"
        )
    weights = {name: weight.detach().clone() for name, weight in given.named_parameters()}
    token_types = weights["bert.embeddings.token_type_embeddings.weight"]
    token_types[1:] -= token_types[0].clone()  # which export adds
    return weights


def _read_encoder(folder: Path, config: MosaicBertConfig | BertConfig) -> dict[str, Tensor]:
    """fp32 weights of encoder and, where the folder has one, pooler; by parameter name."""
    if isinstance(config, MosaicBertConfig):
        weights = _load_file(folder / "model.safetensors")
    else:
        # Through transformers: old checkpoints call things otherwise, and it knows.
        bert, missing = _from_pretrained(BertForSequenceClassification, folder)
        weights = {name: weight for name, weight in bert.state_dict().items() if name not in missing}
    return {name: weight.float() for name, weight in weights.items() if name.startswith("bert.")}


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _from_pretrained(cls: type[PreTrainedModel], folder: Path) -> tuple[Any, set[str]]:
    """The model, and the names of parameters that the folder does not have."""
    with _quiet_transformers():
        try:
            loaded: Any = cls.from_pretrained(
                folder, output_loading_info=True, dtype=torch.float32, ignore_mismatched_sizes=True
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from None
    model, info = loaded
    for name, given, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(f"{folder}: {name} has shape {tuple(given)}, not {tuple(wanted)}")
    return model, set(info["missing_keys"])


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without the report on weights that a classifier does not use: we check names ourselves."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def check_fits(pretrained: Pretrained, tokenizer: LoadedTokenizer, max_length: int) -> None:
    """Refuse before any work what the model cannot read. Raises ConfigError."""
    longest = pretrained.longest()
    if longest is not None and max_length > longest:
        raise ConfigError(
            f"max_length {max_length} is over the {longest} positions of {pretrained.source}; "
            f"set max_length={longest}"
        )
    if pretrained.checkpoint is None:
        rows = _read_config(pretrained.folder).vocab_size
        if tokenizer.vocab_size > rows:
            raise ConfigError(
                f"the tokenizer in {pretrained.source} has {tokenizer.vocab_size} ids, the model {rows}; "
                "give a folder whose tokenizer and weights belong together"
            )
