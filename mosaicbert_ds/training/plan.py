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

Count = Annotated[int, Field(ge=1)]


@recipe_part
class BatchConfig:
    """Sizes in samples. `gradient_accumulation_steps` is filled in when it is null."""

    global_batch_size: Count = 4096
    micro_batch_size: Count = 128
    gradient_accumulation_steps: Count | None = None


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
    """Fill in the accumulation and check that all sizes meet. Raises ConfigError."""
    total, micro, given = batch.global_batch_size, batch.micro_batch_size, batch.gradient_accumulation_steps
    accumulation = given or total // (micro * world_size)
    if micro * accumulation * world_size != total:
        product = f"micro batch {micro} x {world_size} rank(s)" + (
            f" x accumulation {given}" if given else ""
        )
        raise ConfigError(
            f"batch.global_batch_size {total} is not {product}{'' if given else ' x a whole number'}; "
            f"{_way_out(total, micro, world_size)}"
        )
    if duration.samples % total:
        whole = max(round(duration.samples / total), 1) * total
        raise ConfigError(
            f"duration.samples {duration.samples} is not a whole number of global batches of {total}; "
            f"use duration.samples={whole}"
        )
    return BatchPlan(
        global_batch_size=total,
        micro_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
        total_samples=duration.samples,
    )


def _way_out(total: int, micro: int, world_size: int) -> str:
    if total % world_size:
        return f"use a multiple of {world_size}, such as batch.global_batch_size={-(-total // world_size) * world_size}"
    share = total // world_size
    fits = max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
    return f"use batch.micro_batch_size={fits} (accumulation {share // fits})"
