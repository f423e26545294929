"""What a run will take, before it is started: step time, MFU, memory, hours and dollars by number of nodes.

    step = accumulation x micro batch + optimizer, or the host's launches if they take longer,
           + what the network shows of itself + data, if it is late

Everything here is predicted. Computing starts from a figure that was measured: the published runs on A100,
this package's on one H200, or the user's own (`mosaicbert bench throughput --json`). The network is the
model of `network.py`.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicbert_ds.cluster.network import Link, Network, exposed_s, transfers_of_a_step
from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import ModelConfig, count_parameters
from mosaicbert_ds.tables import column, table
from mosaicbert_ds.training.ds_config import read_ds_config, zero_stage
from mosaicbert_ds.training.meter import Rates
from mosaicbert_ds.training.plan import BatchPlan, plan_batches

NODE_COUNTS = (1, 8, 16, 32, 64)
GPUS_PER_NODE = 8
FILL = 0.88  # real tokens of a padded batch, with the lengths of C4 at 128 tokens

ONE_TILE_LENGTH = 128  # tokens of a sequence that attention takes as a whole: ops/attention_triton.py
_GIB = 1 << 30
_DEFAULT_BUCKET = 500_000_000  # elements: DeepSpeed's, where the JSON names none
# Of a micro batch, whatever its size. Per parameter: three readings of a bf16 weight, and an fp32 gradient
# read and written. On an H200 a micro batch of 16k tokens is 4 % slower a token than one of 65k: that is
# 1.3 ms a micro batch of Base, of which the bytes are 0.5.
_WEIGHT_BYTES, _MICRO_BATCH_S = 14, 0.8e-3
# What the host needs to start a step, which the GPU waits for if it is faster: a step of one micro batch of
# 16 takes 8.0 ms on an H200, launches recorded, and 5 of them are work.
_HOST_STEP_S = 8e-3
_ADAM_BYTES = 30  # a parameter: gradient read, weight and two moments read and written, bf16 weight written
_HOST_COPY_BYTES_PER_S = 10e9  # a checkpoint's way to the host: one PCIe link, pageable memory
_CHECKPOINT_BYTES = 12  # a parameter: weight and two moments in fp32
_LOADER_TOKENS_PER_S = 4e6  # of one host process; see `_late_s`


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and what the step of each architecture gets out of it: FLOP/s of `matrix_flops`, measured."""

    memory_bytes: float
    memory_bytes_per_s: float
    peak_flops_per_s: float  # bf16, dense
    inside: Link  # NVLink, as NCCL's bus bandwidth
    step_flops_per_s: dict[str, float]
    source: str


_A100 = Gpu(
    memory_bytes=80e9,
    memory_bytes_per_s=1.8e12,
    peak_flops_per_s=312e12,
    inside=Link(bytes_per_s=230e9, latency_s=3e-6),
    # 1,033 and 904 samples/s a GPU. The published BERT-Base computes its head on every token; counted as
    # that work (85.5 GFLOP a sample) it runs at 77e12, as MosaicBERT does within 6 %.
    step_flops_per_s={"mosaicbert": 82.6e12, "bert": 63.6e12},
    source="the published runs on 8 A100-80GB",
)
_H200 = Gpu(
    memory_bytes=141e9,
    memory_bytes_per_s=4.25e12,
    peak_flops_per_s=989e12,
    inside=Link(bytes_per_s=360e9, latency_s=3e-6),
    # 6,033 samples/s in micro batches of 512; Hugging Face's BERT-Base, eager, 2,849.
    step_flops_per_s={"mosaicbert": 484e12, "bert": 199e12},
    source="this package on one H200, bench/RESULTS.md",
)
GPUS = {
    "a100-40": dataclasses.replace(_A100, memory_bytes=40e9, memory_bytes_per_s=1.4e12),
    "a100-80": _A100,
    "h100": dataclasses.replace(
        _H200,
        memory_bytes=80e9,
        memory_bytes_per_s=3.0e12,
        step_flops_per_s={name: 0.95 * rate for name, rate in _H200.step_flops_per_s.items()},
        source="not measured: 0.95 of an H200, which has the same cores and more bandwidth",
    ),
    "h200": _H200,
}
# Of a whole node, 85 % of the wire.
INTERCONNECTS = {
    "ethernet-25": Link(bytes_per_s=0.85 * 25e9 / 8, latency_s=30e-6),
    "ethernet-100": Link(bytes_per_s=0.85 * 100e9 / 8, latency_s=30e-6),
    "efa-400": Link(bytes_per_s=0.85 * 400e9 / 8, latency_s=30e-6),  # p4d
    "efa-3200": Link(bytes_per_s=0.85 * 3200e9 / 8, latency_s=30e-6),  # p5
    "hdr-8": Link(bytes_per_s=0.85 * 8 * 200e9 / 8, latency_s=8e-6),  # InfiniBand, a card a GPU
    "ndr-8": Link(bytes_per_s=0.85 * 8 * 400e9 / 8, latency_s=8e-6),
}

