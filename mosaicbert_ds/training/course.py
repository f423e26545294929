"""The course of a run: what each step trains on, at which rates, and when the run ends.

Everything that changes over a run follows one number, the part of it that is done, from 0 to 1. In a run of
samples that is samples seen over all samples. In a run of minutes it is a forecast: at each flush, where
ranks meet anyway, the main rank's clock says how fast samples go and how many are left; from there on each
step moves on by its share, in a straight line to 1 at the time when the minutes will be over.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mosaicbert_ds.data.loader import GlobalBatch
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.optimizer import OptimizerConfig, ScheduleConfig
from mosaicbert_ds.training.plan import BatchPlan
from mosaicbert_ds.training.progress import Progress

# The speed of a run of minutes is the median over its last stretches between flushes, of which the first are
# waited for: one alone may hold a hiccup, or the recording of a new shape.
_MIN_STRETCHES, _MAX_STRETCHES = 3, 9
# Between flushes a run of minutes does at most this share of what is left, so that the error of a forecast
# shrinks with the time in which it can be made good.
_SHARE_OF_THE_REST = 0.01


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """What changes over the run, as functions of the part of it that is done, in [0, 1]."""

    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    mask_rate_at: Callable[[float], float]

    def learning_rate(self, progress: float) -> float:
        return self.optimizer.peak_lr * self.schedule.lr_factor_at(progress)


@dataclass(frozen=True, kw_only=True)
class Step(GlobalBatch):
    """One optimizer step. `done`: the part of the run that is done with it; 1 is the last step's."""

    number: int  # the run's first is 1
    learning_rate: float
    done: float

    @property
    def samples_seen(self) -> int:
        """Samples of the run up to the end of this step."""
        return self.start + self.size


class Course(Iterator[Step]):
    """The steps of `plan` after `progress`, each decided when it is asked for: the loader asks for a few
    global batches ahead. Equal on all ranks, if they ask and `correct` at the same steps.

    Raises ConfigError if the run cannot go on from `progress` in whole batches.
    """

    def __init__(self, plan: BatchPlan, schedules: Schedules, progress: Progress) -> None:
        self._plan, self._schedules = plan, schedules
        self._number, self._start = progress.step, progress.samples_seen
        smallest = plan.sizes[0][1]
        if self._start % smallest:
            raise ConfigError(
                f"the run has seen {self._start} samples, which is no multiple of batch size {smallest}; go "
                f"on with a batch that divides them, such as {math.gcd(self._start, smallest)}"
            )
        self._done = plan.part_done(progress)
        self._per_sample: float | None = None  # part of the run that a sample is, once that is known
        self._flushes = deque[tuple[int, float]](maxlen=_MAX_STRETCHES + 1)  # samples seen, seconds
        self._corrected_at = self._done

    def __next__(self) -> Step:
        if self._done >= 1:
            raise StopIteration
        begun, start = self._done, self._start
        size = self._plan.batch_size_at(begun, start)
        self._number, self._start, self._done = self._number + 1, start + size, self._part_after(size)
        return Step(
            start=start,
            size=size,
            mask_rate=self._schedules.mask_rate_at(begun),
            number=self._number,
            learning_rate=self._schedules.learning_rate(self._done),
            done=self._done,
        )

    def wants_correction(self, step: Step) -> bool:
        """Whether to flush after `step`, besides the usual times, for the sake of the forecast."""
        if self._plan.minutes is None:
            return False
        return self._per_sample is None or step.done - self._corrected_at > _SHARE_OF_THE_REST * (
            1 - step.done
        )

    def correct(self, step: Step, training_s: float) -> None:
        """Forecast anew, after a flush: with `step`, `training_s` of the run's time have passed."""
        if self._plan.minutes is None:
            return
        # The stretch before the first flush is left out: compiling is no measure of what follows.
        self._flushes.append((step.samples_seen, training_s))
        self._corrected_at = step.done
        stretches = itertools.pairwise(self._flushes)
        seconds = [(now_s - began_s) / (last - first) for (first, began_s), (last, now_s) in stretches]
        if len(seconds) >= _MIN_STRETCHES:
            left_s = 60 * self._plan.minutes - training_s
            # Some of what is left has been handed out to the loader already.
            left = left_s / statistics.median(seconds) - (self._start - step.samples_seen)
            self._per_sample = (1 - self._done) / left if left > 0 else math.inf

    def _part_after(self, size: int) -> float:
        if self._plan.total_samples is not None:
            return (self._start + size) / self._plan.total_samples
        if self._per_sample is None:  # of the first few steps nobody knows how long they take
            return self._done
        done = self._done + size * self._per_sample
        # The step that ends nearest to the end is the last one.
        return done if done + size * self._per_sample / 2 < 1 else 1.0
