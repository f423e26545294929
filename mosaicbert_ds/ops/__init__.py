"""The arithmetic of the hot path. The model calls these functions and knows no other form of them."""

from mosaicbert_ds.ops.dispatch import (
    attention,
    choose_kernels,
    dropout_add_layer_norm,
    geglu,
    masked_lm_loss,
)
from mosaicbert_ds.ops.reference import IGNORED_LABEL, alibi_slopes

__all__ = [
    "IGNORED_LABEL",
    "alibi_slopes",
    "attention",
    "choose_kernels",
    "dropout_add_layer_norm",
    "geglu",
    "masked_lm_loss",
]
