"""A training run as `pretrain.py` puts it together, less what a measurement has no use for.

Each measurement is a process of its own (`in_fresh_process`), so that none finds memory, compiled code or
captured graphs of the one before.
"""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from mosaicbert_ds import dist
from mosaicbert_ds.bench.workload import lengths_like_c4, random_text
from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.data.loader import Batch, pretraining_batches
from mosaicbert_ds.data.shards import ShardSet
from mosaicbert_ds.data.tokenizer import load_tokenizer
from mosaicbert_ds.model import build_pretraining_model
from mosaicbert_ds.ops import choose_kernels
from mosaicbert_ds.training.course import Course, Schedules
from mosaicbert_ds.training.ds_config import read_ds_config, resolve_ds_config
from mosaicbert_ds.training.engine import build_engine, init_distributed
from mosaicbert_ds.training.loop import train_step
from mosaicbert_ds.training.plan import BatchConfig, BatchPlan, DurationConfig, plan_batches
from mosaicbert_ds.training.progress import Progress, step_seed

# Steps whose batches are all different, then they come again: a batch repeated alone would hide what new
# lengths cost.
DIFFERENT_STEPS = 2
_STEPS_OF_A_RUN = 70_000  # the published length; it only decides how small the first learning rates are

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is trained on: the shards in `folder`, or random ids, whose rows are all full if asked for."""

    folder: Path | None = None
    full_rows: bool = False


def with_micro_batch(recipe: RunConfig, micro_batch_size: int) -> RunConfig:
    """The recipe at another micro batch and the same global one. Raises ConfigError if they do not meet."""
    batch = BatchConfig(global_batch_size=recipe.batch.global_batch_size, micro_batch_size=micro_batch_size)
    recipe = replace(
        recipe, batch=batch, duration=DurationConfig(samples=batch.global_batch_size * _STEPS_OF_A_RUN)
    )
    plan_batches(recipe.batch, recipe.duration, dist.world_size())
    return recipe


class TrainingRun:
    """Engine, batches and schedule of `recipe`; `step` does what each step of `training.loop.fit` does."""

    def __init__(
        self,
        recipe: RunConfig,
        text: Text,
        build_model: Callable[[RunConfig], nn.Module] = lambda recipe: build_pretraining_model(recipe.model),
    ) -> None:
        plan = plan_batches(recipe.batch, recipe.duration, dist.world_size())
        ds_config = resolve_ds_config(read_ds_config(recipe.engine), recipe.engine, plan)
        if text.folder:
            shards, tokenizer = ShardSet.open(text.folder, "train"), load_tokenizer(text.folder / "tokenizer")
        else:
            count, longest = DIFFERENT_STEPS * plan.global_batch_size, recipe.data.max_length
            lengths = [longest] * count if text.full_rows else lengths_like_c4(count, longest)
            shards, tokenizer = random_text(lengths, recipe.model.vocab_size, recipe.data)
        shards.check_tokenizer(tokenizer)
        shards.check_settings(recipe.data)
        recipe.check_vocabulary(tokenizer.vocab_size)
        choose_kernels(recipe.engine.kernels)

        init_distributed()
        torch.manual_seed(recipe.seed)
        model = build_model(recipe)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.plan: BatchPlan = plan
        self.engine = build_engine(
            model,
            recipe.optimizer,
            ds_config,
            bf16=recipe.engine.precision == "bf16",
            cuda_graphs=recipe.engine.cuda_graphs and not recipe.model.activation_checkpointing,
        )
        schedules = Schedules(
            optimizer=recipe.optimizer, schedule=recipe.schedule, mask_rate_at=recipe.masking.rate_at
        )
        self._steps, for_loader = itertools.tee(Course(plan, schedules, Progress()))
        self.batches: Generator[list[Batch], None, None] = pretraining_batches(
            shards,
            tokenizer,
            recipe.data,
            for_loader,
            micro_batch_size=plan.micro_batch_size,
            seed=recipe.seed,
            rank=dist.rank(),
            world_size=plan.world_size,
        )
        self.recipe = recipe

    def next_batches(self) -> list[Batch]:
        """The loader's next global batch, on its way to the device as `fit` sends it there."""
        return [batch.to(dist.device()) for batch in next(self.batches)]

    def step(self, micro_batches: list[Any]) -> None:
        """One optimizer step on a global batch that lies on the device. Does not wait for the device."""
        step = next(self._steps)
        train_step(
            self.engine,
            micro_batches,
            step.learning_rate,
            self.plan,
            step_seed(self.recipe.seed, step.start, dist.rank()),
        )


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(...)`, importable, in a process that then ends. What libraries print goes to stderr there,
    because stdout is the report's. Errors come out here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=os.dup2, initargs=(2, 1)) as pool:
        return pool.submit(function, *args, **kwargs).result()
