"""From the facts of a recipe to a model, fresh or with given weights."""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from mosaicbert_ds.errors import CheckpointError
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
        facts |= {key: getattr(config, key) for key in ("norm", "norm_placement", "masked_only_layers")}
        return MosaicBertConfig(**facts)
    # No cache: an encoder has none, and with checkpointing transformers would warn about it in each step.
    return BertConfig(**facts, max_position_embeddings=config.max_position_embeddings, use_cache=False)


def build_pretraining_model(config: ModelConfig, compiled: bool = False) -> PreTrainedModel:
    """A fresh masked-language model, initialised from torch's generator, in training mode. `compiled`: for
    the architecture bert.

    Both architectures answer the unpadded call (`MosaicBertForMaskedLM.forward`) with MaskedLMSums.
    """
    hf_config = to_hf_config(config)
    model: PreTrainedModel
    if isinstance(hf_config, MosaicBertConfig):
        model = MosaicBertForMaskedLM(hf_config)
    else:
        model = bert = HFBertForMaskedLM._from_config(hf_config, attn_implementation="sdpa")
        if compiled:
            bert.compile_encoder()
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of the masked-language model, the tied decoder counted once. Takes no memory."""
    with torch.device("meta"):
        return build_pretraining_model(config).num_parameters()


def load_weights(model: PreTrainedModel, weights: dict[str, Tensor], source: str) -> None:
    """Copy `weights` into `model` by name. Tied weights may be given once or under both names.

    Raises CheckpointError, naming `source`, with every missing and unexpected name, wrong shape and tied
    pair that differs.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight under both its names
    first_name = {parameter: name for name, parameter in model.named_parameters()}
    faults = [f"missing {name}" for name in sorted(first_name.values()) if name not in weights]
    faults += [f"unexpected {name}" for name in sorted(weights.keys() - parameters.keys())]
    for name in sorted(weights.keys() & parameters.keys()):
        given, tied = weights[name], first_name[parameters[name]]
        if given.shape != parameters[name].shape:
            faults.append(f"{name} has shape {tuple(given.shape)}, not {tuple(parameters[name].shape)}")
        elif tied in weights and tied != name and not torch.equal(given, weights[tied]):
            faults.append(f"{name} differs from {tied}, which it is tied to")
    if faults:
        raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(faults))
    model.load_state_dict(weights, strict=False)  # names are checked; a tied one may be left out
