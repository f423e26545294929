"""Where one optimizer step of this model spends the GPU's time, kernel by kernel, from torch.profiler."""

import ast
import itertools
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from mosaicbert_ds import ops
from mosaicbert_ds.bench.machine import lap_times_s, measure_machine, need_gpu
from mosaicbert_ds.bench.report import Report, column
from mosaicbert_ds.bench.training_run import (
    DIFFERENT_STEPS,
    Text,
    TrainingRun,
    in_fresh_process,
    with_micro_batch,
)
from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.errors import TrainingError

_WARM_UP_STEPS, _TIMED_STEPS = 2 * DIFFERENT_STEPS, 5
_OTHERS_SHOWN = 5
OTHER, IDLE = "other", "idle"

# Our own kernels by the file in ops/ that defines them; a file that is not here stands for itself.
OF_OUR_FILES = {
    "attention_triton": "attention",
    "geglu_triton": "GeGLU",
    "dropout_layernorm_triton": "dropout + residual + LayerNorm",
    "masked_lm_loss_triton": "loss",
}
# Everybody else's by what their names hold, first match first: cuBLAS, CUTLASS, PyTorch's own kernels, and
# the compiler's, which are called after the operations that they fuse.
OF_NAMES = (
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|splitk"),
    ("communication", r"nccl"),
    ("optimizer", r"adam|lpnorm|norm(two)?ops"),
    ("loss", r"nll_loss|log_?softmax|cross_entropy|argmax"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("GeGLU", r"gelu"),
    ("embedding, rows picked", r"embedding|index|gather|scatter|grad_weight|radixsort|krn_partial"),
    ("dropout + residual + LayerNorm", r"layer_?norm|dropout|masked_scale|gammabeta"),
    ("column sums, bias gradients", r"reduce_kernel|_sum"),
    ("gradient accumulation, casts, copies", r"copy|memcpy|memset|fillfunctor|catarray|functor_add|_add"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    part: str = column("part")
    ms: float = column("ms a micro batch", ".3f")
    share: float = column("share", ".1%")


@dataclass(frozen=True, kw_only=True)
class Kernel:
    part: str = column("part")
    count: int = column("times a step", ",d")
    ms: float = column("ms a micro batch", ".3f")
    name: str = column("kernel")


def bench_step(recipe: RunConfig, top: int) -> Report:
    """Split one step on a global batch of random text; the `top` longest kernels, and the longest others.

    Idle is the step's time, taken without the profiler, less the sum of its kernels; where kernels run beside
    each other it can be negative. Raises ConfigError without a GPU.
    """
    need_gpu("step")
    recipe = with_micro_batch(recipe, recipe.batch.micro_batch_size)
    machine = measure_machine()
    step_ms, micro_batches, calls = in_fresh_process(_profile, recipe)
    kernels = sort_kernels(calls, micro_batches)
    others = [kernel for kernel in kernels[top:] if kernel.part == OTHER][:_OTHERS_SHOWN]
    note = f"One step: {step_ms:.1f} ms, {micro_batches} micro batches of {recipe.batch.micro_batch_size}."
    return Report(machine, split(kernels, step_ms / micro_batches), kernels[:top] + others, [note])


def sort_kernels(calls: Iterable[tuple[str, float]], micro_batches: int) -> list[Kernel]:
    """Kernels by name with their part, longest first. `calls`: name and milliseconds of each call."""
    ours = our_kernels()
    grouped: dict[str, list[float]] = {}
    for name, ms in calls:
        grouped.setdefault(name, []).append(ms)
    kernels = [
        Kernel(part=part_of(name, ours), count=len(ms), ms=sum(ms) / micro_batches, name=name)
        for name, ms in grouped.items()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def split(kernels: list[Kernel], total_ms: float) -> list[Part]:
    """Parts with their share of `total_ms` a micro batch, longest first; then other, and idle."""
    sums: dict[str, float] = {OTHER: 0.0}
    for kernel in kernels:
        sums[kernel.part] = sums.get(kernel.part, 0.0) + kernel.ms
    sums = dict(sorted(sums.items(), key=lambda item: (item[0] == OTHER, -item[1])))
    sums[IDLE] = total_ms - sum(sums.values())
    return [Part(part=part, ms=ms, share=ms / total_ms) for part, ms in sums.items()]


def part_of(kernel: str, ours: dict[str, str]) -> str:
    """The part of the step that a kernel belongs to. `ours`: see `our_kernels`."""
    if kernel in ours:
        return ours[kernel]
    return next((part for part, pattern in OF_NAMES if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


def our_kernels() -> dict[str, str]:
    """Part of the step by name of each Triton kernel in ops/. The profiler knows a kernel by its function's
    name alone: where several files use one name, their parts are named together."""
    parts: dict[str, list[str]] = {}
    for path in sorted(Path(ops.__file__).parent.glob("*_triton.py")):
        part = OF_OUR_FILES.get(path.stem, path.stem.removesuffix("_triton").replace("_", " "))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(_name_of, node.decorator_list):
                parts.setdefault(node.name, []).append(part)
    return {name: " or ".join(dict.fromkeys(found)) for name, found in parts.items()}


def _name_of(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def _profile(recipe: RunConfig) -> tuple[float, int, list[tuple[str, float]]]:
    """Median milliseconds of a step, its micro batches, name and milliseconds of each kernel of one step."""
    run = TrainingRun(recipe, Text())
    steps: Any = itertools.cycle([run.next_batches() for _ in range(DIFFERENT_STEPS)])
    for _ in range(_WARM_UP_STEPS):
        run.step(next(steps))
    seconds = statistics.median(lap_times_s(lambda: run.step(next(steps)), _TIMED_STEPS))
    # Of the device alone: what the host does is not asked for, and recording it would slow the step down.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run.step(next(steps))
        torch.cuda.synchronize()
    run.batches.close()
    calls = [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    if not calls:
        raise TrainingError("the profiler saw no kernel; another one may hold the GPU: end it and try again")
    return seconds * 1e3, run.plan.gradient_accumulation_steps, calls
