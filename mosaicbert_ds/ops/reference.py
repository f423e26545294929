"""The arithmetic of the hot path in plain PyTorch: the truth that every kernel is measured against.

Sequences travel unpadded: the tokens of all sequences stand one behind the other, and sequence `i` owns
the rows `cu_seqlens[i]` to `cu_seqlens[i + 1]`. Rows behind `cu_seqlens[-1]` belong to no sequence; they
round the batch up to a fixed shape. Nothing here waits for the device, so a step can be compiled.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw
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
    token, filled = token_of_slot(cu_seqlens, max_seqlen)
    q, k, v = _padded(qkv, token)
    position = torch.arange(max_seqlen, device=qkv.device)
    context = _attend_by_chunks(q, k, v, position, slopes, filled, dropout_p)
    return _unpadded(context, cu_seqlens, qkv.shape[0])


class Queries(NamedTuple):
    """A packed subset of the tokens, which alone ask; all tokens of their sequences answer."""

    rows: Tensor  # (queries,) int64: the token that each query is, ascending, none twice
    cu_seqlens: Tensor  # (sequences + 1,) int32: queries cu_seqlens[i] : cu_seqlens[i + 1] ask sequence i


def queries_at(positions: Tensor, cu_seqlens: Tensor, num_tokens: int) -> tuple[Queries, Tensor, Tensor]:
    """The tokens at `positions` (in any order, some perhaps more than once) as queries; for each position the
    row of its query, (positions,) int64; and for each token, (tokens,) int64, the number of rows where it
    has none.

    There are as many rows as positions, so that shapes are static; those left over, behind
    `Queries.cu_seqlens[-1]`, hold `num_tokens` and ask nobody.
    """
    ordered, order = positions.long().sort()
    is_new = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)[: len(positions)]
    rank = is_new.cumsum(0) - 1  # equal positions have one
    # One row at least: nothing can be read of a tensor of none.
    rows = ordered.new_full((max(1, len(positions)),), num_tokens).scatter(0, rank, ordered)
    row_of_position = torch.empty_like(rank).scatter(0, order, rank)
    row_of_token = rows.new_full((num_tokens + 1,), len(rows))
    row_of_token = row_of_token.scatter(0, rows, torch.arange(len(rows), device=rows.device))[:num_tokens]
    queries = Queries(rows, torch.searchsorted(rows, cu_seqlens.to(rows.dtype)).int())
    return queries, row_of_position, row_of_token


class _RowsOfQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, row_of_token: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(row_of_token)
        return x.index_select(0, rows.clamp(max=len(x) - 1))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (row_of_token,) = ctx.saved_tensors
        return F.pad(d_out, (0, 0, 0, 1)).index_select(0, row_of_token), None, None


def rows_of_queries(x: Tensor, rows: Tensor, row_of_token: Tensor) -> Tensor:
    """x (tokens, width) at the rows of `queries_at`: (queries, width); those left over hold any token's.

    The gradient is gathered as well. Autograd's own adds up into zeros, several times as slow, for it cannot
    know that no row is read twice.
    """
    return _RowsOfQueries.apply(x, rows, row_of_token)


def attention_of_queries(
    q: Tensor,
    kv: Tensor,
    queries: Queries,
    slopes: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
) -> Tensor:
    """`attention` where only some tokens ask: q (queries, heads, head_dim), kv (tokens, 2, heads, head_dim).

    Returns (queries, heads, head_dim), zero in rows that ask nobody.
    """
    token, filled = token_of_slot(cu_seqlens, max_seqlen)
    k, v = _padded(kv, token)
    query, _ = token_of_slot(queries.cu_seqlens, max_seqlen)
    (q,) = _padded(q[:, None], query)
    position = queries.rows.index_select(0, query.flatten()).view_as(query) - cu_seqlens[:-1, None]
    context = _attend_by_chunks(q, k, v, position[:, None], slopes, filled, dropout_p)
    return _unpadded(context, queries.cu_seqlens, queries.rows.shape[0])


def _padded(x: Tensor, token: Tensor) -> Tensor:
    """(tokens, parts, heads, head_dim) -> (parts, sequences, heads, max_seqlen, head_dim)"""
    return x.index_select(0, token.flatten()).view(*token.shape, *x.shape[1:]).permute(2, 0, 3, 1, 4)


def _unpadded(context: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """(sequences, heads, max_seqlen, head_dim) -> (tokens, heads, head_dim), zero outside of sequences"""
    slot, owned = slot_of_token(cu_seqlens, context.shape[2], num_tokens)
    context = context.transpose(1, 2).flatten(0, 1).index_select(0, slot)
    return context.masked_fill(~owned[:, None, None], 0.0)


def _attend_by_chunks(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, slopes: Tensor, filled: Tensor, dropout_p: float
) -> Tensor:
    """Queries at `position`, (queries,) or (sequences, 1, queries), against all keys."""
    num_queries = q.shape[2]
    chunks = []
    for start in range(0, num_queries, QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        arguments = (q[:, :, chunk], k, v, position[..., chunk], slopes, filled, dropout_p)
        if num_queries <= QUERY_CHUNK:
            chunks.append(_attend(*arguments))
        else:  # else the backward pass would hold the probabilities of all chunks, the whole square
            chunks.append(checkpoint(_attend, *arguments, use_reentrant=False))
    return torch.cat(chunks, dim=2)  # (sequences, heads, queries, head_dim)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, slopes: Tensor, filled: Tensor, dropout_p: float
) -> Tensor:
    """One chunk of queries: (sequences, heads, queries, head_dim)."""
    key = torch.arange(k.shape[2], device=q.device)
    distance = (position[..., None] - key).abs()  # (queries, keys), perhaps of each sequence
    bias = -slopes[:, None, None] * distance  # (heads, queries, keys) fp32
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


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """The rows of the table `weight` (words, hidden) at ids (tokens,) int64: (tokens, hidden)."""
    return F.embedding(ids, weight)


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
    eps: float,
    attention_dropout_p: float,
    hidden_dropout_p: float,
    stream: Tensor | None = None,
    memory: Tensor | None = None,
    queries: Queries | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The first half of a layer, self-attention. Post-LN where there is no residual stream:

        LayerNorm(dropout(attention(hidden Wqkv) Wdense) + hidden), None

    Pre-LN, where `hidden` is the stream's norm, which the half before has made:

        LayerNorm(s), s        with s = dropout(attention(hidden Wqkv) Wdense) + stream

    hidden, stream, and what is returned: (tokens, hidden). With `memory` (tokens, hidden) keys and values are
    made of it, and the others are (queries, hidden).
    """
    heads, width = slopes.shape[0], hidden.shape[1]
    if memory is None or queries is None:
        qkv = F.linear(hidden, weights.qkv_weight, weights.qkv_bias)
        qkv = qkv.unflatten(-1, (3, heads, -1))  # (tokens, 3, heads, head_dim)
        context = attention(qkv, slopes, cu_seqlens, max_seqlen, attention_dropout_p).flatten(1)
    else:
        q = F.linear(hidden, weights.qkv_weight[:width], weights.qkv_bias[:width])
        kv = F.linear(memory, weights.qkv_weight[width:], weights.qkv_bias[width:])
        q, kv = q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (2, heads, -1))
        context = attention_of_queries(
            q, kv, queries, slopes, cu_seqlens, max_seqlen, attention_dropout_p
        ).flatten(1)
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


