"""The course of a run: where ramps step up, how a run of minutes meets its end, how either goes on."""

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaicbert_ds.data.config import MaskingConfig
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.course import Course, Schedules, Step
from mosaicbert_ds.training.optimizer import OptimizerConfig, ScheduleConfig
from mosaicbert_ds.training.plan import BatchConfig, BatchPlan, DurationConfig, plan_batches
from mosaicbert_ds.training.progress import Progress

SCHEDULES = Schedules(
    optimizer=OptimizerConfig(),
    schedule=ScheduleConfig(warmup=0.1),
    mask_rate_at=MaskingConfig(rate=0.3, final_rate=0.15).rate_at,
)
RAMP = ((0.0, 256), (0.1, 1024))


def plan_of(
    ramp: tuple[tuple[float, int], ...], micro: int = 64, world: int = 2, **duration: float
) -> BatchPlan:
    batch = BatchConfig(global_batch_size=ramp[-1][1], micro_batch_size=micro, ramp=ramp)
    length = DurationConfig(**{"samples": None, "minutes": None, **duration})  # type: ignore[arg-type]
    return plan_batches(batch, length, world)


# -- samples


@settings(max_examples=200, deadline=None, database=None)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    marks=st.lists(st.floats(0.001, 0.999), min_size=3, max_size=3, unique=True),
    length=st.integers(1, 50),
    resumed=st.integers(0, 400),
)
def test_a_ramp_steps_up_at_whole_batches_and_ends_with_the_samples(
    sizes: list[int], marks: list[float], length: int, resumed: int
) -> None:
    grown = list(itertools.accumulate([8, *(1 + size for size in sizes[1:])], lambda a, b: a * b))
    ramp = tuple(zip([0.0, *sorted(marks)], grown, strict=False))
    total = length * grown[-1]
    plan = plan_of(ramp, micro=4, samples=total)
    steps = list(Course(plan, SCHEDULES, Progress()))
    assert len(steps) == plan.total_steps
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert [step.start for step in steps] == [0, *(step.samples_seen for step in steps[:-1])]
    assert (steps[-1].samples_seen, steps[-1].done) == (total, 1.0)
    for step in steps:
        due = max(size for mark, size in ramp if mark <= step.start / total)
        assert step.size <= due and step.start % step.size == 0
        assert step.size == due or step.start % due, "a size that is due waits for a multiple of itself alone"
        assert step.mask_rate == SCHEDULES.mask_rate_at(step.start / total)
        assert step.learning_rate == SCHEDULES.learning_rate(step.samples_seen / total)
    before = steps[resumed % len(steps)]
    progress = Progress(step=before.number, samples_seen=before.samples_seen)
    assert list(Course(plan, SCHEDULES, progress)) == steps[before.number :]


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        (((0.1, 256), (0.2, 1024)), "must begin at 0.0"),
        (((0.0, 256), (0.2, 512)), "end with batch.global_batch_size 1024"),
        (
            ((0.0, 256), (0.3, 512), (0.3, 1024)),
            r"from \[0.3, 512\] to \[0.3, 1024\]; the part of the run must grow",
        ),
        (((0.0, 384), (0.2, 1024)), "each batch be a multiple of the one before"),
        (((0.0, 1024), (0.2, 1024)), "each batch be a multiple of the one before"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp: tuple[tuple[float, int], ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        BatchConfig(global_batch_size=1024, ramp=ramp)


def test_a_ramp_that_the_ranks_do_not_divide_is_refused_with_a_way_out() -> None:
    with pytest.raises(
        ConfigError, match=r"has 256, which is no multiple of .* use batch.micro_batch_size=32"
    ):
        plan_of(RAMP, micro=128, world=8, samples=10240)
    assert plan_of(RAMP, micro=32, world=8, samples=10240).gradient_accumulation_steps == 4
    with pytest.raises(ConfigError, match="sizes that are multiples of 512"):
        plan_of(RAMP, micro=2, world=512, samples=10240)


def test_a_run_does_not_go_on_in_the_middle_of_a_batch() -> None:
    with pytest.raises(ConfigError, match="has seen 300 samples, which is no multiple of batch size 256"):
        Course(plan_of(RAMP, samples=10240), SCHEDULES, Progress(step=3, samples_seen=300))


# -- minutes

PREFETCH = 4  # global batches that the loader asks for ahead


def run(
    course: Course, progress: Progress, seconds_of: Callable[[Step], float], log_every: int
) -> Iterator[Step]:
    """What `fit` does, on a clock of its own: the steps as they are made, with `progress` kept."""
    steps, for_loader = itertools.tee(course)
    for _ in range(PREFETCH):
        next(for_loader, None)
    for step in steps:
        next(for_loader, None)
        progress.training_s += seconds_of(step)
        progress.step, progress.samples_seen = step.number, step.samples_seen
        if step.number % log_every == 0 or course.wants_correction(step):
            course.correct(step, progress.training_s)
        yield step


def uneven(rng: random.Random) -> Callable[[Step], float]:
    """Seconds of a step: compiling, new shapes that are recorded, a machine that slows down, hiccups."""

    def seconds_of(step: Step) -> float:
        steady = 0.02 + step.size / 4200 * (1 + 0.2 * step.done)
        once = 25.0 if step.number == 1 else rng.random() * 1.5 if step.number < 40 else 0.0
        return steady * rng.uniform(0.8, 1.2) + once + (1.0 if rng.random() < 0.001 else 0.0)

    return seconds_of


@pytest.mark.parametrize("minutes", [2.0, 20.0])
@pytest.mark.parametrize("log_every", [10, 100])
def test_a_run_of_minutes_ends_in_time_with_its_schedule_at_the_end(minutes: float, log_every: int) -> None:
    for seed in range(5):
        plan, progress = plan_of(RAMP, micro=128, minutes=minutes), Progress()
        course = Course(plan, SCHEDULES, progress)
        clocks, steps = [], []
        for step in run(course, progress, uneven(random.Random(seed)), log_every):
            steps.append(step)
            clocks.append(progress.training_s / (60 * minutes))
        assert clocks[-1] == pytest.approx(1, abs=0.01)
        assert steps[-1].done == 1.0
        assert steps[-1].learning_rate == SCHEDULES.learning_rate(1.0)
        assert all(a.done <= b.done for a, b in itertools.pairwise(steps))
        # Compiling took its part of the time before the first step was over; the schedule makes up for it.
        start_up = clocks[50]
        assert all(
            abs(step.done - clock) < start_up + 0.02 for step, clock in zip(steps, clocks, strict=True)
        )
        sizes = [step.size for step in steps]
        assert sizes == sorted(sizes), "the ramp goes up once"
        first_large = steps[sizes.index(1024)]
        assert first_large.done == pytest.approx(0.1, abs=0.01 + 0.2 / minutes)
        assert first_large.start % 1024 == 0


def test_ranks_that_hear_the_same_clock_take_the_same_steps() -> None:
    plan = plan_of(RAMP, micro=128, minutes=2.0)
    ranks = [Course(plan, SCHEDULES, Progress()) for _ in range(2)]
    runs = [run(course, Progress(), uneven(random.Random(0)), 10) for course in ranks]
    assert list(runs[0]) == list(runs[1])


def test_a_run_of_minutes_goes_on_where_its_clock_stood_and_does_not_go_on_after_its_end() -> None:
    plan, progress = plan_of(RAMP, micro=128, minutes=5.0), Progress()
    rng = random.Random(3)
    for step in run(Course(plan, SCHEDULES, progress), progress, uneven(rng), 10):
        if step.done > 0.6:
            break
    progress.scheduled_s = 300 * step.done
    again = Course(plan, SCHEDULES, progress)
    steps = list(run(again, progress, uneven(rng), 10))
    assert steps[0].start == step.samples_seen and steps[0].number == step.number + 1
    assert steps[0].done == step.done, "until its speed is known again it stands where it stood"
    assert progress.training_s / 300 == pytest.approx(1, abs=0.01)
    assert steps[-1].done == 1.0
    progress.scheduled_s = 300.0
    assert list(Course(plan, SCHEDULES, progress)) == []
    longer = Course(plan_of(RAMP, micro=128, minutes=10.0), SCHEDULES, progress)
    assert next(longer).done == pytest.approx(0.5), "more minutes: it goes on"


def test_a_stall_near_the_end_ends_the_run_at_the_next_chance() -> None:
    plan, progress = plan_of(((0.0, 256),), micro=128, minutes=2.0), Progress()
    stall = {"left": 60.0}

    def seconds_of(step: Step) -> float:
        return 0.1 + (stall.pop("left", 0.0) if step.done > 0.9 else 0.0)

    steps = list(run(Course(plan, SCHEDULES, progress), progress, seconds_of, 10))
    assert steps[-1].done == 1.0
    assert progress.training_s < 0.91 * 120 + 60 + 0.1 * (PREFETCH + 12)
