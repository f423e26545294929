"""Optimizer steps through the DeepSpeed engine: this model against its peers, on the same rows in one run."""

import itertools
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosaicbert_ds import dist
from mosaicbert_ds.bench.contenders import CONTENDERS, OURS, Contender, GlobalBatch
from mosaicbert_ds.bench.machine import lap_times_s, measure_machine
from mosaicbert_ds.bench.report import Report, column
from mosaicbert_ds.bench.training_run import (
    DIFFERENT_STEPS,
    Text,
    TrainingRun,
    in_fresh_process,
    with_micro_batch,
)
from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import ModelConfig
from mosaicbert_ds.training.meter import Rates, memory, peak_flops_per_s

_WARM_UP_STEPS = 2 * DIFFERENT_STEPS  # every shape twice: loaded and compiled, then recorded
# Of the loader's own batches. By then the stock that it laid in is used up, and the shapes of 512 rows have
# come up so often that most steps record none (in simulation 3 of 4): the median is that of a long run.
_LOADER_WARM_UP_STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one micro batch. Rates are medians over steps; a size out of memory has none."""

    model: str = column("model")
    variant: str = column("variant")
    batches: str = column("batches")  # the loader's as they come, or some of them again and again
    max_length: int = column("length", ",d")
    micro_batch_size: int = column("micro batch", ",d")
    parameters_m: float | None = column("M params", ".1f", None)
    samples_per_s: float | None = column("samples/s", ",.1f", None)
    samples_per_s_min: float | None = column("min", ",.1f", None)
    samples_per_s_max: float | None = column("max", ",.1f", None)
    tokens_per_s: float | None = column("real tokens/s", ",.0f", None)
    mfu: float | None = column("MFU (real tokens)", ".1%", None)  # by 6 x parameters
    mfu_with_attention: float | None = column("with attention's products", ".1%", None)
    peak_gib: float | None = column("peak GiB", ".1f", None)
    reserved_gib: float | None = column("reserved GiB", ".1f", None)  # with the pools of recorded graphs
    loader_efficiency: float | None = column("of repeated", ".1%", None)  # real tokens/s
    ours_over_this: float | None = column("ours is x", ".2f", None)  # ours at its best micro batch
    note: str = column("", default="")


def bench_throughput(
    recipe: RunConfig, text: Text, models: list[str], micro_batches: list[int], repeats: int
) -> Report:
    """Every model of `models` (keys of CONTENDERS) at every micro batch, `repeats` steps each.

    With shards in `text`, models that train on the loader's own batches are timed on those too. Raises
    ConfigError for names and sizes that are not possible, DataError for shards that do not fit.
    """
    for name in models:
        if name not in CONTENDERS:
            raise ConfigError(f"--models says '{name}'; allowed are {', '.join(CONTENDERS)}")
    measurements = [
        (name, with_micro_batch(CONTENDERS[name].recipe_from(recipe), size))
        for name in models
        for size in micro_batches
    ]
    machine = measure_machine()
    rows: list[Row] = []
    best: dict[str, float] = {}  # samples/s on repeated batches, by name
    names: list[str] = []  # of the rows
    for name, sized in measurements:
        for row in in_fresh_process(_measure, name, sized, text, repeats):
            print(f"{name}, micro batch {row.micro_batch_size}: {_said(row)}", file=sys.stderr, flush=True)
            rows.append(row)
            names.append(name)
            if row.batches == "repeated" and row.samples_per_s:
                best[name] = max(best.get(name, 0.0), row.samples_per_s)
    return Report(machine, [_compared(name, row, best) for name, row in zip(names, rows, strict=True)])


def _measure(name: str, recipe: RunConfig, text: Text, repeats: int) -> list[Row]:
    contender = CONTENDERS[name]
    row = Row(
        model=contender.model,
        variant=contender.variant,
        batches="repeated",
        max_length=recipe.data.max_length,
        micro_batch_size=recipe.batch.micro_batch_size,
    )
    try:
        run = TrainingRun(recipe, text, contender.build)
        steps = [run.next_batches() for _ in range(DIFFERENT_STEPS)]
        repeated = itertools.cycle(contender.convert(steps, recipe.data.max_length))
        rows = [_time(run, repeated, _WARM_UP_STEPS, repeats, row, contender)]
        if text.folder and contender.is_fed_by_loader:
            fresh = iter(run.next_batches, None)
            row = replace(row, batches="loader")
            loaded = _time(run, fresh, _LOADER_WARM_UP_STEPS, repeats, row, contender)
            assert loaded.tokens_per_s and rows[0].tokens_per_s
            rows.append(replace(loaded, loader_efficiency=loaded.tokens_per_s / rows[0].tokens_per_s))
        run.batches.close()
    except torch.OutOfMemoryError:
        return [replace(row, note="out of memory")]
    return rows


def attention_as_tokens(cu_seqlens: Tensor, model: ModelConfig, num_parameters: int) -> float:
    """How many more tokens would be as much work, at 6 operations a parameter and token, as the two products
    of attention: 2 x hidden_size operations each for a pair of tokens of one row, in each layer, and twice
    that in the backward pass."""
    pairs = int(cu_seqlens.diff().long().square().sum())
    return 12 * model.hidden_size * model.num_hidden_layers * pairs / (6 * num_parameters)


def _time(
    run: TrainingRun,
    batches: Iterator[GlobalBatch],
    warm_up: int,
    repeats: int,
    row: Row,
    contender: Contender,
) -> Row:
    """`row` with its figures."""
    tokens: list[int] = []
    boundaries: list[list[Tensor]] = []  # of the rows of each micro batch

    def lap() -> None:
        micro_batches = next(batches)
        tokens.append(sum(batch.num_tokens for batch in micro_batches))
        boundaries.append([batch.cu_seqlens for batch in micro_batches])
        run.step(micro_batches)

    for _ in range(warm_up):
        lap()
    tokens.clear()
    boundaries.clear()
    seconds = lap_times_s(lap, repeats)
    samples_per_s = [run.plan.global_batch_size / s for s in seconds]
    tokens_per_s = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
    more = [
        sum(attention_as_tokens(each, run.recipe.model, run.num_parameters) for each in step)
        for step in boundaries
    ]
    with_attention = statistics.median((n + m) / s for n, m, s in zip(tokens, more, seconds, strict=True))
    rates = Rates(
        num_parameters=run.num_parameters,
        max_length=run.recipe.data.max_length,
        world_size=dist.world_size(),
        peak_flops_per_s=peak_flops_per_s(),
        usd_per_gpu_hour=None,
    )
    gpu_memory = memory()
    return replace(
        row,
        parameters_m=run.num_parameters / 1e6,
        samples_per_s=statistics.median(samples_per_s),
        samples_per_s_min=min(samples_per_s),
        samples_per_s_max=max(samples_per_s),
        tokens_per_s=tokens_per_s,
        mfu=rates.mfu(tokens_per_s),
        mfu_with_attention=rates.mfu(with_attention) if contender.has_recipes_size else None,
        peak_gib=gpu_memory.get("memory/gpu_allocated_peak_gib"),
        reserved_gib=gpu_memory.get("memory/gpu_reserved_gib"),
    )


def _compared(name: str, row: Row, best: dict[str, float]) -> Row:
    """The row with its place in the whole: against ours, and whether it is its model's best size."""
    if row.samples_per_s is None:
        return row
    return replace(
        row,
        ours_over_this=best[OURS] / row.samples_per_s if OURS in best else None,
        note="best" if row.samples_per_s == best[name] else row.note,
    )


def _said(row: Row) -> str:
    return row.note or f"{row.samples_per_s:,.1f} samples/s, {row.batches}"
