"""The arithmetic of the hot path. The model calls these functions and knows no other form of them."""

from mosaicbert_ds.ops.dispatch import (
    adamw,
    add_layer_norm_dropout,
    attention_block,
    choose_kernels,
    embedding,
    masked_lm_loss,
    mlp_block,
)
from mosaicbert_ds.ops.reference import (
    IGNORED_LABEL,
    AttentionWeights,
    MLPWeights,
    Queries,
    alibi_slopes,
    layer_norm,
    queries_at,
    rows_of_queries,
)

__all__ = [
    "IGNORED_LABEL",
    "AttentionWeights",
    "MLPWeights",
    "Queries",
    "adamw",
    "add_layer_norm_dropout",
    "alibi_slopes",
    "attention_block",
    "choose_kernels",
    "embedding",
    "layer_norm",
    "masked_lm_loss",
    "mlp_block",
    "queries_at",
    "rows_of_queries",
]
