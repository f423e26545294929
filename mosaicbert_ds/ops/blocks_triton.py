"""The two halves of a layer as one differentiable step each, forward and backward written out.

What this buys over autograd's own chain of the same kernels and products, a layer of the Base model:

- two of the three bias gradients come out of the LayerNorm's kernel (autograd: a pass over each);
- the residual's gradient is the product's addend, `d_residual += d_x W` (autograd: a pass to add them);
- gradients go to their fp32 sums at once where the weights have a `main_grad`;
- GeGLU's output is not kept for the backward pass (`geglu_triton`).

    attention block:  y = LayerNorm(dropout(attention(x Wqkv + bqkv) Wdense + bdense) + x)
    MLP block:        y = LayerNorm(dropout(GELU(x Wgate) * (x Wvalue)) Wo + bo + x)

In pre-LN the addend is not x but the residual stream, and the LayerNorm's kernel hands on the new stream
beside its norm. It reads that stream again in the backward pass instead of what was summed, so as much is
kept for it, and memory is passed as often, as in post-LN.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaicbert_ds.ops.attention_triton import (
    attention_backward,
    attention_forward,
    queries_backward,
    queries_forward,
)
from mosaicbert_ds.ops.column_sums_triton import column_sums
from mosaicbert_ds.ops.dropout_layernorm_triton import layer_norm_backward, layer_norm_forward
from mosaicbert_ds.ops.dropout_triton import draw_seed, drop_threshold
from mosaicbert_ds.ops.geglu_triton import geglu_backward, geglu_forward
from mosaicbert_ds.ops.main_grad import main_grads_of, product, settle, sums_dtype
from mosaicbert_ds.ops.reference import AttentionWeights, MLPWeights, Queries


def _seed(device: torch.device, dropout_p: float) -> Tensor | None:
    return draw_seed(device) if drop_threshold(dropout_p) else None


def _norm_forward(
    x: Tensor, x_bias: Tensor, hidden: Tensor, stream: Tensor | None, w: AttentionWeights | MLPWeights,
    seed: Tensor | None, eps: float, dropout_p: float,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:  # fmt: skip
    """The end of both halves: the norm, the new stream (pre-LN), and what `_norm_backward` will need."""
    is_pre = stream is not None
    y, mean, rstd, total = layer_norm_forward(
        x, x_bias, hidden if stream is None else stream, w.norm_weight, w.norm_bias,
        seed, eps, dropout_p, is_pre,
    )  # fmt: skip
    if is_pre:
        return y, total, (None, None, total, mean, rstd, seed)
    return y, None, (x, hidden, None, mean, rstd, seed)


def _norm_backward(
    saved: tuple[Tensor | None, ...], x_bias: Tensor, norm_weight: Tensor, d_y: Tensor,
    d_stream: Tensor | None, dropout_p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d_x, the addend's gradient (without dropout d_x itself), and d_norm_weight, d_norm_bias, d_x_bias
    of `dtype`."""
    x, residual, total, mean, rstd, seed = saved
    d_x, d_residual, sums = layer_norm_backward(
        x, x_bias, residual, total, norm_weight, d_y, d_stream, mean, rstd, seed, dropout_p, dtype
    )
    return d_x, d_residual if drop_threshold(dropout_p) else d_x, sums


