"""How much, and in which pieces: the batch arithmetic and the length of the run.

    global batch = micro batch x gradient accumulation x ranks

A recipe states the global and the micro batch; the launcher states the ranks; the accumulation
follows. `plan_batches` refuses numbers that do not meet instead of training another batch size.
"""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.typed_yaml import recipe_part

# Progress is a quotient of two counts, and floats count without gaps up to here.
Count = Annotated[int, Field(ge=1, le=1 << 53)]
# 4 M samples of 128 tokens: far beyond any batch that still learns.
BatchSize = Annotated[int, Field(ge=1, le=1 << 22)]


@recipe_part
class BatchConfig:
    """Sizes in samples. `gradient_accumulation_steps` is filled in when it is null."""

    global_batch_size: BatchSize = 4096
    micro_batch_size: BatchSize = 128
    gradient_accumulation_steps: BatchSize | None = None


@recipe_part
class DurationConfig:
    """Length of the run in samples seen, over all ranks and epochs."""

    samples: Count = 286_720_000


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch arithmetic of one run on `world_size` ranks; all sizes in samples."""

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    total_samples: int

    @property
    def total_steps(self) -> int:
        return self.total_samples // self.global_batch_size

    def __str__(self) -> str:
        return (
            f"global batch {self.global_batch_size:,} = micro batch {self.micro_batch_size:,} x "
            f"accumulation {self.gradient_accumulation_steps:,} x {self.world_size:,} rank(s); "
            f"{self.total_steps:,} steps = {self.total_samples:,} samples"
        )


def plan_batches(batch: BatchConfig, duration: DurationConfig, world_size: int) -> BatchPlan:
    """Fill in the accumulation and check that all sizes meet.

    Raises ConfigError with the overrides that make them meet.
    """
    if world_size < 1:
        raise ConfigError(f"the number of ranks is {world_size}; allowed is 1 or more")
    total, micro, given = batch.global_batch_size, batch.micro_batch_size, batch.gradient_accumulation_steps
    accumulation = given or total // (micro * world_size)
    if micro * accumulation * world_size != total:
        product = f"micro batch {micro} x {world_size} rank(s) x accumulation {given or '(a whole number)'}"
        raise ConfigError(
            f"batch.global_batch_size {total} is not {product}; {_way_out(batch, duration, world_size)}"
        )
    if duration.samples % total:
        raise ConfigError(
            f"duration.samples {duration.samples} is not a whole number of global batches of {total}; "
            f"use duration.samples={_whole(duration.samples, total)}"
        )
    return BatchPlan(
        global_batch_size=total,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
        total_samples=duration.samples,
    )


def _way_out(batch: BatchConfig, duration: DurationConfig, world_size: int) -> str:
    """All overrides that make the sizes meet: the global batch moves only where ranks do not divide it,
    the micro batch never grows."""
    total = _whole(batch.global_batch_size, world_size)
    share = total // world_size  # of a rank
    micro = next(size for size in range(min(batch.micro_batch_size, share), 0, -1) if share % size == 0)
    fits = {
        "batch.global_batch_size": (batch.global_batch_size, total),
        "batch.micro_batch_size": (batch.micro_batch_size, micro),
        "batch.gradient_accumulation_steps": (batch.gradient_accumulation_steps, share // micro),
        "duration.samples": (duration.samples, _whole(duration.samples, total)),
    }
    if batch.gradient_accumulation_steps is None:
        del fits["batch.gradient_accumulation_steps"]
    changes = " ".join(f"{key}={now}" for key, (before, now) in fits.items() if now != before)
    return f"use {changes} (accumulation {share // micro})"


def _whole(samples: int, batch: int) -> int:
    """The largest multiple of `batch` within `samples`, at least one."""
    return max(samples // batch, 1) * batch
