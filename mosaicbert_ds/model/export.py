"""A trained model as a Hugging Face folder that needs nothing of this package.

The folder holds config.json, model.safetensors, the tokenizer and, for MosaicBERT, `modeling_mosaicbert.py`:
`ops/reference.py` and `model/mosaicbert.py` joined into one file. It is generated from the sources that
trained the model, so there is no second definition that could drift, and before the folder appears it is
loaded back and must give the trainer's logits.
"""

import ast
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mosaicbert_ds.errors import CheckpointError, DataError, UserError
from mosaicbert_ds.model import mosaicbert
from mosaicbert_ds.model.build import build_pretraining_model, load_weights
from mosaicbert_ds.model.config import ModelConfig
from mosaicbert_ds.ops import reference

MODELING_FILE = "modeling_mosaicbert"
AUTO_MAP = {
    "AutoConfig": f"{MODELING_FILE}.MosaicBertConfig",
    "AutoModel": f"{MODELING_FILE}.MosaicBertModel",
    "AutoModelForMaskedLM": f"{MODELING_FILE}.MosaicBertForMaskedLM",
    "AutoModelForSequenceClassification": f"{MODELING_FILE}.MosaicBertForSequenceClassification",
    "AutoModelForTokenClassification": f"{MODELING_FILE}.MosaicBertForTokenClassification",
    "AutoModelForQuestionAnswering": f"{MODELING_FILE}.MosaicBertForQuestionAnswering",
}
MODELING_DOCSTRING = '''\
"""MosaicBERT for Hugging Face transformers, in one file that needs torch and transformers only.

Generated from the sources of mosaicbert_ds, the package that trained this model.
"""
'''
SPECIAL_TOKENS: dict[str, Any] = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

# Logits are of order 10, where fp32 resolves 1e-6; the two models run the same operations, so what is left
# is the order of sums inside a library.
LOGIT_TOLERANCE = 1e-4

# Counts the changes to what weights an export holds, so that nobody takes an older one for the same model.
FORMAT_VERSION = 3


def export_model(weights: dict[str, Tensor], config: ModelConfig, tokenizer_dir: Path, out: Path) -> None:
    """Write the pretrained model to the folder `out`.

    Pretraining knows one token type, 0, so the rows of the others are still as drawn: to the network a second
    text would be noise. Exported, each is row 0 with its own drawn row on top, the known one with a mark by
    which finetuning tells the texts apart (bench/LEARNING.md has what that gives).

    weights: fp32 by parameter name; tokenizer_dir: holds tokenizer.json. Raises CheckpointError when the
    weights do not fit `config`, DataError for an unusable tokenizer, UserError when `out` is not empty.
    """
    model = build_pretraining_model(config)
    load_weights(model, weights, "the checkpoint")
    with torch.no_grad():
        token_types = model.get_parameter("bert.embeddings.token_type_embeddings.weight")
        token_types[1:] += token_types[0]
    if config.architecture == "bert":
        # Without our unpadded face, so that config.json names a class that everyone has.
        plain = BertForMaskedLM(model.config)  # type: ignore[arg-type]
        plain.load_state_dict(model.state_dict())
        model = plain
    write_folder(model, tokenizer_dir, out)