def _hidden_and_stream(
    d_addend: Tensor, d_stream: Tensor | None, d_x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of a half's two inputs: of hidden, which went through x = hidden weight^T, and in pre-LN
    of the stream. In post-LN the addend was hidden itself; its gradient has no other reader left."""
    if d_stream is None:
        return d_addend.addmm_(d_x, weight), None
    return d_x @ weight, d_addend


def _saved(ctx: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What `_norm_forward` kept, and the rest. Read once: activation checkpointing gives them out once."""
    saved = ctx.saved_tensors
    return saved[:6], saved[6:]


class _AttentionBlock(torch.autograd.Function):
    """Of all tokens; or with `memory` of the queries alone, keys and values made of the memory."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        eps: float, attention_dropout_p: float, hidden_dropout_p: float,
        stream: Tensor | None, memory: Tensor | None, queries: Queries | None,
        main_grads: tuple[Tensor | None, ...] | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        w, heads, width = AttentionWeights(*weights), slopes.shape[0], hidden.shape[1]
        attention_seed = _seed(hidden.device, attention_dropout_p)
        how = (slopes, cu_seqlens, max_seqlen, attention_seed, attention_dropout_p)
        if memory is None or queries is None:
            q = F.linear(hidden, w.qkv_weight, w.qkv_bias).unflatten(-1, (3, heads, -1))  # and k and v
            kv = None
            out, lost, lse = attention_forward(q, *how)
        else:
            q = F.linear(hidden, w.qkv_weight[:width], w.qkv_bias[:width]).unflatten(-1, (heads, -1))
            kv = F.linear(memory, w.qkv_weight[width:], w.qkv_bias[width:]).unflatten(-1, (2, heads, -1))
            out, lost, lse = queries_forward(q, kv, queries, *how)
        dense = F.linear(out.flatten(1), w.dense_weight)  # its bias is added by the next kernel
        seed = _seed(hidden.device, hidden_dropout_p)
        y, stream, norm_saved = _norm_forward(
            dense, w.dense_bias, hidden, stream, w, seed, eps, hidden_dropout_p
        )
        ctx.save_for_backward(
            *norm_saved, hidden, memory, q, kv, out, lost, lse, attention_seed, slopes, cu_seqlens,
            *(queries or (None, None)), *weights,
        )  # fmt: skip
        ctx.max_seqlen, ctx.main_grads = max_seqlen, main_grads
        ctx.attention_dropout_p, ctx.hidden_dropout_p = attention_dropout_p, hidden_dropout_p
        return y, stream

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, d_stream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        norm_saved, saved = _saved(ctx)
        (
            hidden, memory, q, kv, out, lost, lse, attention_seed, slopes, cu_seqlens,
            rows, cu_queries, *weights,
        ) = saved  # fmt: skip
        w, width = AttentionWeights(*weights), hidden.shape[1]
        dtype = sums_dtype(ctx.main_grads, w.norm_weight)
        d_dense, d_addend, sums = _norm_backward(
            norm_saved, w.dense_bias, w.norm_weight, d_y, d_stream, ctx.hidden_dropout_p, dtype
        )
        d_norm_weight, d_norm_bias, d_dense_bias = sums
        main_qkv, _, main_dense, *_ = ctx.main_grads or (None,) * len(w)
        d_dense_weight = product(main_dense, d_dense, out.flatten(1))
        d_out = (d_dense @ w.dense_weight).view_as(out)
        how = (lse, slopes, cu_seqlens, ctx.max_seqlen, attention_seed, ctx.attention_dropout_p)
        # A shift of all of a query's scores changes no softmax, so the bias of the keys has no gradient. The
        # sum would be rounding, which Adam's normalised step takes for a direction.
        if memory is None:
            d_q = attention_backward(q, out, lost, d_out, *how).flatten(1)
            d_qkv_weight = product(main_qkv, d_q, hidden)
            d_qkv_bias = column_sums(d_q, dtype, zeros=range(width, 2 * width))
            q_weight, d_memory = w.qkv_weight, None
        else:
            queries = Queries(rows, cu_queries)
            d_q, d_kv = (d.flatten(1) for d in queries_backward(q, kv, queries, out, lost, d_out, *how))
            q_weight, kv_weight = w.qkv_weight.split([width, 2 * width])
            main_q, main_kv = (None, None) if main_qkv is None else main_qkv.split([width, 2 * width])
            parts = (product(main_q, d_q, hidden), product(main_kv, d_kv, memory))
            returned = [part for part in parts if part is not None]
            d_qkv_weight = torch.cat(returned) if returned else None
            d_qkv_bias = torch.cat([column_sums(d_q, dtype), column_sums(d_kv, dtype, zeros=range(width))])
            d_memory = d_kv @ kv_weight
        d_hidden, d_stream = _hidden_and_stream(d_addend, d_stream, d_q, q_weight)
        d_weights = (d_qkv_weight, d_qkv_bias, d_dense_weight, d_dense_bias, d_norm_weight, d_norm_bias)
        settled = settle(d_weights, ctx.main_grads, w)
        return d_hidden, *(None,) * 6, d_stream, d_memory, None, None, *settled


class _MLPBlock(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, eps: float, dropout_p: float, stream: Tensor | None,
        main_grads: tuple[Tensor | None, ...] | None, *weights: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        w = MLPWeights(*weights)
        gate_value = F.linear(hidden, w.gate_value_weight)  # (rows, 2 * intermediate)
        seed = _seed(hidden.device, dropout_p)
        down = F.linear(geglu_forward(gate_value, seed, dropout_p), w.down_weight)
        y, stream, norm_saved = _norm_forward(down, w.down_bias, hidden, stream, w, None, eps, 0.0)
        ctx.save_for_backward(*norm_saved, hidden, gate_value, seed, *weights)
        ctx.main_grads, ctx.dropout_p = main_grads, dropout_p
        return y, stream

    @staticmethod
    def backward(ctx: Any, d_y: Tensor, d_stream: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        norm_saved, (hidden, gate_value, seed, *weights) = _saved(ctx)
        w = MLPWeights(*weights)
        dtype = sums_dtype(ctx.main_grads, w.norm_weight)
        d_down, d_addend, sums = _norm_backward(
            norm_saved, w.down_bias, w.norm_weight, d_y, d_stream, 0.0, dtype
        )
        d_norm_weight, d_norm_bias, d_down_bias = sums
        d_gate_value, gated = geglu_backward(gate_value, d_down @ w.down_weight, seed, ctx.dropout_p)
        main_gate_value, main_down, *_ = ctx.main_grads or (None,) * len(w)
        d_weights = (
            product(main_gate_value, d_gate_value, hidden), product(main_down, d_down, gated),
            d_down_bias, d_norm_weight, d_norm_bias,
        )  # fmt: skip
        d_hidden, d_stream = _hidden_and_stream(d_addend, d_stream, d_gate_value, w.gate_value_weight)
        return d_hidden, None, None, d_stream, None, *settle(d_weights, ctx.main_grads, w)


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
    """`reference.attention_block` defines it."""
    return _AttentionBlock.apply(
        hidden, slopes, cu_seqlens, max_seqlen, eps, attention_dropout_p, hidden_dropout_p,
        stream, memory, queries, main_grads_of(weights), *weights,
    )  # fmt: skip


def mlp_block(
    hidden: Tensor, weights: MLPWeights, eps: float, dropout_p: float, stream: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`reference.mlp_block` defines it."""
    return _MLPBlock.apply(hidden, eps, dropout_p, stream, main_grads_of(weights), *weights)
