"""What the matrix products of MosaicBERT alone allow: each timed by itself, and their sum.

A linear layer y (m, n) = x (m, k) w^T has three products in a training step, all of 2 m n k operations:
itself, the gradient of its input (m, k) and that of its weight (n, k).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from mosaicbert_ds.bench.machine import measure_machine, median_replay_ms, need_gpu
from mosaicbert_ds.bench.report import Report, column
from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import ModelConfig

FILL = 0.88  # real tokens of a padded batch with the length mix of C4, the mean of several
_ROUND_TO = 64  # rows that are masked, as a shape that a step would have


@dataclass(frozen=True)
class Product:
    """`count` products (m, k) x (k, n) in the forward and backward of one micro batch."""

    layer: str = column("layer")
    direction: str = column("product")  # forward, input gradient, weight gradient
    m: int = column("m", ",d")
    n: int = column("n", ",d")
    k: int = column("k", ",d")
    count: int = column("times", "d")

    @property
    def flops(self) -> int:
        """Of all `count`."""
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class Row(Product):
    ms: float = column("ms each", ".3f")
    total_ms: float = column("ms", ".2f")
    tflops_per_s: float = column("TFLOP/s", ".0f")


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a step could do if it were these products and nothing else."""

    tokens: int = column("tokens", ",d")
    masked: int = column("masked", ",d")
    total_ms: float = column("ms", ".2f")
    tflops_per_s: float = column("TFLOP/s", ".0f")
    tokens_per_s: float = column("tokens/s", ",.0f")
    samples_per_s: float = column(f"samples/s at fill {FILL}", ",.0f")


def products_of(model: ModelConfig, tokens: int, masked: int) -> list[Product]:
    """All products of a micro batch of `tokens` unpadded tokens, `masked` of them targets.

    The head sees the targets alone, and so do `masked_only_layers`, one at least, but for keys and values.
    Raises ConfigError for another architecture than mosaicbert.
    """
    if model.architecture != "mosaicbert":
        raise ConfigError(f"bench limit knows the products of mosaicbert, not of {model.architecture}")
    hidden, wide, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    narrow = model.num_narrow_layers
    full_and_narrow = (layers - narrow, narrow)
    linears = [  # name, width out, width in, how often on all tokens, how often on the targets alone
        ("queries, keys, values", 3 * hidden, hidden, layers - narrow, 0),
        ("keys, values", 2 * hidden, hidden, narrow, 0),
        ("queries", hidden, hidden, 0, narrow),
        ("attention output", hidden, hidden, *full_and_narrow),
        ("feed-forward up", 2 * wide, hidden, *full_and_narrow),
        ("feed-forward down", hidden, wide, *full_and_narrow),
        ("head", hidden, hidden, 0, 1),
        ("decoder", model.vocab_size, hidden, 0, 1),
    ]
    return [
        product
        for name, n, k, *counts in linears
        for m, count in zip((tokens, masked), counts, strict=True)
        if count
        for product in (
            Product(name, "forward", m, n, k, count),
            Product(name, "input gradient", m, k, n, count),
            Product(name, "weight gradient", n, k, m, count),
        )
    ]


def bench_limit(recipe: RunConfig, tokens: int) -> Report:
    """Time all products of a micro batch of `tokens` tokens, in bf16. Raises ConfigError without a GPU."""
    need_gpu("limit")
    masked = -(-int(tokens * recipe.masking.rate) // _ROUND_TO) * _ROUND_TO
    products = products_of(recipe.model, tokens, masked)
    machine = measure_machine()
    rows = []
    for product in products:
        ms = median_replay_ms(_call(product))
        tflops_per_s = product.flops / product.count / ms / 1e9
        rows.append(Row(**asdict(product), ms=ms, total_ms=ms * product.count, tflops_per_s=tflops_per_s))
    total_ms = sum(row.total_ms for row in rows)
    tokens_per_s = tokens / total_ms * 1e3
    limit = Limit(
        tokens=tokens,
        masked=masked,
        total_ms=total_ms,
        tflops_per_s=sum(row.flops for row in rows) / total_ms / 1e9,
        tokens_per_s=tokens_per_s,
        samples_per_s=tokens_per_s / (FILL * recipe.data.max_length),
    )
    return Report(machine, rows, [limit])


def _call(product: Product) -> Callable[[], torch.Tensor]:
    """The product on operands that lie in memory as the layer's do."""

    def operand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    m, n, k = product.m, product.n, product.k
    if product.direction == "forward":
        x, weight = operand(m, k), operand(n, k)
        return lambda: F.linear(x, weight)
    if product.direction == "input gradient":
        d_y, weight = operand(m, k), operand(k, n)
        return lambda: d_y @ weight
    d_y, x = operand(k, m), operand(k, n)
    return lambda: d_y.T @ x