# Steps of 4,096 samples to a GLUE score: the published hours on 8 A100 x 8 x samples/s a GPU / 4,096.
# BERT-Base's to 79.6 is read off its curve; to 83.2 it needs more than its 70,000 steps, as published.
_PUBLISHED_BATCH, _PUBLISHED_SAMPLES = 4096, 286_720_000
_STEPS_TO_GLUE = {
    ("mosaicbert", 12, 768): {"79.6": 8_205, "83.2": 33_400},
    ("bert", 12, 768): {"79.6": 10_230, "83.2": 73_100},
}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A measured speed: `samples_per_s` of one GPU in micro batches of `micro_batch_size`."""

    samples_per_s: float
    micro_batch_size: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run on `nodes` nodes, predicted. `hours` and `dollars` by target, None where it is not published."""

    nodes: int
    gpus: int
    micro_batch_size: int
    accumulation: int
    step_s: float
    compute_s: float
    network_s: float  # that the GPUs wait for
    samples_per_s: float
    mfu: float  # the published definition: padded tokens
    mfu_real: float
    memory_gib: float  # of a GPU
    fits: bool
    input_bytes_per_s: float  # a node reads from its disk
    checkpoint_stall_s: float
    hours: dict[str, float | None]
    dollars: dict[str, float | None]


def matrix_flops(model: ModelConfig, length: int, fill: float, mask_rate: float) -> float:
    """Operations of the matrix products that a sample costs, forward and backward.

    MosaicBERT computes the real tokens (`fill` of `length`), and for the masked ones alone the head and, but
    for keys and values, its `masked_only_layers`, one at least. BERT computes padding too.
    """
    hidden, wide, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    unpadded = model.architecture == "mosaicbert"
    narrow = model.num_narrow_layers
    tokens = length * (fill if unpadded else 1.0)
    masked = length * fill * mask_rate
    attention = hidden**2 + 2 * tokens * hidden  # queries; scores and values against a sample
    keys_values = 2 * hidden**2
    rest = hidden**2 + (3 if unpadded else 2) * hidden * wide
    head = hidden**2 + hidden * model.vocab_size
    on_all_tokens = (layers - narrow) * (attention + rest) + layers * keys_values
    on_masked = head + narrow * (attention + rest)
    return 3 * 2 * (tokens * on_all_tokens + masked * on_masked)


