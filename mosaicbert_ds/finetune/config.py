"""The recipe of a finetuning: what all tasks share, and a row of numbers for each."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mosaicbert_ds.model.config import Rate
from mosaicbert_ds.training.optimizer import Beta, OptimizerConfig, ScheduleConfig
from mosaicbert_ds.typed_yaml import read_recipe, recipe_part

_RECIPES = Path(__file__).parents[1] / "recipes" / "finetune"
PRETRAINED = "pretrained"  # what a task starts from that starts from no other task

LARGEST_SEED = (1 << 32) - 1
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]


@recipe_part
class TaskRecipe:
    """One task's numbers. `weight_decay` is decoupled: AdamW's is weight_decay / peak_lr."""

    starts_from: str = PRETRAINED  # or a task: its encoder and pooler, under a new classifier
    epochs: Annotated[int, Field(ge=1, le=1000)]
    peak_lr: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    batch_size: Annotated[int, Field(ge=1, le=4096)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} name one twice; each is one job")


@recipe_part
class FinetuneConfig:
    """Everything that decides what a finetuning computes."""

    max_length: Annotated[int, Field(ge=8, le=65_536)] = 256
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    schedule: ScheduleConfig = ScheduleConfig(warmup=0.06, final_lr_fraction=0.0)
    hidden_dropout: Rate | None = None  # None: the model's own
    shuffle: bool = True
    sort_window: Annotated[int, Field(ge=1, le=10_000)] = 16
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    tasks: dict[str, TaskRecipe]

    def optimizer(self, task: str) -> OptimizerConfig:
        row = self.tasks[task]
        return OptimizerConfig(
            peak_lr=row.peak_lr, betas=self.betas, eps=self.eps, weight_decay=row.weight_decay
        )


def load_finetune_recipe(name: str, overrides: list[str] | None = None) -> FinetuneConfig:
    """A shipped recipe (`glue`, `glue-short`, `task`) or a YAML file, with `key=value` overrides over it.

    Raises ConfigError naming the file, the key, what was given and what is allowed.
    """
    return read_recipe(FinetuneConfig, name, _RECIPES, overrides)