class AdamW:
    """Decoupled AdamW in fp32 beside a model that computes in another precision: torch.optim.AdamW's.

    weights: the model's own, set to the rounded `masters` by each update; may be the masters themselves.
    rates: the learning rate of each step, (steps,). weight_decay: torch.optim.AdamW's, times the rate.
    Every tensor stays where it is, and nothing waits for the device, so an update can be captured.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        masters: Sequence[Tensor],
        rates: Sequence[float],
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.weights, self.masters = list(weights), list(masters)
        self.exp_avg = [torch.zeros_like(master) for master in masters]
        self.exp_avg_sq = [torch.zeros_like(master) for master in masters]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=masters[0].device)
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], step: Tensor) -> None:
        """One step. gradients: of the weights, in their dtype; step: (1,) int64, the steps done before."""
        wide = list(gradients)
        if self.weights[0].dtype != torch.float32:
            wide = [torch.empty_like(master) for master in self.masters]
            torch._foreach_copy_(wide, list(gradients))
        adamw(
            self.masters, wide, self.exp_avg, self.exp_avg_sq, [],
            list(step.float().repeat(len(wide)).unbind()),  # counted on by the call
            fused=True, amsgrad=False, maximize=False, lr=self._rates.index_select(0, step).squeeze(),
            beta1=self._betas[0], beta2=self._betas[1], eps=self._eps, weight_decay=self._weight_decay,
        )  # fmt: skip
        if self.weights[0] is not self.masters[0]:
            torch._foreach_copy_(self.weights, self.masters)

    def upload(self) -> None:
        """To be called after a capture of `update` and before its first replay."""
