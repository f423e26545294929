"""Each operation of the hot path alone: our kernels, PyTorch eager and compiled, FlexAttention, the floor.

The floor is the time that the bytes an operation must move take at the copy bandwidth, or its floating-point
operations at the rate of a large matrix product, whichever is longer; both are measured in the same run.
Times are medians over replays of a CUDA graph after a warm-up, at the sizes of MosaicBERT-Base.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mosaicbert_ds.bench.machine import Machine, measure_machine, median_replay_ms, need_gpu
from mosaicbert_ds.bench.report import Report, column
from mosaicbert_ds.bench.workload import lengths_like_c4
from mosaicbert_ds.ops import (
    IGNORED_LABEL,
    AttentionWeights,
    MLPWeights,
    alibi_slopes,
    choose_kernels,
    reference,
)

TOKENS = 57_600  # 512 rows of 128 with the length mix of C4, fill 0.88
HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 12, 64, 768, 3072, 30_528
MASKED = TOKENS * 3 // 10
DROPOUT_P, LAYER_NORM_EPS = 0.1, 1e-12


@dataclass(frozen=True)
class Row:
    operation: str = column("operation")
    implementation: str = column("implementation")
    forward_ms: float | None = column("forward ms", ".3f", None)
    both_ms: float | None = column("both ms", ".3f", None)  # forward and backward
    floor_ms: float | None = column("floor ms", ".3f", None)  # of both
    over_floor: float | None = column("x floor", ".2f", None)
    over_ours: float | None = column("x ours", ".2f", None)
    note: str = column("", default="")


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16().requires_grad_()


class _Bench:
    """Collects rows; a callable takes the inputs and returns the output whose gradient is then taken."""

    def __init__(self, machine: Machine) -> None:
        assert machine.copy_bytes_per_s and machine.matmul_flops_per_s
        self.bytes_per_s, self.flops_per_s = machine.copy_bytes_per_s, machine.matmul_flops_per_s
        self.rows: list[Row] = []

    def add(
        self, operation: str, inputs: list[Tensor], num_bytes: float, flops: float, **functions: Callable
    ) -> None:
        """Time `functions`, ours first, each forward alone and with its backward."""
        floor_ms = 1e3 * max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)
        ours_ms: float | None = None
        for name, function in functions.items():
            try:
                forward_ms, both_ms = _time(function, inputs)
            except RuntimeError as error:  # out of memory, or the compiler's
                if ours_ms is None:
                    raise
                row = Row(operation, name, note=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
            else:
                ours_ms = ours_ms or both_ms
                over_floor, over_ours = both_ms / floor_ms, both_ms / ours_ms
                row = Row(operation, name, forward_ms, both_ms, floor_ms, over_floor, over_ours)
            said = row.note or f"{row.both_ms:.3f} ms forward and backward"
            print(f"{operation}, {name}: {said}", file=sys.stderr, flush=True)
            self.rows.append(row)
        torch.compiler.reset()
        torch.cuda.empty_cache()  # the graphs' memory pools


def _time(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass alone and with the backward pass."""
    with torch.no_grad():
        gradient = torch.randn_like(function(*inputs))

    def both() -> None:
        torch.autograd.grad(function(*inputs), inputs, gradient)

    return median_replay_ms(partial(function, *inputs)), median_replay_ms(both)


def _flex(cu_seqlens: Tensor, num_tokens: int, slopes: Tensor) -> Callable[[Tensor], Tensor]:
    """FlexAttention with the same bias and a document mask over the unpadded tokens."""
    place = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens, place, right=True)

    def same_document(batch, head, query, key):
        return document[query] == document[key]

    def bias(score, batch, head, query, key):
        return score - slopes[head] * (query - key).abs()

    @functools.cache  # made by the first call, which is not the one that is timed
    def mask() -> BlockMask:
        return torch.compile(create_block_mask)(
            same_document, None, None, num_tokens, num_tokens, device="cuda"
        )

    compiled = torch.compile(flex_attention)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # each (1, heads, tokens, head_dim)
        return compiled(q, k, v, score_mod=bias, block_mask=mask())[0].transpose(0, 1)

    return attend


