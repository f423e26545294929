"""How much, and in which pieces: the batch arithmetic and the length of the run.

    global batch = micro batch x gradient accumulation x ranks

A recipe states the global and the micro batch; the launcher states the ranks; the accumulation
follows. `plan_batches` refuses numbers that do not meet instead of training another batch size.
"""

import bisect
import itertools
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.progress import Progress
from mosaicbert_ds.typed_yaml import recipe_part

# Progress is a quotient of two counts, and floats count without gaps up to here.
Count = Annotated[int, Field(ge=1, le=1 << 53)]
# 4 M samples of 128 tokens: far beyond any batch that still learns.
BatchSize = Annotated[int, Field(ge=1, le=1 << 22)]


@recipe_part
class BatchConfig:
    """Sizes in samples. `gradient_accumulation_steps` is filled in when it is null.

    `ramp`: [[part of the run, global batch], ...], from which part on which size holds, from 0 up to
    `global_batch_size`; empty for that size all along. A size begins at the first multiple of itself, and
    the micro batch stays, so that accumulation grows. The learning rate is not changed by it.
    """

    global_batch_size: BatchSize = 4096
    micro_batch_size: BatchSize = 128
    gradient_accumulation_steps: BatchSize | None = None
    ramp: tuple[tuple[Annotated[float, Field(ge=0, lt=1)], BatchSize], ...] = ()

    def __post_init__(self) -> None:
        if not self.ramp:
            return
        given = [list(entry) for entry in self.ramp]
        if self.ramp[0][0] != 0 or self.ramp[-1][1] != self.global_batch_size:
            raise ValueError(
                f"batch.ramp {given} must begin at 0.0 and end with batch.global_batch_size "
                f"{self.global_batch_size}; change one, or use batch.ramp=[] for no ramp"
            )
        for (mark, size), (later, larger) in itertools.pairwise(self.ramp):
            if later <= mark or larger <= size or larger % size:
                raise ValueError(
                    f"batch.ramp {given} goes from {[mark, size]} to {[later, larger]}; the part of the run "
                    "must grow, and each batch be a multiple of the one before"
                )


@recipe_part
class DurationConfig:
    """Length of the run: samples seen over all ranks and epochs, or minutes of training.

    Minutes are wall-clock time of steps and of waiting for data. Not counted are evaluation and saving, which
    are no part of the method, and a start's first step, which compiles.
    """

    samples: Count | None = 286_720_000
    minutes: Annotated[float, Field(gt=0, le=1 << 20)] | None = None

    def __post_init__(self) -> None:
        if (self.samples is None) == (self.minutes is None):
            raise ValueError(
                f"duration.samples is {self.samples or 'null'}, duration.minutes {self.minutes or 'null'}; "
                "give exactly one, and null for the other"
            )


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The batch arithmetic of one run on `world_size` ranks; all sizes in samples.

    Exactly one of `total_samples` and `minutes` is set. With a ramp, `global_batch_size` and
    `gradient_accumulation_steps` are those that it ends with.
    """

    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    total_samples: int | None
    minutes: float | None = None
    ramp: tuple[tuple[float, int], ...] = ()

    @property
    def sizes(self) -> tuple[tuple[float, int], ...]:
        """The ramp, of one entry where there is none."""
        return self.ramp or ((0.0, self.global_batch_size),)

    def batch_size_at(self, part: float, start: int) -> int:
        """The global batch that begins after `start` samples, when `part` of the run is done: the largest
        that is due and has `start` among its multiples."""
        return next(size for mark, size in reversed(self.sizes) if mark <= part and start % size == 0)

    def part_done(self, progress: Progress) -> float:
        """The part of the run that is done, in [0, 1]. A run of minutes goes by its schedule's time; one
        that was a run of samples before has none and goes by the clock's."""
        if self.total_samples is not None:
            return progress.samples_seen / self.total_samples
        assert self.minutes is not None
        return min((progress.scheduled_s or progress.training_s) / (60 * self.minutes), 1.0)

    @property
    def total_steps(self) -> int | None:
        """None for a run of minutes: their number shows only at its end."""
        if self.total_samples is None:
            return None
        total = self.total_samples
        starts = [
            size * bisect.bisect_left(range(0, total, size), mark, key=lambda start: start / total)
            for mark, size in self.sizes
        ]
        stretches = zip(self.sizes, itertools.pairwise([*starts, total]), strict=True)
        return sum((end - start) // size for (_, size), (start, end) in stretches)

    def __str__(self) -> str:
        ramp = ", ".join(f"{size:,} from {mark:.0%}" for mark, size in self.ramp)
        length = (
            f"{self.minutes:g} minutes of steps and waiting for data; each start's first step, evaluation "
            "and saving do not count"
            if self.total_samples is None
            else f"{self.total_steps:,} steps = {self.total_samples:,} samples"
        )
        return (
            f"global batch {self.global_batch_size:,} = micro batch {self.micro_batch_size:,} x "
            f"accumulation {self.gradient_accumulation_steps:,} x {self.world_size:,} rank(s)"
            f"{f' (ramp: {ramp} of the run)' if ramp else ''}; {length}"
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
    for _, size in batch.ramp:
        if size % (micro * world_size):
            raise ConfigError(
                f"batch.ramp has {size}, which is no multiple of micro batch {micro} x {world_size} rank(s); "
                f"{_ramp_way_out(batch, world_size)}"
            )
    if duration.samples is not None and duration.samples % total:
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
        minutes=duration.minutes,
        ramp=batch.ramp,
    )


def _way_out(batch: BatchConfig, duration: DurationConfig, world_size: int) -> str:
    """All overrides that make the sizes meet: the global batch moves only where ranks do not divide it,
    the micro batch never grows."""
    total = _whole(batch.global_batch_size, world_size)
    share = total // world_size  # of a rank
    micro = _micro_within(batch, share)
    fits: dict[str, tuple[int | None, int]] = {
        "batch.global_batch_size": (batch.global_batch_size, total),
        "batch.micro_batch_size": (batch.micro_batch_size, micro),
        "batch.gradient_accumulation_steps": (batch.gradient_accumulation_steps, share // micro),
    }
    if duration.samples is not None:
        fits["duration.samples"] = (duration.samples, _whole(duration.samples, total))
    if batch.gradient_accumulation_steps is None:
        del fits["batch.gradient_accumulation_steps"]
    changes = " ".join(f"{key}={now}" for key, (before, now) in fits.items() if now != before)
    return f"use {changes} (accumulation {share // micro})"


def _ramp_way_out(batch: BatchConfig, world_size: int) -> str:
    """The micro batch that divides all of the ramp's sizes, if their smallest has one sample a rank."""
    smallest = batch.ramp[0][1]  # the others are multiples of it
    if smallest % world_size:
        return f"use batch.ramp=[] or sizes that are multiples of {world_size}"
    share = smallest // world_size
    return f"use batch.micro_batch_size={_micro_within(batch, share)}"


def _micro_within(batch: BatchConfig, share: int) -> int:
    """The largest micro batch within the given one that divides a rank's `share`."""
    return next(size for size in range(min(batch.micro_batch_size, share), 0, -1) if share % size == 0)


def _whole(samples: int, batch: int) -> int:
    """The largest multiple of `batch` within `samples`, at least one."""
    return max(samples // batch, 1) * batch
