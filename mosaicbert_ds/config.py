"""The recipe of a run: the rooms' own dataclasses composed, read from YAML and dotted overrides."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from mosaicbert_ds.data.config import DataConfig, MaskingConfig
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model.build import count_parameters
from mosaicbert_ds.model.config import VOCAB_MULTIPLE, ModelConfig
from mosaicbert_ds.training.checkpoint import CheckpointConfig
from mosaicbert_ds.training.ds_config import EngineConfig
from mosaicbert_ds.training.loop import EvaluationConfig
from mosaicbert_ds.training.optimizer import MuonConfig, OptimizerConfig, ScheduleConfig
from mosaicbert_ds.training.plan import BatchConfig, BatchPlan, DurationConfig
from mosaicbert_ds.training.telemetry import TelemetryConfig
from mosaicbert_ds.typed_yaml import read_recipe, recipe_part, recipes_in, to_tree

_RECIPES = Path(__file__).parent / "recipes"


@recipe_part
class RunConfig:
    """Everything that decides what a run computes. Defaults are MosaicBERT-Base's."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    masking: MaskingConfig = MaskingConfig()
    batch: BatchConfig = BatchConfig()
    duration: DurationConfig = DurationConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    seed: Annotated[int, Field(ge=0, lt=1 << 32)] = 17  # what every generator takes

    def __post_init__(self) -> None:
        longest = self.model.max_position_embeddings
        if self.model.architecture == "bert" and self.data.max_length > longest:
            raise ValueError(
                f"data.max_length {self.data.max_length} is over the {longest} positions that a bert model "
                "has; lower it or raise model.max_position_embeddings"
            )

        if self.model.architecture != "bert" and self.engine.compile:
            raise ValueError(
                f"engine.compile is true with model.architecture {self.model.architecture}, whose layers are "
                "kernels already; leave it out, or use it with bert"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a tokenizer of `vocab_size` ids that has more than the model has rows."""
        if vocab_size > self.model.vocab_size:
            rows = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
            raise ConfigError(
                f"model.vocab_size {self.model.vocab_size} is less than the tokenizer's {vocab_size}; "
                f"use model.vocab_size={rows}"
            )

    def to_yaml(self) -> str:
        return yaml.safe_dump(to_tree(self), sort_keys=False)

    def with_accumulation(self, steps: int) -> "RunConfig":
        """The recipe with the accumulation that the batch plan filled in."""
        batch = dataclasses.replace(self.batch, gradient_accumulation_steps=steps)
        return dataclasses.replace(self, batch=batch)


def load_recipe(name: str, overrides: list[str] | None = None) -> RunConfig:
    """A shipped recipe by name, or a YAML file by path, with `key=value` overrides laid over it.

    Raises ConfigError naming the file or override, the key, what was given and what is allowed.
    """
    return read_recipe(RunConfig, name, _RECIPES, overrides)


def shipped_recipes() -> list[str]:
    return recipes_in(_RECIPES)


def describe(config: RunConfig, plan: BatchPlan, ds_config: dict[str, Any]) -> str:
    """What a run of `config` would be, for `--dry-run`: nothing is built and nothing is read but this."""
    peak = config.optimizer.peak_lr
    points = [tenth / 9 for tenth in range(10)]
    lines = "\n".join(
        f"  {_place(plan, done)}  {peak * config.schedule.lr_factor_at(done):.3e}"
        + (f"  global batch {plan.batch_size_at(done, 0):,}" if plan.ramp else "")
        for done in points
    )
    notes = ""
    if config.optimizer.name == "muon":
        muon = config.optimizer.muon
        notes += f"\nMuon on the hidden layers' matrices: peak {muon.peak_lr:g}, weight decay {_decay(muon)}"
    if plan.minutes is not None:
        notes += "\nsteps follow from the speed: the schedule goes by the main rank's clock, and ends in time"
    return f"""# resolved recipe
{config.to_yaml()}
# derived
parameters: {count_parameters(config.model):,}{notes}
AdamW-equivalent weight decay: {_decay(config.optimizer)}
batch: {plan}
mask rate: {config.masking.rate_at(0.0):g} at the start, {config.masking.rate_at(1.0):g} at the end
learning rate:
{lines}

# DeepSpeed config
{json.dumps(ds_config, indent=2)}"""


def _decay(rates: OptimizerConfig | MuonConfig) -> str:
    return f"{rates.adamw_weight_decay:g} (decoupled {rates.weight_decay:g})"


def _place(plan: BatchPlan, done: float) -> str:
    """The point of the run where the part `done` of it is done, in the unit of its duration."""
    if plan.total_samples is None:
        return f"{(plan.minutes or 0) * done:15.2f} minutes"
    return f"{round(plan.total_samples * done):>15,} samples"
