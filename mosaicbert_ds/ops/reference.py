"""The arithmetic of the hot path in plain PyTorch: the truth that every kernel is measured against.

Sequences travel unpadded: the tokens of all sequences stand one behind the other, and sequence `i` owns
the rows `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Rows behind `cu_seqlens[-1]` belong to no sequence; they
round the batch up to a fixed shape. Nothing here waits for the device, so a step can be compiled.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Queries that attend at a time. At length 8,192 and 12 heads the fp32 scores of one sequence are then
# 200 MB a chunk instead of 3.2 GB.
QUERY_CHUNK = 512

IGNORED_LABEL = -100  # PyTorch's own value for "no target here"


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """Slope of the distance penalty of each head: (heads,) fp32.

    With n the largest power of two <= num_heads: 2^(-8i/n) for i = 1..n, and for the heads that remain the
    odd members of the sequence for 2n heads. Source: ALiBi, https://arxiv.org/abs/2108.12409.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    first = torch.arange(1, power + 1, dtype=torch.float32, device=device)
    rest = torch.arange(num_heads - power, dtype=torch.float32, device=device) + 0.5
    return torch.exp2(torch.cat([first, rest]) * (-8.0 / power))


def token_of_slot(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """For each slot of the padded layout the row of its token, and whether it has one.

    Both (sequences, max_seqlen), int64 and bool; a slot without a token points at row 0.
    """
    slot = torch.arange(max_seqlen, device=cu_seqlens.device)
    token = cu_seqlens[:-1, None] + slot
    filled = token < cu_seqlens[1:, None]
    return token.long() * filled, filled


def slot_of_token(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For each token its slot in the flattened padded layout, and whether it belongs to a sequence.

    Both (tokens,), int64 and bool; a token without a sequence points at slot 0.
    """
    token = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    owned = token < cu_seqlens[-1]
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    sequence = sequence * owned
    return (sequence * max_seqlen + token - cu_seqlens[sequence]) * owned, owned


def attention(
    qkv: Tensor, slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) - slope |i - j|) v within each sequence.

    qkv: (tokens, 3, heads, head_dim); slopes: (heads,) fp32; cu_seqlens: (sequences + 1,) int32;
    max_seqlen: at least the longest sequence. Returns (tokens, heads, head_dim) in qkv's dtype; rows behind
    cu_seqlens[-1] are zero and have zero gradients.
    """
    num_tokens, _, num_heads, head_dim = qkv.shape
    token, filled = token_of_slot(cu_seqlens, max_seqlen)
    padded = qkv.index_select(0, token.flatten()).view(*token.shape, 3, num_heads, head_dim)
    q, k, v = padded.permute(2, 0, 3, 1, 4)  # each (sequences, heads, max_seqlen, head_dim)

    chunks = []
    for start in range(0, max_seqlen, QUERY_CHUNK):
        arguments = (q[:, :, start : start + QUERY_CHUNK], k, v, slopes, filled, start, dropout_p)
        if max_seqlen <= QUERY_CHUNK:
            chunks.append(_attend(*arguments))
        else:  # else the backward pass would hold the probabilities of all chunks, the whole square
            chunks.append(checkpoint(_attend, *arguments, use_reentrant=False))
    context = torch.cat(chunks, dim=2)  # (sequences, heads, max_seqlen, head_dim)

    slot, owned = slot_of_token(cu_seqlens, max_seqlen, num_tokens)
    context = context.transpose(1, 2).flatten(0, 1).index_select(0, slot)  # (tokens, heads, head_dim)
    return context.masked_fill(~owned[:, None, None], 0.0)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, filled: Tensor, start: int, dropout_p: float
) -> Tensor:
    """Queries start, start + 1, ... against all keys: (sequences, heads, queries, head_dim)."""
    query = torch.arange(start, start + q.shape[2], device=q.device)
    key = torch.arange(k.shape[2], device=q.device)
    bias = -slopes[:, None, None] * (query[:, None] - key).abs()  # (heads, queries, keys) fp32
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5 + bias  # (sequences, heads, queries, keys)
    # The lowest finite number rather than -inf: a sequence without any token must not give NaN.
    scores = scores.masked_fill(~filled[:, None, None], torch.finfo(torch.float32).min)
    return F.dropout(scores.softmax(-1), dropout_p).to(v.dtype) @ v


def geglu(gate_value: Tensor, dropout_p: float = 0.0) -> Tensor:
    """dropout(GELU(gate) * value) with the exact (erf) GELU.

    gate_value: (tokens, 2 * intermediate), the gate first. Returns (tokens, intermediate).
    Source: GLU variants, https://arxiv.org/abs/2002.05202.
    """
    gate, value = gate_value.chunk(2, dim=-1)
    return F.dropout(F.gelu(gate) * value, dropout_p)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, or where there is no bias, here and in all that follows, RMSNorm:
    weight x / sqrt(mean(x^2) + eps).

    Sources: https://arxiv.org/abs/1607.06450 and https://arxiv.org/abs/1910.07467.
    """
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in x's dtype, which is wider than the weights'."""
    return layer_norm(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def _dropout_add(x: Tensor, x_bias: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
    """dropout(x + x_bias) + residual, in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.dropout(x.to(wide) + x_bias.to(wide), dropout_p) + residual.to(wide)


def dropout_add_layer_norm(
    x: Tensor,
    x_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual) over the last dimension, sums and statistics in fp32.

    x, residual: (tokens, hidden); x_bias, weight, bias: (hidden,). Returns (tokens, hidden) in x's dtype.
    """
    return _wide_layer_norm(_dropout_add(x, x_bias, residual, dropout_p), weight, bias, eps).to(x.dtype)


def dropout_add_and_layer_norm(
    x: Tensor,
    x_bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm(h) and h itself, h = dropout(x + x_bias) + residual rounded to x's dtype."""
    total = _dropout_add(x, x_bias, residual, dropout_p).to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return _wide_layer_norm(total.to(wide), weight, bias, eps).to(x.dtype), total


class AttentionWeights(NamedTuple):
    """Of the first half of a layer; a weight is (out, in), as in nn.Linear."""

    qkv_weight: Tensor  # (3 * hidden, hidden)
    qkv_bias: Tensor
    dense_weight: Tensor  # (hidden, hidden)
    dense_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None  # None: RMSNorm


class MLPWeights(NamedTuple):
    """Of the second half of a layer."""

    gate_value_weight: Tensor  # (2 * intermediate, hidden), the gate first
    down_weight: Tensor  # (hidden, intermediate)
    down_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None


def add_layer_norm_dropout(
    x: Tensor, kind: Tensor, weight: Tensor, bias: Tensor | None, eps: float, dropout_p: float
) -> Tensor:
    """dropout(LayerNorm(x + kind)): x (tokens, hidden), kind (tokens, hidden) or one row for all tokens."""
    return F.dropout(layer_norm(x + kind, weight, bias, eps), dropout_p)


def attention_block(
    hidden: Tensor,
    weights: AttentionWeights,
    slopes: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    positions: Tensor | None,
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    stream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The first half of a layer, self-attention. Post-LN where there is no residual stream:

        LayerNorm(dropout(attention(hidden Wqkv) Wdense) + hidden), None

    Pre-LN, where `hidden` is the stream's norm, which the half before has made:

        LayerNorm(s), s        with s = dropout(attention(hidden Wqkv) Wdense) + stream

    hidden, stream: (tokens, hidden). Returns (tokens, hidden), or (positions, hidden) for those rows alone.
    """
    qkv = F.linear(hidden, weights.qkv_weight, weights.qkv_bias)
    qkv = qkv.unflatten(-1, (3, slopes.shape[0], -1))  # (tokens, 3, heads, head_dim)
    context = attention(qkv, slopes, cu_seqlens, max_seqlen, attention_dropout_p).flatten(1)
    if positions is not None:
        context, hidden = context.index_select(0, positions), hidden.index_select(0, positions)
        stream = None if stream is None else stream.index_select(0, positions)
    dense = F.linear(context, weights.dense_weight)
    return _end_of_half(dense, weights.dense_bias, hidden, stream, weights, eps, hidden_dropout_p)


def mlp_block(
    hidden: Tensor, weights: MLPWeights, eps: float, dropout_p: float, stream: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The second half of a layer, GeGLU; post-LN or pre-LN as in `attention_block`:

        f = dropout(GELU(hidden Wgate) * (hidden Wvalue)) Wdown

    (rows, hidden) -> the same. The dropout stands before the down projection, and none behind it.
    """
    gated = geglu(F.linear(hidden, weights.gate_value_weight), dropout_p)  # (rows, intermediate)
    down = F.linear(gated, weights.down_weight)
    return _end_of_half(down, weights.down_bias, hidden, stream, weights, eps, dropout_p=0.0)


def _end_of_half(
    x: Tensor,
    x_bias: Tensor,
    hidden: Tensor,
    stream: Tensor | None,
    weights: AttentionWeights | MLPWeights,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None]:
    arguments = (weights.norm_weight, weights.norm_bias, eps, dropout_p)
    if stream is None:
        return dropout_add_layer_norm(x, x_bias, hidden, *arguments), None
    return dropout_add_and_layer_norm(x, x_bias, stream, *arguments)


def masked_lm_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of `labels` under softmax(hidden weight^T + bias), summed over the masked tokens.

    hidden: (masked, hidden); weight: (vocab, hidden); bias: (vocab,); labels: (masked,) int64, where -100
    stands for a row without a target. Returns (loss_sum fp32 scalar, num_correct int64 scalar). The sum, not
    the mean: only the caller knows how many targets the global batch holds.
    """
    logits = F.linear(hidden, weight, bias).float()  # (masked, vocab)
    loss_sum = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    num_correct = (logits.argmax(-1) == labels).sum()
    return loss_sum, num_correct
