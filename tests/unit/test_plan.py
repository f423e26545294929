"""Batch arithmetic, the learning-rate schedule and the weight decay against their definitions."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mosaicbert_ds.config import RunConfig, load_recipe
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.course import Schedules
from mosaicbert_ds.training.optimizer import OptimizerConfig, ScheduleConfig, build_optimizer
from mosaicbert_ds.training.plan import BatchConfig, BatchPlan, DurationConfig, plan_batches
from mosaicbert_ds.training.progress import crosses
from mosaicbert_ds.typed_yaml import from_tree, merge, parse_overrides, to_tree

TINY = to_tree(load_recipe("tiny"))

# -- batch arithmetic

sizes = st.one_of(st.integers(1, 64), st.integers(1, 4096), st.sampled_from([128, 512, 4096, 1 << 22]))


def _oracle(total: int, micro: int, given: int | None, world: int, samples: int) -> int | None:
    """The accumulation, by trying all that can be; None where none fits."""
    fits = [steps for steps in range(1, total // (micro * world) + 1) if micro * steps * world == total]
    return fits[0] if fits and given in (None, fits[0]) and samples % total == 0 else None


@settings(max_examples=1000, deadline=None, database=None)
@given(
    total=sizes,
    micro=st.integers(1, 4096),
    given=st.one_of(st.none(), st.integers(1, 64)),
    world=st.one_of(st.integers(1, 64), st.sampled_from([64, 128, 256, 512])),
    samples=st.integers(1, 1 << 40),
    fitting=st.integers(0, 3),
)
@example(total=4096, micro=128, given=None, world=24, samples=286_720_000, fitting=0)
@example(total=4096, micro=128, given=3, world=8, samples=286_720_000, fitting=0)
@example(total=1 << 22, micro=4096, given=None, world=5, samples=1, fitting=0)
def test_the_plan_is_the_one_that_multiplies_out_or_says_what_would_be(
    total: int, micro: int, given: int | None, world: int, samples: int, fitting: int
) -> None:
    # Numbers at random hardly ever meet: half of the cases are made to.
    micro = math.gcd(total, micro) if fitting > 0 else micro
    world = math.gcd(total // micro, world) if fitting > 0 and total % micro == 0 else world
    samples = max(samples // total, 1) * total if fitting > 1 else samples
    batch = BatchConfig(global_batch_size=total, micro_batch_size=micro, gradient_accumulation_steps=given)
    expected = _oracle(total, micro, given, world, samples)
    try:
        plan = plan_batches(batch, DurationConfig(samples=samples), world)
    except ConfigError as error:
        assert expected is None
        _follow(str(error), batch, samples, world)
    else:
        assert plan.gradient_accumulation_steps == expected
        assert (plan.global_batch_size, plan.micro_batch_size, plan.world_size) == (total, micro, world)
        assert (plan.total_samples, plan.total_steps) == (samples, samples / total)


def _follow(message: str, batch: BatchConfig, samples: int, world: int) -> BatchPlan:
    """Give the overrides that `message` says to give: they work, and change no more than they must."""
    overrides = re.findall(r"[a-z_.]+=\d+", message)
    assert overrides, message
    given = [
        f"batch.global_batch_size={batch.global_batch_size}",
        f"batch.micro_batch_size={batch.micro_batch_size}",
        f"batch.gradient_accumulation_steps={batch.gradient_accumulation_steps or 'null'}",
        f"duration.samples={samples}",
    ]
    assert not set(overrides) & set(given), "advice to give what was given"
    recipe = from_tree(RunConfig, merge(TINY, parse_overrides(given + overrides)), "the way out")
    plan = plan_batches(recipe.batch, recipe.duration, world)
    assert plan.micro_batch_size <= batch.micro_batch_size, "a larger micro batch may not fit into memory"
    if batch.global_batch_size % world == 0:
        assert plan.global_batch_size == batch.global_batch_size
    return plan


def test_a_plan_for_no_ranks_is_refused() -> None:
    for world_size in (0, -8):
        with pytest.raises(ConfigError, match=f"the number of ranks is {world_size}; allowed is 1 or more"):
            plan_batches(BatchConfig(), DurationConfig(), world_size)


def test_marks_are_crossed_at_the_first_batch_that_reaches_them() -> None:
    def crossed(batch: int, every: int, until: int) -> list[int]:
        return [after for after in range(batch, until + 1, batch) if crosses(after - batch, after, every)]

    assert crossed(32, 1000, 4000) == [1024, 2016, 3008, 4000]
    assert crossed(1, 3, 10) == [3, 6, 9]
    assert crossed(1000, 300, 3000) == [1000, 2000, 3000]


# -- schedule

TOTAL = 286_720_000  # samples


@pytest.mark.parametrize(
    ("samples_seen", "lr"),
    [
        (4096, 5e-4 * 4096 / 17_203_200),  # the first of 70,000 steps
        (8_601_600, 2.5e-4),  # 3 %: half of the warmup
        (17_203_200, 5e-4),  # 6 %: the peak
        (151_961_600, 5e-4 * 0.51),  # 53 %: half of the decay from 1 to 0.02
        (219_340_800, 5e-4 * 0.265),  # 76.5 %: three quarters of it
        (TOTAL, 1e-5),  # 0.02 x peak
    ],
)
def test_the_learning_rate_is_the_published_one(samples_seen: int, lr: float) -> None:
    recipe = load_recipe("mosaicbert-base")
    factor = recipe.schedule.lr_factor_at(samples_seen / TOTAL)
    assert recipe.optimizer.peak_lr * factor == pytest.approx(lr, rel=1e-12)


def test_the_loop_counts_the_step_that_it_makes_as_done() -> None:
    """The first step has a rate above zero and the last one the final rate."""
    recipe = load_recipe("tiny")
    rate = Schedules(
        optimizer=recipe.optimizer, schedule=recipe.schedule, mask_rate_at=recipe.masking.rate_at
    ).learning_rate
    steps = recipe.duration.samples // recipe.batch.global_batch_size
    rates = [rate(step / steps) for step in range(1, steps + 1)]
    assert rates[0] == pytest.approx(2e-3 / 60)  # 1,000 steps, of which 60 warm up
    assert rates[59] == max(rates) == pytest.approx(2e-3)
    assert rates[-1] == pytest.approx(4e-5)
    slopes = {round((b - a) / 2e-3, 9) for a, b in itertools.pairwise(rates)}
    assert slopes == {round(1 / 60, 9), round(-0.98 / 940, 9)}, "two straight lines"


@settings(max_examples=300, deadline=None, database=None)
@given(
    shape=st.sampled_from(["linear", "cosine", "wsd"]),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
    final=st.floats(0, 1),
    progress=st.floats(0, 1, exclude_min=True),
    step=st.floats(0, 1),
)
@example(shape="linear", warmup=0.0, decay=0.0, final=0.0, progress=1.0, step=0.0)
@example(shape="linear", warmup=1.0, decay=0.0, final=0.0, progress=1.0, step=0.5)
@example(shape="cosine", warmup=1.0, decay=0.0, final=0.0, progress=1.0, step=0.5)
@example(shape="wsd", warmup=0.5, decay=0.5, final=0.0, progress=0.5, step=0.5)
def test_the_rate_rises_then_falls_between_its_ends(
    shape: Any, warmup: float, decay: float, final: float, progress: float, step: float
) -> None:
    schedule = ScheduleConfig(
        shape=shape,
        warmup=warmup,
        decay=min(decay, 1 - warmup) if shape == "wsd" else None,
        final_lr_fraction=final,
    )
    now, later = schedule.lr_factor_at(progress), schedule.lr_factor_at(progress + step * (1 - progress))
    assert 0 <= now <= 1
    if progress >= warmup:
        assert final - 1e-12 <= later <= now + 1e-12
    elif progress + step * (1 - progress) <= warmup:
        assert later >= now - 1e-12
    if warmup < 1 and (schedule.decay is None or schedule.decay > 1e-9):
        assert schedule.lr_factor_at(1.0) == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        (
            ScheduleConfig(shape="cosine", warmup=0.1, final_lr_fraction=0.1),
            {0.05: 0.5, 0.1: 1.0, 0.325: 0.1 + 0.9 * (1 + 0.5**0.5) / 2, 0.55: 0.55, 1.0: 0.1},
        ),
        (
            ScheduleConfig(shape="wsd", warmup=0.1, decay=0.2, final_lr_fraction=0.0),
            {0.05: 0.5, 0.1: 1.0, 0.5: 1.0, 0.8: 1.0, 0.9: 0.5, 0.95: 0.25, 1.0: 0.0},
        ),
    ],
    ids=["cosine", "wsd"],
)
def test_cosine_and_wsd_go_through_their_points(schedule: ScheduleConfig, points: dict[float, float]) -> None:
    assert {at: schedule.lr_factor_at(at) for at in points} == pytest.approx(points, abs=1e-12)


def test_a_decay_goes_with_wsd_and_with_no_other_shape() -> None:
    with pytest.raises(ValueError, match=r"decay is null with schedule.shape wsd; give the part of the run"):
        ScheduleConfig(shape="wsd")
    with pytest.raises(ValueError, match=r"decay is 0.2 with schedule.shape linear; .* null with the others"):
        ScheduleConfig(decay=0.2)
    with pytest.raises(ValueError, match=r"warmup 0.5 and schedule.decay 0.6 are more than the run"):
        ScheduleConfig(shape="wsd", warmup=0.5, decay=0.6)


# -- weight decay


@pytest.mark.parametrize("name", ["mosaicbert-base", "mosaicbert-large"])
def test_a_step_of_the_optimizer_decays_weights_as_published(name: str) -> None:
    """weights x (1 - lr_t / lr_peak x weight_decay), then Adam's update, on PyTorch's own AdamW."""
    config, schedule = load_recipe(name).optimizer, load_recipe(name).schedule
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(257, dtype=torch.float64))
    optimizer = build_optimizer([weight], config)
    expected, m, v = weight.detach().clone(), torch.zeros(257), torch.zeros(257)
    beta1, beta2 = config.betas
    for step, progress in enumerate((0.01, 0.06, 0.5, 1.0), start=1):
        lr = config.peak_lr * schedule.lr_factor_at(progress)
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.randn(257, dtype=torch.float64)
        m = beta1 * m + (1 - beta1) * weight.grad
        v = beta2 * v + (1 - beta2) * weight.grad**2
        expected *= 1 - lr / config.peak_lr * 1e-5
        expected -= lr * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-6)
        optimizer.step()
        # Far below the decay of one step (1e-5 of a weight, even at a hundredth of the peak).
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=1e-13)


def test_a_run_of_base_decays_weights_by_30_percent() -> None:
    """70,000 steps at a mean of about half the peak: exp(-0.7 x 0.51). AdamW with 1e-5 itself: 0.02 %."""
    config = OptimizerConfig()
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    weight.grad = torch.zeros(1, dtype=torch.float64)
    optimizer, schedule = build_optimizer([weight], config), ScheduleConfig()
    steps, stride = 70_000, 100  # every hundredth step, the rest by power
    for step in range(stride // 2, steps, stride):
        lr = config.peak_lr * schedule.lr_factor_at(step / steps)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    mean_factor = 0.06 * 0.5 + 0.94 * 0.51
    assert weight.item() ** stride == pytest.approx(math.exp(-70_000 * 1e-5 * mean_factor), rel=1e-5)
