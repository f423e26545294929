"""The arithmetic of the hot path. The model calls these functions and knows no other form of them."""

from mosaicbert_ds.ops.reference import (
    IGNORED_LABEL,
    alibi_slopes,
    attention,
    dropout_add_layer_norm,
    geglu,
    masked_lm_loss,
)

__all__ = [
    "IGNORED_LABEL",
    "alibi_slopes",
    "attention",
    "dropout_add_layer_norm",
    "geglu",
    "masked_lm_loss",
]
