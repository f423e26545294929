"""FlashAttention with symmetric ALiBi over unpadded sequences, bias from the slopes inside the kernel.

Within each sequence and head, with D(.) dropout's mask and scale and rowsum over the keys:

    S_ij = scale q_i k_j - slope |i - j|,   P = softmax(S),   O = D(P) V
    dV = D(P)^T dO,   dP = D(dO V^T),   dS = P (dP - rowsum(dO O)),   dQ = scale dS K,   dK = scale dS^T Q

Queries, keys and values are read where the projection wrote them, (tokens, 3, heads, head_dim), and their
gradients are written into one tensor of that shape. Of the scores only LSE_i = log2 sum_j 2^(S_ij log2 e) is
kept, (heads, tokens) fp32. Nothing is summed with atomics, so gradients have the same bits each time.

rowsum(dO O) takes O unrounded. From O in bf16 it is so far off that a query's dS no longer sums up to zero,
and dQ gets the difference times what its keys have in common: the more they and the values share, the worse,
1.3 times PyTorch's error with biases as large as the spread, and soon several times. So it is made of P where
P is at hand as a whole, and else the forward pass writes beside O what O `lost` in rounding.

- Up to 128 tokens a sequence one program owns a whole (sequence, head): the forward pass reads 3 rows of
  head_dim a token and writes 1, the backward pass computes dQ, dK and dV at once and reads 4, writes 3. At
  head_dim 64 that is memory-bound; what it takes is few instructions a score and several programs an SM.
- Longer sequences go by blocks of queries and keys (forward and dQ: a program owns queries and walks over
  keys; dK and dV: a program owns keys and walks over queries). So do packed subsets of the queries
  (`reference.Queries`) at all lengths: their rows say where each stands, all tokens are keys.

Scores are kept in base 2. A key that does not exist stands at position 1e30, so that the bias itself removes
it and no score is masked a second time. Rows behind cu_seqlens[-1] are written as zeros.
Sources: FlashAttention-2, https://arxiv.org/abs/2307.08691; ALiBi, https://arxiv.org/abs/2108.12409.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops.dropout_triton import draw_seed, drop_threshold, keep_mask, keep_scale
from mosaicbert_ds.ops.launches import (
    Launch,
    Rows,
    dkv_rows,
    dq_rows,
    fits,
    forward_rows,
    largest_that_fits,
    shared_memory_of,
)
from mosaicbert_ds.ops.reference import Queries

HEAD_DIMS = (16, 32, 64, 128)
ONE_TILE_LENGTH = 128
LOG2_E = 1.4426950408889634
# A slope of 0 times the position of a missing key would not remove it; this one does, and else is nothing.
SMALLEST_SLOPE = 1e-20

# Arguments that change from batch to batch and must not compile a kernel anew.
SHAPE = ["num_tokens", "num_queries", "num_sequences", "blocks", "heads"]

SUBSET_QUERIES = 64  # a block's, at most: of a sequence of 128 tokens some 20 to 40 are masked


# The fastest of those tried on an H200; `launches` takes smaller ones where these do not fit.
ONE_TILE_FORWARD = {
    16: Launch(16, 16, 1, 1),
    32: Launch(32, 32, 2, 1),
    64: Launch(64, 64, 4, 1),
    128: Launch(64, 128, 4, 1),
}
ONE_TILE_BACKWARD = {
    16: Launch(16, 16, 1, 1),
    32: Launch(32, 32, 2, 1),
    64: Launch(64, 64, 4, 1),
    128: Launch(128, 128, 8, 1),
}
# A thread's registers in the forward pass, at most: four programs an SM. The backward pass would only spill.
ONE_TILE_FORWARD_REGISTERS = 128
FORWARD = {
    16: Launch(128, 64, 4, 3),
    32: Launch(128, 64, 4, 3),
    64: Launch(128, 64, 4, 3),
    128: Launch(128, 64, 8, 2),
}
BACKWARD_DQ = {
    16: Launch(128, 64, 4, 3),
    32: Launch(128, 64, 4, 3),
    64: Launch(128, 64, 4, 3),
    128: Launch(128, 64, 8, 2),
}
BACKWARD_DKV = {
    16: Launch(64, 128, 4, 3),
    32: Launch(64, 128, 4, 3),
    64: Launch(32, 128, 4, 3),
    128: Launch(64, 128, 8, 2),
}


@triton.jit
def _bias(query, key, slope):
    """-slope |i - j| in base 2 between positions (fp32, broadcast against each other)."""
    return tl.abs(query - key) * (-slope)


@triton.jit
def _positions(index, length):
    """Positions as fp32, far away where there is no token."""
    return tl.where(index < length, index.to(tl.float32), 1e30)


@triton.jit
def _query_positions(query, rows, first_query, num_asked, first_token, SUBSET: tl.constexpr):
    """Of a sequence's queries, in fp32: all its tokens in order, or with SUBSET those at `rows`."""
    position = query
    if SUBSET:
        token = tl.load(rows + first_query + query, query < num_asked, other=0)
        position = (token - first_token).to(tl.int32)
    return position.to(tl.float32)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load_rows(base, row, stride, length, HEAD_DIM: tl.constexpr):
    """(rows, HEAD_DIM) of one head, zeros behind the sequence."""
    place = base + row[:, None].to(tl.int64) * stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(place, row[:, None] < length, other=0.0)


