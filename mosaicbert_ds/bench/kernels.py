"""Each operation of the hot path alone: our kernels, PyTorch eager and compiled, FlexAttention, the floor.

    python -m mosaicbert_ds.bench.kernels [--json]

The floor is the time that the bytes an operation must move take at the copy bandwidth, or its floating-point
operations at the rate of a large matrix product, whichever is longer; both are measured in the same run.
Times are medians over replays of a CUDA graph after a warm-up, at the sizes of MosaicBERT-Base.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.ops import IGNORED_LABEL, alibi_slopes, choose_kernels, reference

TOKENS = 57_600  # 512 rows of 128 with the length mix of C4, fill 0.88
HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, VOCAB = 12, 64, 768, 3072, 30_528
MASKED = TOKENS * 3 // 10
DROPOUT_P = 0.1
WARM_UP, REPEATS = 5, 20


@dataclass(frozen=True)
class Row:
    operation: str
    implementation: str
    forward_ms: float
    both_ms: float  # forward and backward
    floor_ms: float  # of both


@dataclass(frozen=True)
class Machine:
    gpu: str
    torch: str
    triton: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float


def median_ms(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU in milliseconds."""
    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def median_replay_ms(function: Callable[[], object]) -> float:
    """The same from a CUDA graph: without the launches, which a captured step does not pay either."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay)


def measure_machine() -> Machine:
    import triton

    source = torch.randn(2**29, device="cuda")  # 2 GiB
    target = torch.empty_like(source)
    copy_s = median_ms(lambda: target.copy_(source)) / 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul_s = median_ms(lambda: a @ b) / 1e3
    return Machine(
        torch.cuda.get_device_name(),
        torch.__version__,
        triton.__version__,
        2 * source.nbytes / copy_s,
        2 * 8192**3 / matmul_s,
    )


def lengths_like_c4(num_sequences: int = 512) -> list[int]:
    """Three of four rows are cut at 128 tokens, the others end uniformly between 16 and 127."""
    generator = torch.Generator().manual_seed(0)
    short = torch.randint(16, 128, (num_sequences,), generator=generator)
    is_short = torch.rand(num_sequences, generator=generator) < 0.25
    return torch.where(is_short, short, 128).tolist()


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16().requires_grad_()


class _Bench:
    """Collects rows; a callable takes the inputs and returns the output whose gradient is then taken."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.rows: list[Row] = []

    def add(
        self, operation: str, inputs: list[Tensor], num_bytes: float, flops: float, **functions: Callable
    ) -> None:
        floor_s = max(num_bytes / self.machine.copy_bytes_per_s, flops / self.machine.matmul_flops_per_s)
        for name, function in functions.items():
            with torch.no_grad():
                gradient = torch.randn_like(function(*inputs))
            forward_ms = median_replay_ms(partial(function, *inputs))

            def both(f: Callable = function, g: Tensor = gradient) -> None:
                torch.autograd.grad(f(*inputs), inputs, g)

            self.rows.append(Row(operation, name, forward_ms, median_replay_ms(both), floor_s * 1e3))
        torch.compiler.reset()


def _flex(cu_seqlens: Tensor, num_tokens: int, slopes: Tensor) -> Callable[[Tensor], Tensor]:
    """FlexAttention with the same bias and a document mask over the unpadded tokens."""
    place = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens, place, right=True)

    def same_document(batch, head, query, key):
        return document[query] == document[key]

    def bias(score, batch, head, query, key):
        return score - slopes[head] * (query - key).abs()

    mask = torch.compile(create_block_mask)(same_document, None, None, num_tokens, num_tokens, device="cuda")
    compiled = torch.compile(flex_attention)

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # each (1, heads, tokens, head_dim)
        return compiled(q, k, v, score_mod=bias, block_mask=mask)[0].transpose(0, 1)

    return attend


def bench_kernels() -> tuple[Machine, list[Row]]:
    """All operations. Raises ConfigError where the kernels cannot run."""
    choose_kernels("triton")
    from mosaicbert_ds.ops import (
        attention_triton,
        dropout_layernorm_triton,
        geglu_triton,
        masked_lm_loss_triton,
    )

    torch.manual_seed(0)
    bench = _Bench(measure_machine())
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

    # bytes an element of the intermediate: forward 4 in, 2 out; backward 6 in, 4 out
    bench.add(
        "GeGLU + dropout", [_normal(TOKENS, 2 * INTERMEDIATE)], 16 * TOKENS * INTERMEDIATE, 0,
        triton=fused_geglu, torch=plain_geglu, compiled=torch.compile(plain_geglu),
    )  # fmt: skip

    for dropout_p in (DROPOUT_P, 0.0):

        def fused_norm(x, residual, weight, bias, p=dropout_p):
            return dropout_layernorm_triton.dropout_add_layer_norm(x, residual, weight, bias, 1e-12, p)

        def plain_norm(x, residual, weight, bias, p=dropout_p):
            return reference.dropout_add_layer_norm(x, residual, weight, bias, 1e-12, p)

        inputs = [_normal(TOKENS, HIDDEN), _normal(TOKENS, HIDDEN), _normal(HIDDEN), _normal(HIDDEN)]
        num_bytes = (16 if dropout_p else 14) * TOKENS * HIDDEN
        bench.add(
            f"dropout {dropout_p} + residual + LayerNorm", inputs, num_bytes, 0,
            triton=fused_norm, torch=plain_norm, compiled=torch.compile(plain_norm),
        )  # fmt: skip

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
    return bench.machine, bench.rows


def table(machine: Machine, rows: list[Row]) -> str:
    lines = [
        f"{machine.gpu}, PyTorch {machine.torch}, Triton {machine.triton}; "
        f"copy {machine.copy_bytes_per_s / 1e12:.2f} TB/s, "
        f"8192^3 product {machine.matmul_flops_per_s / 1e12:.0f} TFLOP/s",
        "",
        f"{'operation':<40}{'':<10}{'forward ms':>11}{'both ms':>9}{'floor ms':>9}"
        f"{'x floor':>8}{'x ours':>8}",
    ]
    ours = {row.operation: row.both_ms for row in rows if row.implementation == "triton"}
    lines += [
        f"{row.operation:<40}{row.implementation:<10}{row.forward_ms:>11.3f}{row.both_ms:>9.3f}"
        f"{row.floor_ms:>9.3f}{row.both_ms / row.floor_ms:>8.2f}{row.both_ms / ours[row.operation]:>8.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    try:
        machine, rows = bench_kernels()
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    if arguments.json:
        print(json.dumps({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(table(machine, rows))


if __name__ == "__main__":
    main()
