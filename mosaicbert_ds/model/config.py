"""The facts of a model that a recipe states."""

from typing import Annotated, Literal

from pydantic import Field

from mosaicbert_ds.typed_yaml import recipe_part

VOCAB_MULTIPLE = 64  # a matrix product over the vocabulary is fastest when its width fills whole tiles

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]

# Keys that architecture bert must leave at the published value.
_MOSAICBERT_ALONE = {"norm": "layernorm", "norm_placement": "post", "masked_only_layers": 0}


@recipe_part
class ModelConfig:
    """Shape and regularisation of the network. The defaults are MosaicBERT-Base."""

    architecture: Literal["mosaicbert", "bert"] = "mosaicbert"
    num_hidden_layers: Count = 12
    num_attention_heads: Count = 12
    hidden_size: Count = 768
    intermediate_size: Count = 3072
    vocab_size: Count = 30528
    type_vocab_size: Count = 2
    hidden_dropout: Rate = 0.1
    attention_dropout: Rate = 0.0
    max_position_embeddings: Count = 512  # bert only: MosaicBERT has no position embedding and no such limit
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    # Of mosaicbert alone, each with its published value first.
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_placement: Literal["post", "pre"] = "post"  # behind the residual's sum, or before each half
    masked_only_layers: Annotated[int, Field(ge=0)] = 0  # NarrowBERT's, at the end; 0 and 1 are the same
    activation_checkpointing: bool = False  # recompute each layer in the backward pass: less memory, slower

    @property
    def num_narrow_layers(self) -> int:
        """Layers that compute only what is read, but for keys and values: mosaicbert's last is always one."""
        return max(self.masked_only_layers, 1) if self.architecture == "mosaicbert" else 0

    def __post_init__(self) -> None:
        for key, published in _MOSAICBERT_ALONE.items():
            if self.architecture == "bert" and getattr(self, key) != published:
                raise ValueError(
                    f"{key} {getattr(self, key)} is mosaicbert's alone; architecture bert has {published}"
                )
        if self.masked_only_layers >= self.num_hidden_layers:
            raise ValueError(
                f"masked_only_layers {self.masked_only_layers} leaves none of the {self.num_hidden_layers} "
                f"layers to all tokens; give at most {self.num_hidden_layers - 1}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.vocab_size % VOCAB_MULTIPLE:
            above = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
            raise ValueError(
                f"vocab_size {self.vocab_size} is not a multiple of {VOCAB_MULTIPLE}; use {above}, "
                "the rows above the tokenizer's are never a target"
            )