def estimate_run(
    recipe: RunConfig,
    gpu: Gpu,
    between: Link,
    nodes: int,
    usd_per_gpu_hour: float,
    compute: Compute | None = None,
    fill: float = FILL,
) -> Estimate:
    """Predict `recipe` on `nodes` nodes of 8 GPUs.

    The micro batch is the recipe's, or the GPU's whole share of the global batch where that is less.
    Raises ConfigError where the batch sizes do not meet.
    """
    world = nodes * GPUS_PER_NODE
    micro = min(recipe.batch.micro_batch_size, max(recipe.batch.global_batch_size // world, 1))
    batch = dataclasses.replace(recipe.batch, micro_batch_size=micro, gradient_accumulation_steps=None)
    plan = plan_batches(batch, recipe.duration, world)
    parameters = count_parameters(recipe.model)
    ds_config = read_ds_config(recipe.engine)
    zero, stage = ds_config["zero_optimization"], zero_stage(ds_config)

    fixed_s = _MICRO_BATCH_S + _WEIGHT_BYTES * parameters / gpu.memory_bytes_per_s
    per_sample_s = _seconds_a_sample(recipe, gpu, compute, fill, fixed_s)
    accumulation = plan.gradient_accumulation_steps
    shards = world if stage else 1
    adam_s = _ADAM_BYTES * parameters / shards / gpu.memory_bytes_per_s
    compute_s = max(accumulation * (fixed_s + micro * per_sample_s) + adam_s, _HOST_STEP_S)

    network = Network(nodes=nodes, gpus_per_node=GPUS_PER_NODE, inside=gpu.inside, between=between)
    transfers = transfers_of_a_step(
        parameters,
        stage,
        accumulation,
        bf16=recipe.engine.precision == "bf16",
        bucket=zero.get("reduce_bucket_size", _DEFAULT_BUCKET),
        overlap=zero.get("overlap_comm", stage == 3),
    )
    network_s = exposed_s(transfers, network, compute_s)
    length = recipe.data.max_length
    late_s = _late_s(plan, length, fill, compute_s + network_s)
    step_s = compute_s + network_s + late_s
    stall_s = _CHECKPOINT_BYTES * parameters / _HOST_COPY_BYTES_PER_S
    forward_s = recipe.evaluation.max_samples / world * per_sample_s / 3

    def hours(steps: int | None) -> float | None:
        if steps is None:
            return None
        samples = steps * plan.global_batch_size
        saves = samples // recipe.checkpoint.every_samples
        evaluations = samples // recipe.evaluation.every_samples
        return (steps * step_s + saves * stall_s + evaluations * forward_s) / 3600

    by_target = {name: hours(steps) for name, steps in steps_to_targets(recipe).items()}
    rate = plan.global_batch_size / step_s
    rates = Rates(
        num_parameters=parameters,
        max_length=length,
        world_size=world,
        peak_flops_per_s=gpu.peak_flops_per_s,
        usd_per_gpu_hour=usd_per_gpu_hour,
    )
    memory = memory_bytes(recipe, parameters, stage, micro, world, fill)
    return Estimate(
        nodes=nodes,
        gpus=world,
        micro_batch_size=micro,
        accumulation=accumulation,
        step_s=step_s,
        compute_s=compute_s,
        network_s=network_s,
        samples_per_s=rate,
        mfu=rates.mfu(rate * length) or 0.0,
        mfu_real=rates.mfu(rate * length * fill) or 0.0,
        memory_gib=memory / _GIB,
        fits=memory < 0.92 * gpu.memory_bytes,  # the rest is CUDA's context, NCCL's buffers and gaps
        input_bytes_per_s=2 * rate * length * fill / nodes,  # a token is a uint16
        checkpoint_stall_s=stall_s,
        hours=by_target,
        dollars={
            name: None if spent is None else spent * world * usd_per_gpu_hour
            for name, spent in by_target.items()
        },
    )


def memory_bytes(
    recipe: RunConfig, parameters: int, stage: int, micro_batch_size: int, world_size: int, fill: float
) -> float:
    """Peak of one GPU: weights, gradients and Adam's state as ZeRO divides them, and a micro batch's tensors.

    A layer keeps its input, queries, keys and values, the attention's output, the sum before each LayerNorm,
    and both halves of GeGLU with their product, in bf16; over 128 tokens a sequence also what the attention's
    output lost in rounding. `masked_only_layers`, one at least, keep the masked tokens' alone, but for keys
    and values. The head keeps logits and their gradient.
    """
    model = recipe.model
    element = 2 if recipe.engine.precision == "bf16" else 4
    # Bytes a parameter: what the model computes with, an fp32 gradient, and the optimizer's 12.
    whole, divided = {
        0: (element + 16, 0),
        1: (element + 4, 12),
        2: (element, 16),
        3: (0, element + 16),
    }[stage]
    state = parameters * (whole + divided / world_size)
    unpadded = model.architecture == "mosaicbert"
    tokens = micro_batch_size * recipe.data.max_length * (fill if unpadded else 1.0)
    masked = micro_batch_size * recipe.data.max_length * fill * recipe.masking.rate
    keeps_lost = unpadded and element == 2 and recipe.data.max_length > ONE_TILE_LENGTH
    kept = (7 if keeps_lost else 6) * model.hidden_size + (3 if unpadded else 2) * model.intermediate_size
    keys_values = 2 * model.hidden_size
    if model.activation_checkpointing:
        kept, keys_values = model.hidden_size, 0
    narrow = model.num_narrow_layers
    activations = tokens * ((model.num_hidden_layers - narrow) * kept + narrow * keys_values)
    activations += masked * (narrow * (kept - keys_values) + 2 * model.vocab_size)
    return state + element * activations


def steps_to_targets(recipe: RunConfig) -> dict[str, int | None]:
    """Optimizer steps to GLUE 79.6 and 83.2, where they are published for this model, batch and schedule,
    and to the end of the recipe."""
    model = recipe.model
    as_published = (recipe.batch.global_batch_size, recipe.duration.samples, recipe.data.max_length) == (
        _PUBLISHED_BATCH,
        _PUBLISHED_SAMPLES,
        128,
    )
    known = _STEPS_TO_GLUE.get((model.architecture, model.num_hidden_layers, model.hidden_size), {})
    glue = {score: known.get(score) if as_published else None for score in ("79.6", "83.2")}
    samples = recipe.duration.samples  # a run of minutes is as long as it says
    return {**glue, "full run": samples and samples // recipe.batch.global_batch_size}


def read_bench(path: Path, recipe: RunConfig) -> Compute:
    """This recipe's best speed in a file of `mosaicbert bench throughput --json`. Raises ConfigError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        millions = round(count_parameters(recipe.model) / 1e6, 1)
        ours = [
            row
            for row in rows
            if row["samples_per_s"]
            and (round(row["parameters_m"], 1), row["max_length"]) == (millions, recipe.data.max_length)
        ]
        best = max(ours, key=lambda row: row["samples_per_s"], default=None)
        if best is not None:
            return Compute(samples_per_s=best["samples_per_s"], micro_batch_size=best["micro_batch_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--bench {path} cannot be read ({error}); give what `mosaicbert bench throughput --json` wrote"
        ) from None
    raise ConfigError(
        f"--bench {path} has no speed of a model of {millions} M parameters at data.max_length "
        f"{recipe.data.max_length}; measure this recipe"
    )


def as_json(estimates: Sequence[Estimate], **facts: Any) -> str:
    rows = [dataclasses.asdict(estimate) for estimate in estimates]
    return json.dumps({"predicted": True, **facts, "estimates": rows}, indent=2)


@dataclass(frozen=True)
class _Line:
    nodes: int = column("nodes", "d")
    gpus: int = column("GPUs", "d")
    micro: int = column("micro batch", "d")
    step_ms: float = column("step ms", ",.1f")
    network: float = column("on network", ".0%")
    samples_per_s: float = column("samples/s", ",.0f")
    mfu: float = column("MFU", ".1%")
    memory_gib: float = column("GiB/GPU", ".1f")
    first_h: float | None = column("h to 79.6", ".2f")
    first_usd: float | None = column("$ ", ",.0f")
    second_h: float | None = column("h to 83.2", ".2f")
    second_usd: float | None = column("$  ", ",.0f")
    full_h: float | None = column("h in full", ".2f")
    full_usd: float | None = column("$", ",.0f")


def as_table(estimates: Sequence[Estimate]) -> str:
    """For people: one line a node count, and what needs saying about it."""
    lines = []
    for one in estimates:
        prices = [number for target in one.hours for number in (one.hours[target], one.dollars[target])]
        lines.append(
            _Line(
                one.nodes,
                one.gpus,
                one.micro_batch_size,
                one.step_s * 1e3,
                one.network_s / one.step_s,
                one.samples_per_s,
                one.mfu,
                one.memory_gib,
                *prices,
            )
        )
    notes = [
        f"{one.nodes} node(s): {one.memory_gib:.0f} GiB do not fit; lower batch.micro_batch_size"
        for one in estimates
        if not one.fits
    ]
    return "\n".join([table(lines), *notes])


def plot(estimates: Sequence[Estimate], out: Path, title: str) -> None:
    """Draw samples/s and dollars of the full run against GPUs to `out` (.png, .svg or .pdf)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib; pip install 'mosaicbert-ds[report]'") from None
    gpus = [one.gpus for one in estimates]
    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, cost = figure.subplots(1, 2)
    speed.loglog(gpus, [one.samples_per_s for one in estimates], marker="o", label="predicted")
    first = estimates[0]
    ideal = [first.samples_per_s * number / first.gpus for number in gpus]
    speed.loglog(gpus, ideal, color="0.5", linestyle="--", linewidth=1, label="in proportion")
    speed.set(xlabel="GPUs", ylabel="samples/s", xticks=gpus, xticklabels=gpus)
    speed.legend(frameon=False)
    for target in first.hours:
        hours = [one.hours[target] for one in estimates]
        if None not in hours:
            label = f"to GLUE {target}" if target[0].isdigit() else target
            cost.plot(hours, [one.dollars[target] for one in estimates], marker="o", label=label)
            for one in estimates:
                cost.annotate(f"{one.gpus}", (one.hours[target], one.dollars[target]), fontsize=7)
    cost.set(xlabel="hours", ylabel="dollars", xscale="log", yscale="log")
    cost.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(out, dpi=150)


def _seconds_a_sample(
    recipe: RunConfig, gpu: Gpu, compute: Compute | None, fill: float, fixed_s: float
) -> float:
    """Of computing on one GPU, beside the fixed part of a micro batch."""
    if compute is None:
        work = matrix_flops(recipe.model, recipe.data.max_length, fill, recipe.masking.rate)
        return work / gpu.step_flops_per_s[recipe.model.architecture]
    seconds = 1 / compute.samples_per_s - fixed_s / compute.micro_batch_size
    if seconds <= 0:
        raise ConfigError(
            f"{compute.samples_per_s:g} samples/s in micro batches of {compute.micro_batch_size} leave no "
            f"time beside the {fixed_s * 1e3:.1f} ms that a micro batch takes; give a measured figure"
        )
    return seconds


def _late_s(plan: BatchPlan, length: int, fill: float, step_s: float) -> float:
    """Seconds that a step waits for its data: a rank's loader works beside the step, and is late when its
    share of the batch takes longer than the step."""
    share = plan.global_batch_size / plan.world_size * length * fill
    return max(share / _LOADER_TOKENS_PER_S - step_s, 0.0)