def write_folder(
    model: PreTrainedModel, tokenizer_dir: Path | None, out: Path, max_length: int | None = None
) -> None:
    """Write `model` and its tokenizer to `out`, prove that they load, and only then let `out` appear.

    max_length: tokens that `truncation=True` keeps; None for as many as the model and its tokenizer take.
    """
    if out.resolve() == Path.cwd():
        raise UserError(f"{out} is the folder that you are in; name a new one in it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; give another path or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.tmp-") as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        if tokenizer_dir is not None:
            tokenizer = read_tokenizer(tokenizer_dir)
            if len(tokenizer) > model.config.vocab_size:
                raise DataError(
                    f"the tokenizer in {tokenizer_dir} has {len(tokenizer)} tokens, the model only "
                    f"{model.config.vocab_size}; give the tokenizer that the model was trained with"
                )
            longest = [tokenizer.model_max_length, max_length or tokenizer.model_max_length]
            if isinstance(model.config, BertConfig):  # what is longer has no position
                longest.append(model.config.max_position_embeddings)
            tokenizer.model_max_length = min(longest)
            tokenizer.save_pretrained(folder)
            settings = folder / "tokenizer_config.json"  # its class by the name that transformers 4 knows too
            text = settings.read_text(encoding="utf-8")
            settings.write_text(
                text.replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'), encoding="utf-8"
            )
            model.config.pad_token_id = tokenizer.pad_token_id
        if isinstance(model, mosaicbert.MosaicBertPreTrainedModel):
            model.config.auto_map = AUTO_MAP
            (folder / f"{MODELING_FILE}.py").write_text(modeling_source(), encoding="utf-8")
        model.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # safetensors gives them to the owner alone
            weights.chmod((folder / "config.json").stat().st_mode)
        _check_logits(model, folder)
        folder.rename(out)


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`: Hugging Face's files, or a bare tokenizer.json with BERT's special tokens.

    Raises DataError where there is none or a special token is missing.
    """
    if (folder / "tokenizer_config.json").exists() or (folder / "vocab.txt").exists():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it asks a person
        except (ImportError, OSError, ValueError) as error:  # the first: its class needs another package
            reason = " ".join(str(error).split())
            raise DataError(f"the tokenizer in {folder} cannot be read: {reason}") from None
    if not (folder / "tokenizer.json").exists():
        raise DataError(f"{folder} holds no tokenizer.json; give the folder that tokenizer training wrote")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    missing = sorted(set(SPECIAL_TOKENS.values()) - tokenizer.get_vocab().keys())
    if missing:
        raise DataError(f"{folder / 'tokenizer.json'} lacks the special tokens {', '.join(missing)}")
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def modeling_source() -> str:
    """`ops/reference.py` and `model/mosaicbert.py` as the text of one module.

    Imports move to the top, those of this package fall away, and a namespace `ops` stands in for ours.
    """
    arithmetic = Path(reference.__file__).read_text(encoding="utf-8")
    network = Path(mosaicbert.__file__).read_text(encoding="utf-8")
    imports: set[str] = {"from types import SimpleNamespace"}
    arithmetic_body = _body(arithmetic, imports)
    network_body = _body(network, imports)
    used = sorted(
        {
            node.attr
            for node in ast.walk(ast.parse(network))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops"
        }
    )
    namespace = "".join(f"    {name}={name},\n" for name in used)
    return "\n\n\n".join(
        [
            MODELING_DOCSTRING + "\n" + "\n".join(sorted(imports)),
            arithmetic_body,
            f"ops = SimpleNamespace(\n{namespace})",
            network_body + "\n",
        ]
    )


def _body(source: str, imports: set[str]) -> str:
    """`source` without its docstring and imports, which are added to `imports` unless they are ours."""
    lines = source.splitlines()
    tree = ast.parse(source)
    drop: set[int] = set()
    for node in tree.body:
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if is_import or (node is tree.body[0] and ast.get_docstring(tree)):
            drop.update(range(node.lineno - 1, node.end_lineno or node.lineno))
        if is_import and "mosaicbert_ds" not in ast.unparse(node):
            imports.add(ast.unparse(node))
    return "\n".join(line for number, line in enumerate(lines) if number not in drop).strip()


@torch.no_grad()
def _check_logits(model: PreTrainedModel, folder: Path) -> None:
    """Raise CheckpointError unless the folder, loaded as its users will load it, gives the model's logits."""
    is_classifier = isinstance(
        model, mosaicbert.MosaicBertForSequenceClassification | BertForSequenceClassification
    )
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForMaskedLM
    reloaded = auto_class.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    lengths = torch.tensor([33, 7, 20])
    generator = torch.Generator().manual_seed(0)
    attention_mask = (torch.arange(33) < lengths[:, None]).long()  # (3, 33)
    input_ids = torch.randint(model.config.vocab_size, attention_mask.shape, generator=generator)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    expected, found = model.eval()(**batch).logits, reloaded(**batch).logits
    worst = (found - expected).abs().max().item()
    if not worst <= LOGIT_TOLERANCE:  # NaN is no agreement either
        raise CheckpointError(
            f"the exported model's logits differ from the trained model's by {worst}, allowed is "
            f"{LOGIT_TOLERANCE}; nothing was written"
        )
