"""Which arithmetic runs: the Triton kernels or plain PyTorch. Chosen once by name, in the recipe's `kernels`.

`auto` is triton for CUDA tensors where Triton and the GPU can run it, torch for everything else. Tensors on
the CPU always take torch, also under `triton`: a checkpoint is exported there beside a run on the GPU.
"""

import importlib.util
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.ops import reference
from mosaicbert_ds.ops.reference import AttentionWeights, MLPWeights, Queries

BACKENDS = ("auto", "triton", "torch")
MIN_CAPABILITY = (8, 0)  # bf16 on the tensor cores

_asked = "auto"
_chosen: str | None = None  # "triton" or "torch"; None until the first choice


def choose_kernels(name: str = "auto") -> str:
    """Choose the backend for this process: auto, triton or torch. Returns triton or torch.

    Raises ConfigError for another name, and where `triton` is asked for and cannot run.
    """
    global _asked, _chosen
    if name not in BACKENDS:
        raise ConfigError(f"kernels is {name!r}; give one of {', '.join(BACKENDS)}")
    obstacle = _obstacle()
    if name == "triton" and obstacle:
        raise ConfigError(f"kernels is triton, but {obstacle}; give auto or torch")
    _asked = name
    _chosen = "torch" if name == "torch" or obstacle else "triton"
    logging.getLogger(__name__).info(
        "kernels: %s%s", _chosen, f" ({obstacle})" if name == "auto" and obstacle else ""
    )
    return _chosen


def _obstacle() -> str | None:
    """Why the Triton kernels cannot run in this process, None when they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


@torch.compiler.assume_constant_result
def _cuda_backend() -> str:
    return _chosen or choose_kernels()


def _on_triton(x: Tensor) -> bool:
    return x.is_cuda and _cuda_backend() == "triton"


# Triton is imported inside, by the first call that needs it: that takes a second, and many machines lack it.


def add_layer_norm_dropout(
    x: Tensor, kind: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout_p: float
) -> Tensor:
    """The embedding's norm and dropout; see `reference.add_layer_norm_dropout`."""
    if _on_triton(x):
        from mosaicbert_ds.ops import layernorm_dropout_triton

        return layernorm_dropout_triton.add_layer_norm_dropout(x, kind, weight, bias, eps, dropout_p)
    return reference.add_layer_norm_dropout(x, kind, weight, bias, eps, dropout_p)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table; see `reference.embedding`."""
    if _on_triton(weight):
        from mosaicbert_ds.ops import embedding_triton

        return embedding_triton.embedding(ids, weight)
    return reference.embedding(ids, weight)


def attention_block(
    hidden: Tensor,
    weights: AttentionWeights,
    slopes: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    stream: Tensor | None = None,
    memory: Tensor | None = None,
    queries: Queries | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention, dropout, residual and norm; see `reference.attention_block`."""
    block = reference.attention_block
    if _on_triton(hidden):
        from mosaicbert_ds.ops import attention_triton, blocks_triton

        head_dim = hidden.shape[1] // slopes.shape[0]
        if head_dim in attention_triton.HEAD_DIMS:
            block = blocks_triton.attention_block
        elif _asked == "triton":
            raise ConfigError(
                f"kernels is triton, but a head has {head_dim} dimensions; the kernels know "
                f"{', '.join(map(str, attention_triton.HEAD_DIMS))}; give auto or torch"
            )
    return block(
        hidden, weights, slopes, cu_seqlens, max_seqlen, eps, attention_dropout_p, hidden_dropout_p,
        stream, memory, queries,
    )  # fmt: skip


def mlp_block(
    hidden: Tensor, weights: MLPWeights, eps: float, dropout_p: float, stream: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """GeGLU feed-forward, residual and norm; see `reference.mlp_block`."""
    if _on_triton(hidden):
        from mosaicbert_ds.ops import blocks_triton

        return blocks_triton.mlp_block(hidden, weights, eps, dropout_p, stream)
    return reference.mlp_block(hidden, weights, eps, dropout_p, stream)


def masked_lm_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy and the number of correct predictions; see `reference.masked_lm_loss`."""
    if _on_triton(hidden):
        from mosaicbert_ds.ops import masked_lm_loss_triton

        return masked_lm_loss_triton.masked_lm_loss(hidden, weight, bias, labels)
    return reference.masked_lm_loss(hidden, weight, bias, labels)


def adamw(
    weights: Sequence[Tensor],
    masters: Sequence[Tensor],
    rates: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> reference.AdamW:
    """The optimizer of `weights`, on whose device it works; see `reference.AdamW`."""
    kind = reference.AdamW
    if _on_triton(weights[0]):
        from mosaicbert_ds.ops import adamw_triton

        kind = adamw_triton.AdamW
    return kind(weights, masters, rates, betas, eps, weight_decay)