def bench_kernels() -> Report:
    """All operations. Raises ConfigError where the kernels cannot run."""
    need_gpu("kernels")
    choose_kernels("triton")
    from mosaicbert_ds.ops import (
        attention_triton,
        blocks_triton,
        dropout_layernorm_triton,
        geglu_triton,
        masked_lm_loss_triton,
    )

    torch.manual_seed(0)
    machine = measure_machine()
    bench = _Bench(machine)
    slopes = alibi_slopes(HEADS, "cuda")
    cases = {"128": lengths_like_c4(), "512": [512] * 128, "2048": [2048] * 32}
    for name, lengths in cases.items():
        tokens, longest = sum(lengths), max(lengths)
        cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
        row_bytes = 2 * HEADS * HEAD_DIM * tokens
        # forward: 3 rows in, 1 out, two products; backward: 4 rows in, 3 out, five products
        products = 2 * HEADS * HEAD_DIM * sum(n * n for n in lengths)

        def fused_attention(qkv: Tensor, cu_seqlens: Tensor = cu_seqlens, longest: int = longest) -> Tensor:
            return attention_triton.attention(qkv, slopes, cu_seqlens, longest)

        def plain_attention(qkv: Tensor, cu_seqlens: Tensor = cu_seqlens, longest: int = longest) -> Tensor:
            return reference.attention(qkv, slopes, cu_seqlens, longest)

        attend: dict[str, Callable] = {"triton": fused_attention, "flex": _flex(cu_seqlens, tokens, slopes)}
        if longest <= 512:
            attend |= {"torch": plain_attention, "compiled": torch.compile(plain_attention)}
        qkv = [_normal(tokens, 3, HEADS, HEAD_DIM)]
        bench.add(f"attention, length {name}", qkv, 11 * row_bytes, 7 * products, **attend)

    def fused_geglu(gate_value: Tensor) -> Tensor:
        return geglu_triton.geglu(gate_value, DROPOUT_P)

    def plain_geglu(gate_value: Tensor) -> Tensor:
        return reference.geglu(gate_value, DROPOUT_P)

    # bytes an element of the intermediate: forward 4 in, 2 out; backward 6 in, 4 out. Ours puts out 2 more in
    # the backward pass, its output once again, which the MLP block below then need not keep.
    bench.add(
        "GeGLU + dropout", [_normal(TOKENS, 2 * INTERMEDIATE)], 16 * TOKENS * INTERMEDIATE, 0,
        triton=fused_geglu, torch=plain_geglu, compiled=torch.compile(plain_geglu),
    )  # fmt: skip

    for dropout_p in (DROPOUT_P, 0.0):

        def fused_norm(x, x_bias, residual, weight, bias, p=dropout_p):
            return dropout_layernorm_triton.dropout_add_layer_norm(
                x, x_bias, residual, weight, bias, LAYER_NORM_EPS, p
            )

        def plain_norm(x, x_bias, residual, weight, bias, p=dropout_p):
            return reference.dropout_add_layer_norm(x, x_bias, residual, weight, bias, LAYER_NORM_EPS, p)

        rows, vectors = [_normal(TOKENS, HIDDEN) for _ in "xr"], [_normal(HIDDEN) for _ in "bwo"]
        num_bytes = (16 if dropout_p else 14) * TOKENS * HIDDEN
        bench.add(
            f"bias + dropout {dropout_p} + residual + LayerNorm",
            [rows[0], vectors[0], rows[1], *vectors[1:]], num_bytes, 0,
            triton=fused_norm, torch=plain_norm, compiled=torch.compile(plain_norm),
        )  # fmt: skip

    # The halves of a layer as training calls them, with their products.
    lengths = cases["128"]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    tokens = sum(lengths)

    def attention_half(block: Callable) -> Callable[..., Tensor]:
        def half(hidden: Tensor, *weights: Tensor) -> Tensor:
            named = AttentionWeights(*weights)
            return block(hidden, named, slopes, cu_seqlens, 128, LAYER_NORM_EPS, 0.0, DROPOUT_P)[0]

        return half

    def mlp_half(block: Callable) -> Callable[..., Tensor]:
        return lambda hidden, *weights: block(hidden, MLPWeights(*weights), LAYER_NORM_EPS, DROPOUT_P)[0]

    halves = {
        "attention block, length 128": (
            attention_half, "attention_block",
            [(3 * HIDDEN, HIDDEN), (3 * HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (HIDDEN,), (HIDDEN,)],
            6 * tokens * 4 * HIDDEN**2 + 14 * HIDDEN * sum(n * n for n in lengths),
        ),
        "MLP block": (
            mlp_half, "mlp_block",
            [(2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE), (HIDDEN,), (HIDDEN,), (HIDDEN,)],
            6 * tokens * 3 * HIDDEN * INTERMEDIATE,
        ),
    }  # fmt: skip
    for name, (half, block, shapes, flops) in halves.items():
        fused, plain = half(getattr(blocks_triton, block)), half(getattr(reference, block))
        inputs = [_normal(tokens, HIDDEN), *(_normal(*shape, scale=0.02) for shape in shapes)]
        bench.add(name, inputs, 0, flops, triton=fused, torch=plain, compiled=torch.compile(plain))

    labels = torch.randint(VOCAB, (MASKED,), device="cuda")
    labels[::100] = IGNORED_LABEL

    def fused_loss(hidden, weight, bias):
        return masked_lm_loss_triton.masked_lm_loss(hidden, weight, bias, labels)[0]

    def plain_loss(hidden, weight, bias):
        return reference.masked_lm_loss(hidden, weight, bias, labels)[0]

    inputs = [_normal(MASKED, HIDDEN), _normal(VOCAB, HIDDEN, scale=0.02), _normal(VOCAB)]
    bench.add(
        "masked-LM loss with its products", inputs, 0, 6 * MASKED * HIDDEN * VOCAB,
        triton=fused_loss, torch=plain_loss, compiled=torch.compile(plain_loss),
    )  # fmt: skip
    return Report(machine, bench.rows)
