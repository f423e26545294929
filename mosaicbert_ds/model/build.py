"""From the facts of a recipe to a fresh model on the current device."""

from typing import Any

import torch
from transformers import BertConfig, PreTrainedModel

from mosaicbert_ds.model.config import ModelConfig
from mosaicbert_ds.model.hf_bert import HFBertForMaskedLM
from mosaicbert_ds.model.mosaicbert import MosaicBertConfig, MosaicBertForMaskedLM


def to_hf_config(config: ModelConfig) -> MosaicBertConfig | BertConfig:
    """The same facts under Hugging Face's names."""
    facts: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "type_vocab_size": config.type_vocab_size,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": config.initializer_range,
    }
    if config.architecture == "mosaicbert":
        return MosaicBertConfig(**facts)
    return BertConfig(**facts, max_position_embeddings=config.max_position_embeddings)


def build_pretraining_model(config: ModelConfig) -> PreTrainedModel:
    """A fresh masked-language model, initialised from torch's generator, in training mode.

    Both architectures answer the unpadded call (`MosaicBertForMaskedLM.forward`) with MaskedLMSums.
    """
    hf_config = to_hf_config(config)
    model: PreTrainedModel
    if isinstance(hf_config, MosaicBertConfig):
        model = MosaicBertForMaskedLM(hf_config)
    else:
        model = HFBertForMaskedLM._from_config(hf_config, attn_implementation="sdpa")
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the masked-language model, the tied decoder counted once. Takes no memory."""
    with torch.device("meta"):
        return build_pretraining_model(config).num_parameters()
