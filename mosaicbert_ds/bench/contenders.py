"""Who runs in `mosaicbert bench throughput`: this model, and its peers behind the same training step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM, PreTrainedModel

from mosaicbert_ds.config import RunConfig, load_recipe
from mosaicbert_ds.data.loader import Batch
from mosaicbert_ds.model import MaskedLMSums, build_pretraining_model
from mosaicbert_ds.model.build import to_hf_config
from mosaicbert_ds.ops import IGNORED_LABEL
from mosaicbert_ds.ops.reference import token_of_slot
from mosaicbert_ds.typed_yaml import from_tree, merge, to_tree

GlobalBatch = list[Any]  # micro batches: `Batch`es of the loader, or `PeerBatch`es


@dataclass(frozen=True, eq=False)
class PeerBatch:
    """What `training.loop.train_step` reads of a micro batch, for a model with another call."""

    inputs: dict[str, Any]
    num_tokens: int  # real ones
    num_masked: int
    cu_seqlens: Tensor  # of the rows, which the model may see padded

    def model_inputs(self) -> dict[str, Any]:
        return self.inputs


class PaddedPeer(nn.Module):
    """A Hugging Face masked-language model, untouched, that answers with the sums of a training step."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_masked: int
    ) -> MaskedLMSums:
        """(batch, length) each -> the summed loss; correct predictions are not counted, which is no work."""
        loss = self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        return MaskedLMSums(loss * num_masked, torch.zeros_like(loss, dtype=torch.int64))


def padded(steps: list[list[Batch]], length: int) -> list[GlobalBatch]:
    """Every micro batch padded to (samples, length), the call of Hugging Face's models."""

    def pad(batch: Batch) -> PeerBatch:
        token, filled = token_of_slot(batch.cu_seqlens[: batch.num_samples + 1], length)
        has_target = batch.labels != IGNORED_LABEL
        label_of_token = torch.full_like(batch.input_ids, IGNORED_LABEL)
        label_of_token[batch.masked_positions[has_target]] = batch.labels[has_target]
        inputs = {
            "input_ids": batch.input_ids[token] * filled,
            "attention_mask": filled.long(),
            "labels": label_of_token[token].masked_fill(~filled, IGNORED_LABEL),
            "num_masked": batch.num_masked,
        }
        return PeerBatch(inputs, batch.num_tokens, batch.num_masked, batch.cu_seqlens)

    return [[pad(batch) for batch in step] for step in steps]


def in_one_shape(steps: list[list[Batch]], length: int) -> list[GlobalBatch]:
    """Unpadded micro batches rounded up to one shape, so that a compiled model is compiled once."""
    most_masked = max(batch.labels.numel() for step in steps for batch in step)

    def round_up(batch: Batch) -> PeerBatch:
        tokens, masked = batch.num_samples * length, batch.labels.numel()
        inputs = {
            "input_ids": F.pad(batch.input_ids[: batch.num_tokens], (0, tokens - batch.num_tokens)),
            "cu_seqlens": batch.cu_seqlens[: batch.num_samples + 1],
            "max_seqlen": length,
            "masked_positions": F.pad(batch.masked_positions, (0, most_masked - masked)),
            "labels": F.pad(batch.labels, (0, most_masked - masked), value=IGNORED_LABEL),
        }
        return PeerBatch(inputs, batch.num_tokens, batch.num_masked, batch.cu_seqlens)

    return [[round_up(batch) for batch in step] for step in steps]


def _same(steps: list[list[Batch]], length: int) -> list[GlobalBatch]:
    return list(steps)


@dataclass(frozen=True, kw_only=True)
class Contender:
    model: str
    variant: str
    recipe_from: Callable[[RunConfig], RunConfig] = lambda recipe: recipe
    build: Callable[[RunConfig], nn.Module]
    convert: Callable[[list[list[Batch]], int], list[GlobalBatch]]
    has_recipes_size: bool = True

    @property
    def is_fed_by_loader(self) -> bool:
        """Whether it trains on the loader's batches as they come."""
        return self.convert is _same


def _build_ours(recipe: RunConfig) -> nn.Module:
    return build_pretraining_model(recipe.model, recipe.engine.compile)


def _build_hf_bert(recipe: RunConfig) -> PreTrainedModel:
    return BertForMaskedLM._from_config(to_hf_config(recipe.model), attn_implementation="sdpa").train()


def _build_modernbert(recipe: RunConfig) -> PreTrainedModel:
    """ModernBERT-Base as its own config class has it, whatever the recipe's size, with our vocabulary."""
    config = ModernBertConfig(
        vocab_size=recipe.model.vocab_size,
        pad_token_id=0,
        cls_token_id=2,
        bos_token_id=2,
        sep_token_id=3,
        eos_token_id=3,
    )
    return ModernBertForMaskedLM._from_config(config, attn_implementation="sdpa").train()


def _with_torch_kernels(recipe: RunConfig) -> RunConfig:
    return replace(recipe, engine=replace(recipe.engine, kernels="torch"))


def _as_user_runs_it(recipe: RunConfig) -> RunConfig:
    """Without our recording of CUDA graphs: Hugging Face's eager models wait for the device on their way."""
    return replace(recipe, engine=replace(recipe.engine, cuda_graphs=False))


def _as_bert(recipe: RunConfig) -> RunConfig:
    """BERT of the recipe's size, with what the recipe bert-base states beside the size."""
    bert = load_recipe("bert-base")
    facts = {"architecture": bert.model.architecture, "attention_dropout": bert.model.attention_dropout}
    tree = merge(to_tree(recipe), {"model": facts, "masking": to_tree(bert.masking)})
    return _as_user_runs_it(from_tree(RunConfig, tree, "BERT of the recipe's size"))


def _eager_and_compiled(
    name: str,
    model: str,
    build: Callable[[RunConfig], Any],
    recipe_from: Callable[[RunConfig], RunConfig],
    convert: Callable[[list[list[Batch]], int], list[GlobalBatch]],
    has_recipes_size: bool = True,
) -> dict[str, Contender]:
    def finish(module: Any) -> nn.Module:
        return PaddedPeer(module) if convert is padded else module

    def eager(recipe: RunConfig) -> nn.Module:
        return finish(build(recipe))

    def compiled(recipe: RunConfig) -> nn.Module:
        return finish(torch.compile(build(recipe), dynamic=False))

    return {
        f"{name}{suffix}": Contender(
            model=model,
            variant=variant,
            recipe_from=recipe_from,
            build=build_variant,
            convert=convert,
            has_recipes_size=has_recipes_size,
        )
        for suffix, variant, build_variant in (("", "eager", eager), ("-compiled", "compiled", compiled))
    }


OURS = "ours"
# In the order of the table.
CONTENDERS: dict[str, Contender] = {
    OURS: Contender(model="this recipe", variant="as it says", build=_build_ours, convert=_same),
    "ours-torch": Contender(
        model="this recipe",
        variant="kernels: torch",
        recipe_from=_with_torch_kernels,
        build=_build_ours,
        convert=_same,
    ),
    **_eager_and_compiled("hf-bert", "Hugging Face BERT", _build_hf_bert, _as_bert, padded),
    **_eager_and_compiled("bert", "BERT, head on targets only", _build_ours, _as_bert, in_one_shape),
    **_eager_and_compiled(
        "modernbert",
        "Hugging Face ModernBERT-Base",
        _build_modernbert,
        _as_user_runs_it,
        padded,
        has_recipes_size=False,
    ),
}