@triton.jit
def _store_rows(base, row, stride, length, values, HEAD_DIM: tl.constexpr):
    place = base + row[:, None].to(tl.int64) * stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(place, values.to(base.dtype.element_ty), row[:, None] < length)


@triton.jit
def _zero_tail(base, stride, tail, num_tokens, part, parts, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """This program's share of the rows that belong to no sequence: block `part` of every `parts` blocks."""
    for start in range(tail + part * ROWS, num_tokens, parts * ROWS):
        row = start + tl.arange(0, ROWS)
        _store_rows(base, row, stride, num_tokens, tl.zeros([ROWS, HEAD_DIM], tl.float32), HEAD_DIM)


@triton.jit
def _keep(
    seed, first_token, head, query_start, key_start, THRESHOLD: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Dropout's mask of a tile (M queries, N keys), a function of (seed, head, query's token, key)."""
    row = first_token + query_start + tl.arange(0, M)[:, None]
    octet = key_start // 8 + tl.arange(0, N // 8)[None, :]
    return keep_mask(tl.load(seed), row, octet, head, THRESHOLD, M, N)


@triton.jit(do_not_specialize=SHAPE)
def _attention_one_tile_forward(
    qkv, out, lse, slopes, cu_seqlens, seed, num_tokens, num_sequences, scale,
    stride_token, stride_part, stride_head,
    heads, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    slope = tl.maximum(tl.load(slopes + head) * 1.4426950408889634, 1e-20)
    index = tl.arange(0, N)

    base = qkv + first.to(tl.int64) * stride_token + head * stride_head
    k = _load_rows(base + stride_part, index, stride_token, length, HEAD_DIM)
    v = _load_rows(base + 2 * stride_part, index, stride_token, length, HEAD_DIM)
    position = _positions(index, length)
    stride_out = heads * HEAD_DIM
    target = out + head * HEAD_DIM
    # Queries by halves: fewer registers, so more programs an SM, and a short sequence skips the second half.
    for start in range(0, length, M):
        query = start + tl.arange(0, M)
        q = _load_rows(base, query, stride_token, length, HEAD_DIM)
        s = _dot(q, tl.trans(k)) * scale
        s += _bias(query.to(tl.float32)[:, None], position[None, :], slope)
        top = tl.max(s, axis=1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, axis=1)
        norm = 1.0 / total
        if THRESHOLD > 0:
            p = tl.where(_keep(seed, first, head, start, 0, THRESHOLD, M, N), p, 0.0)
            norm *= keep_scale(THRESHOLD)
        o = _dot(p.to(v.dtype), v) * norm[:, None]
        _store_rows(target + first.to(tl.int64) * stride_out, query, stride_out, length, o, HEAD_DIM)
        place = lse + head.to(tl.int64) * num_tokens + first + query
        tl.store(place, top + tl.log2(total), query < length)
    tail = tl.load(cu_seqlens + num_sequences)
    _zero_tail(target, stride_out, tail, num_tokens, sequence, num_sequences, N, HEAD_DIM)


@triton.jit(do_not_specialize=SHAPE)
def _attention_one_tile_backward(
    qkv, d_out, d_qkv, lse, slopes, cu_seqlens, seed, num_tokens, num_sequences, scale, softmax_scale,
    stride_token, stride_part, stride_head,
    heads, HEAD_DIM: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    sequence = tl.program_id(0) // heads
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    slope = tl.maximum(tl.load(slopes + head) * 1.4426950408889634, 1e-20)
    index = tl.arange(0, N)

    base = qkv + first.to(tl.int64) * stride_token + head * stride_head
    stride_out = heads * HEAD_DIM
    from_out = first.to(tl.int64) * stride_out + head * HEAD_DIM
    k = _load_rows(base + stride_part, index, stride_token, length, HEAD_DIM)
    q = _load_rows(base, index, stride_token, length, HEAD_DIM)
    d_o = _load_rows(d_out + from_out, index, stride_out, length, HEAD_DIM)
    v = _load_rows(base + 2 * stride_part, index, stride_token, length, HEAD_DIM)
    log_sum = tl.load(lse + head.to(tl.int64) * num_tokens + first + index, index < length, other=0.0)

    stride_grad = 3 * heads * HEAD_DIM
    target = d_qkv + head * HEAD_DIM
    here = target + first.to(tl.int64) * stride_grad
    position = _positions(index, length)
    s = _dot(q, tl.trans(k)) * scale + _bias(index.to(tl.float32)[:, None], position[None, :], slope)
    p = tl.exp2(s - log_sum[:, None])
    if THRESHOLD > 0:
        keep = _keep(seed, first, head, 0, 0, THRESHOLD, N, N)
        dropped = tl.where(keep, p * keep_scale(THRESHOLD), 0.0)
        d_v = _dot(tl.trans(dropped.to(d_o.dtype)), d_o)
    else:
        d_v = _dot(tl.trans(p.to(d_o.dtype)), d_o)
    _store_rows(here + 2 * heads * HEAD_DIM, index, stride_grad, length, d_v, HEAD_DIM)
    d_p = _dot(d_o, tl.trans(v))
    if THRESHOLD > 0:
        d_p = tl.where(keep, d_p * keep_scale(THRESHOLD), 0.0)
    delta = tl.sum(p * d_p, axis=1)  # rowsum(dO O)
    d_s = (p * (d_p - delta[:, None])).to(k.dtype)
    d_k = _dot(tl.trans(d_s), q) * softmax_scale
    _store_rows(here + heads * HEAD_DIM, index, stride_grad, length, d_k, HEAD_DIM)
    d_q = _dot(d_s, k) * softmax_scale
    _store_rows(here, index, stride_grad, length, d_q, HEAD_DIM)

    tail = tl.load(cu_seqlens + num_sequences)
    for part in tl.static_range(3):
        _zero_tail(
            target + part * heads * HEAD_DIM,
            stride_grad,
            tail,
            num_tokens,
            sequence,
            num_sequences,
            N,
            HEAD_DIM,
        )


@triton.jit(do_not_specialize=SHAPE)
def _attention_forward(
    queries, keys_values, out, lost, lse, slopes, cu_queries, cu_seqlens, rows, seed,
    num_queries, num_sequences, blocks, scale,
    stride_query, stride_token, stride_part, stride_head,
    heads, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
    SUBSET: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    sequence = tl.program_id(0) // (blocks * heads)
    stride_out = heads * HEAD_DIM
    tail = tl.load(cu_queries + num_sequences)
    part = sequence * blocks + block
    zeros = out + head * HEAD_DIM
    _zero_tail(zeros, stride_out, tail, num_queries, part, num_sequences * blocks, M, HEAD_DIM)

    first_query = tl.load(cu_queries + sequence)
    num_asked = tl.load(cu_queries + sequence + 1) - first_query
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if block * M < num_asked:
        slope = tl.maximum(tl.load(slopes + head) * 1.4426950408889634, 1e-20)
        base = keys_values + first.to(tl.int64) * stride_token + head * stride_head
        query = block * M + tl.arange(0, M)
        from_query = first_query.to(tl.int64) * stride_query + head * stride_head
        q = _load_rows(queries + from_query, query, stride_query, num_asked, HEAD_DIM)
        query_position = _query_positions(query, rows, first_query, num_asked, first, SUBSET)
        top = tl.full([M], float("-inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        o = tl.zeros([M, HEAD_DIM], tl.float32)
        for start in range(0, length, N):
            key = start + tl.arange(0, N)
            k = _load_rows(base, key, stride_token, length, HEAD_DIM)
            v = _load_rows(base + stride_part, key, stride_token, length, HEAD_DIM)
            position = _positions(key, length)
            s = _dot(q, tl.trans(k)) * scale
            s += _bias(query_position[:, None], position[None, :], slope)
            new_top = tl.maximum(top, tl.max(s, axis=1))
            p = tl.exp2(s - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            if THRESHOLD > 0:
                p = tl.where(_keep(seed, first_query, head, block * M, start, THRESHOLD, M, N), p, 0.0)
            o = o * shrink[:, None]
            o += _dot(p.to(v.dtype), v)
            top = new_top
        norm = 1.0 / total
        if THRESHOLD > 0:
            norm *= keep_scale(THRESHOLD)
        o = o * norm[:, None]
        to_out = first_query.to(tl.int64) * stride_out + head * HEAD_DIM
        _store_rows(out + to_out, query, stride_out, num_asked, o, HEAD_DIM)
        if lost is not None:
            o -= o.to(out.dtype.element_ty).to(tl.float32)
            _store_rows(lost + to_out, query, stride_out, num_asked, o, HEAD_DIM)
        place = lse + head.to(tl.int64) * num_queries + first_query + query
        tl.store(place, top + tl.log2(total), query < num_asked)


@triton.jit(do_not_specialize=SHAPE)
def _attention_backward_dq(
    queries, keys_values, out, lost, d_out, d_queries, lse, delta_out, slopes, cu_queries, cu_seqlens, rows,
    seed, num_queries, num_sequences, blocks, scale, softmax_scale,
    stride_query, stride_token, stride_part, stride_head, stride_grad,
    heads, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
    SUBSET: tl.constexpr,
):  # fmt: skip
    """dQ, and rowsum(dO O) for the kernel that follows."""
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    sequence = tl.program_id(0) // (blocks * heads)
    target = d_queries + head * HEAD_DIM
    tail = tl.load(cu_queries + num_sequences)
    part = sequence * blocks + block
    _zero_tail(target, stride_grad, tail, num_queries, part, num_sequences * blocks, M, HEAD_DIM)

    first_query = tl.load(cu_queries + sequence)
    num_asked = tl.load(cu_queries + sequence + 1) - first_query
    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    if block * M < num_asked:
        slope = tl.maximum(tl.load(slopes + head) * 1.4426950408889634, 1e-20)
        base = keys_values + first.to(tl.int64) * stride_token + head * stride_head
        stride_out = heads * HEAD_DIM
        from_out = first_query.to(tl.int64) * stride_out + head * HEAD_DIM
        query = block * M + tl.arange(0, M)
        from_query = first_query.to(tl.int64) * stride_query + head * stride_head
        q = _load_rows(queries + from_query, query, stride_query, num_asked, HEAD_DIM)
        query_position = _query_positions(query, rows, first_query, num_asked, first, SUBSET)
        d_o = _load_rows(d_out + from_out, query, stride_out, num_asked, HEAD_DIM)
        o = _load_rows(out + from_out, query, stride_out, num_asked, HEAD_DIM).to(tl.float32)
        if lost is not None:
            o += _load_rows(lost + from_out, query, stride_out, num_asked, HEAD_DIM).to(tl.float32)
        delta = tl.sum(o * d_o.to(tl.float32), axis=1)
        place = head.to(tl.int64) * num_queries + first_query + query
        tl.store(delta_out + place, delta, query < num_asked)
        log_sum = tl.load(lse + place, query < num_asked, other=0.0)
        d_q = tl.zeros([M, HEAD_DIM], tl.float32)
        for start in range(0, length, N):
            key = start + tl.arange(0, N)
            k = _load_rows(base, key, stride_token, length, HEAD_DIM)
            v = _load_rows(base + stride_part, key, stride_token, length, HEAD_DIM)
            position = _positions(key, length)
            s = _dot(q, tl.trans(k)) * scale
            s += _bias(query_position[:, None], position[None, :], slope)
            p = tl.exp2(s - log_sum[:, None])
            d_p = _dot(d_o, tl.trans(v))
            if THRESHOLD > 0:
                keep = _keep(seed, first_query, head, block * M, start, THRESHOLD, M, N)
                d_p = tl.where(keep, d_p * keep_scale(THRESHOLD), 0.0)
            d_s = p * (d_p - delta[:, None])
            d_q += _dot(d_s.to(k.dtype), k)
        here = target + first_query.to(tl.int64) * stride_grad
        _store_rows(here, query, stride_grad, num_asked, d_q * softmax_scale, HEAD_DIM)


@triton.jit(do_not_specialize=SHAPE)
def _attention_backward_dkv(
    queries, keys_values, d_out, d_keys_values, lse, delta_in, slopes, cu_queries, cu_seqlens, rows, seed,
    num_queries, num_tokens, num_sequences, blocks, scale, softmax_scale,
    stride_query, stride_token, stride_part, stride_head, stride_grad,
    heads, HEAD_DIM: tl.constexpr, M: tl.constexpr, N: tl.constexpr, THRESHOLD: tl.constexpr,
    SUBSET: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    head = (tl.program_id(0) // blocks) % heads
    sequence = tl.program_id(0) // (blocks * heads)
    part_grad = heads * HEAD_DIM
    target = d_keys_values + head * HEAD_DIM
    tail = tl.load(cu_seqlens + num_sequences)
    part = sequence * blocks + block
    _zero_tail(target, stride_grad, tail, num_tokens, part, num_sequences * blocks, N, HEAD_DIM)
    _zero_tail(target + part_grad, stride_grad, tail, num_tokens, part, num_sequences * blocks, N, HEAD_DIM)

    first = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - first
    first_query = tl.load(cu_queries + sequence)
    num_asked = tl.load(cu_queries + sequence + 1) - first_query
    if block * N < length:
        slope = tl.maximum(tl.load(slopes + head) * 1.4426950408889634, 1e-20)
        base = keys_values + first.to(tl.int64) * stride_token + head * stride_head
        from_query = first_query.to(tl.int64) * stride_query + head * stride_head
        stride_out = heads * HEAD_DIM
        from_out = first_query.to(tl.int64) * stride_out + head * HEAD_DIM
        key = block * N + tl.arange(0, N)
        position = _positions(key, length)
        k = _load_rows(base, key, stride_token, length, HEAD_DIM)
        v = _load_rows(base + stride_part, key, stride_token, length, HEAD_DIM)
        d_k = tl.zeros([N, HEAD_DIM], tl.float32)
        d_v = tl.zeros([N, HEAD_DIM], tl.float32)
        for start in range(0, num_asked, M):
            query = start + tl.arange(0, M)
            q = _load_rows(queries + from_query, query, stride_query, num_asked, HEAD_DIM)
            d_o = _load_rows(d_out + from_out, query, stride_out, num_asked, HEAD_DIM)
            place = head.to(tl.int64) * num_queries + first_query + query
            log_sum = tl.load(lse + place, query < num_asked, other=0.0)
            delta = tl.load(delta_in + place, query < num_asked, other=0.0)
            query_position = _query_positions(query, rows, first_query, num_asked, first, SUBSET)
            s = _dot(k, tl.trans(q)) * scale
            s += _bias(query_position[None, :], position[:, None], slope)
            p = tl.exp2(s - log_sum[None, :])
            d_p = _dot(v, tl.trans(d_o))
            if THRESHOLD > 0:
                keep = tl.trans(_keep(seed, first_query, head, start, block * N, THRESHOLD, M, N))
                d_v += _dot(tl.where(keep, p * keep_scale(THRESHOLD), 0.0).to(d_o.dtype), d_o)
                d_p = tl.where(keep, d_p * keep_scale(THRESHOLD), 0.0)
            else:
                d_v += _dot(p.to(d_o.dtype), d_o)
            d_s = p * (d_p - delta[None, :])
            d_k += _dot(d_s.to(q.dtype), q)
        here = target + first.to(tl.int64) * stride_grad
        _store_rows(here, key, stride_grad, length, d_k * softmax_scale, HEAD_DIM)
        _store_rows(here + part_grad, key, stride_grad, length, d_v, HEAD_DIM)


def _one_tile(max_seqlen: int, qkv: Tensor) -> tuple[Launch, Launch] | None:
    """The launches forward and backward where a whole sequence makes one tile, and both tiles fit on chip."""
    if max_seqlen > ONE_TILE_LENGTH:
        return None
    keys = max(16, triton.next_power_of_2(max_seqlen))
    forward, backward = ONE_TILE_FORWARD[keys], ONE_TILE_BACKWARD[keys]
    limits = (qkv.shape[-1], qkv.itemsize, shared_memory_of(qkv.device))
    both_fit = fits(forward, forward_rows, *limits) and fits(backward, dq_rows, *limits)
    return (forward, backward) if both_fit else None


def _new_lost(out: Tensor) -> Tensor:
    """Room for what `out` loses in rounding, of no elements in fp32, which loses nothing."""
    return out.new_empty(out.shape if out.itemsize < 4 else 0)


def _by_blocks(launches: dict[int, Launch], rows: Rows, q: Tensor, subset: Queries | None) -> Launch:
    launch = largest_that_fits(
        launches[q.shape[-1]], rows, q.shape[-1], q.itemsize, shared_memory_of(q.device)
    )
    return launch if subset is None else launch._replace(queries=min(launch.queries, SUBSET_QUERIES))


@torch.library.custom_op("mosaicbert_ds::attention", mutates_args=())
def attention_forward(
    qkv: Tensor, slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out (tokens, heads, head_dim), what it lost in rounding (as out, or of no elements where the backward
    pass does not need it) and log2-sum-exp (heads, tokens) fp32."""
    num_tokens, _, heads, head_dim = qkv.shape
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    out = torch.empty(num_tokens, heads, head_dim, device=qkv.device, dtype=qkv.dtype)
    lse = torch.empty(heads, num_tokens, device=qkv.device, dtype=torch.float32)
    launches = _one_tile(max_seqlen, qkv)
    lost = out.new_empty(0) if launches else _new_lost(out)
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences == 0 or max_seqlen == 0:
        return out.zero_(), lost, lse
    scale = head_dim**-0.5 * LOG2_E
    threshold = drop_threshold(dropout_p)
    arguments = (qkv, out, lse, slopes, cu_seqlens, seed, num_tokens, num_sequences)
    if launches:
        launch, _ = launches
        capped = launch.keys == ONE_TILE_LENGTH and head_dim <= 64
        _attention_one_tile_forward[(num_sequences * heads,)](
            *arguments, scale, *qkv.stride()[:3],
            heads, head_dim, launch.queries, launch.keys, threshold,
            num_warps=launch.warps, num_stages=launch.stages,
            maxnreg=ONE_TILE_FORWARD_REGISTERS if capped else None,
        )  # fmt: skip
        return out, lost, lse
    _forward_by_blocks(
        qkv[:, 0], qkv[:, 1:], None, out, lost, lse, slopes, cu_seqlens, max_seqlen, seed, dropout_p
    )
    return out, lost, lse


def _forward_by_blocks(
    q: Tensor, kv: Tensor, subset: Queries | None, out: Tensor, lost: Tensor, lse: Tensor, slopes: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None, dropout_p: float,
) -> None:  # fmt: skip
    """Write `out`, `lost` and `lse` of q (queries, heads, head_dim), all tokens' or a subset's, over kv
    (tokens, 2, heads, head_dim)."""
    num_queries, heads, head_dim = q.shape
    num_sequences = cu_seqlens.shape[0] - 1
    launch = _by_blocks(FORWARD, forward_rows, q, subset)
    blocks = triton.cdiv(max_seqlen, launch.queries)
    cu_queries, rows = (cu_seqlens, None) if subset is None else (subset.cu_seqlens, subset.rows)
    _attention_forward[(blocks * heads * num_sequences,)](
        q, kv, out, lost if lost.numel() else None, lse, slopes, cu_queries, cu_seqlens, rows, seed,
        num_queries, num_sequences, blocks, head_dim**-0.5 * LOG2_E, q.stride(0), *kv.stride()[:3],
        heads, head_dim, launch.queries, launch.keys, drop_threshold(dropout_p), subset is not None,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def _backward_by_blocks(
    q: Tensor, kv: Tensor, subset: Queries | None, out: Tensor, lost: Tensor, d_out: Tensor, d_q: Tensor,
    d_kv: Tensor, lse: Tensor, slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None,
    dropout_p: float,
) -> None:  # fmt: skip
    """Write the gradients `d_q` and `d_kv`, of the shapes of q and kv."""
    num_queries, heads, head_dim = q.shape
    num_sequences = cu_seqlens.shape[0] - 1
    softmax_scale = head_dim**-0.5
    scales = (softmax_scale * LOG2_E, softmax_scale)
    strides = (q.stride(0), *kv.stride()[:3])
    delta = torch.empty_like(lse)
    cu_queries, rows = (cu_seqlens, None) if subset is None else (subset.cu_seqlens, subset.rows)
    launch = _by_blocks(BACKWARD_DQ, dq_rows, q, subset)
    blocks = triton.cdiv(max_seqlen, launch.queries)
    _attention_backward_dq[(blocks * heads * num_sequences,)](
        q, kv, out, lost if lost.numel() else None, d_out, d_q, lse, delta, slopes, cu_queries, cu_seqlens,
        rows, seed, num_queries, num_sequences, blocks, *scales, *strides, d_q.stride(0),
        heads, head_dim, launch.queries, launch.keys, drop_threshold(dropout_p), subset is not None,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    launch = _by_blocks(BACKWARD_DKV, dkv_rows, q, subset)
    blocks = triton.cdiv(max_seqlen, launch.keys)
    _attention_backward_dkv[(blocks * heads * num_sequences,)](
        q, kv, d_out, d_kv, lse, delta, slopes, cu_queries, cu_seqlens, rows, seed,
        num_queries, kv.shape[0], num_sequences, blocks, *scales, *strides, d_kv.stride(0),
        heads, head_dim, launch.queries, launch.keys, drop_threshold(dropout_p), subset is not None,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip


def queries_forward(
    q: Tensor, kv: Tensor, subset: Queries, slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attention_forward` of contiguous q (queries, heads, head_dim) over kv (tokens, 2, heads, head_dim)."""
    out = torch.empty_like(q)
    lost = _new_lost(out)
    lse = torch.empty(q.shape[1], q.shape[0], device=q.device, dtype=torch.float32)
    if cu_seqlens.shape[0] == 1 or max_seqlen == 0:
        return out.zero_(), lost, lse
    _forward_by_blocks(q, kv, subset, out, lost, lse, slopes, cu_seqlens, max_seqlen, seed, dropout_p)
    return out, lost, lse


def queries_backward(
    q: Tensor, kv: Tensor, subset: Queries, out: Tensor, lost: Tensor, d_out: Tensor, lse: Tensor,
    slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q and kv."""
    d_q, d_kv = torch.empty_like(q), torch.empty_like(kv)
    if cu_seqlens.shape[0] == 1 or max_seqlen == 0:
        return d_q.zero_(), d_kv.zero_()
    _backward_by_blocks(
        q, kv, subset, out, lost, d_out.contiguous(), d_q, d_kv, lse, slopes, cu_seqlens, max_seqlen, seed,
        dropout_p,
    )  # fmt: skip
    return d_q, d_kv


@torch.library.custom_op("mosaicbert_ds::attention_backward", mutates_args=())
def attention_backward(
    qkv: Tensor, out: Tensor, lost: Tensor, d_out: Tensor, lse: Tensor, slopes: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, seed: Tensor | None, dropout_p: float,
) -> Tensor:  # fmt: skip
    num_tokens, _, heads, head_dim = qkv.shape
    qkv = qkv if qkv.stride(3) == 1 else qkv.contiguous()
    out, d_out = out.contiguous(), d_out.contiguous()
    d_qkv = torch.empty(num_tokens, 3, heads, head_dim, device=qkv.device, dtype=qkv.dtype)
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences == 0 or max_seqlen == 0:
        return d_qkv.zero_()
    softmax_scale = head_dim**-0.5
    scale = softmax_scale * LOG2_E
    threshold = drop_threshold(dropout_p)
    launches = _one_tile(max_seqlen, qkv)
    if launches:
        _, launch = launches
        _attention_one_tile_backward[(num_sequences * heads,)](
            qkv, d_out, d_qkv, lse, slopes, cu_seqlens, seed, num_tokens, num_sequences,
            scale, softmax_scale, *qkv.stride()[:3],
            heads, head_dim, launch.keys, threshold, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        return d_qkv
    _backward_by_blocks(
        qkv[:, 0], qkv[:, 1:], None, out, lost, d_out, d_qkv[:, 0], d_qkv[:, 1:], lse, slopes, cu_seqlens,
        max_seqlen, seed, dropout_p,
    )  # fmt: skip
    return d_qkv


@attention_forward.register_fake
def _(qkv, slopes, cu_seqlens, max_seqlen, seed, dropout_p):
    num_tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(num_tokens, heads, head_dim)
    # int: the compiler may trace a length of any size, and the kind of launch hangs on it.
    lost = out.new_empty(0) if _one_tile(int(max_seqlen), qkv) else _new_lost(out)
    return out, lost, qkv.new_empty(heads, num_tokens, dtype=torch.float32)


@attention_backward.register_fake
def _(qkv, out, lost, d_out, lse, slopes, cu_seqlens, max_seqlen, seed, dropout_p):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, slopes, cu_seqlens, ctx.max_seqlen, seed, ctx.dropout_p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, slopes, cu_seqlens, seed)


def _backward(ctx, d_out, d_lost, d_lse):
    qkv, out, lost, lse, slopes, cu_seqlens, seed = ctx.saved_tensors
    d_qkv = attention_backward(
        qkv, out, lost, d_out, lse, slopes, cu_seqlens, ctx.max_seqlen, seed, ctx.dropout_p
    )
    return d_qkv, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save)


def attention(
    qkv: Tensor, slopes: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0
) -> Tensor:
    """(tokens, 3, heads, head_dim) -> (tokens, heads, head_dim); `reference.attention` defines it."""
    seed = draw_seed(qkv.device) if drop_threshold(dropout_p) else None
    return attention_forward(qkv, slopes, cu_seqlens, max_seqlen, seed, dropout_p)[0]
