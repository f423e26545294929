"""The DeepSpeed JSON: what DeepSpeed alone knows, checked, and completed from the recipe.

A file in `ds_configs/` owns the ZeRO stage, buckets, overlap, offload, accumulation type and
clipping. The recipe owns batch sizes, optimizer and schedule; a JSON that states those too, or a key
that is not known here, is refused: DeepSpeed itself accepts a misspelt top-level key in silence.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import ModelConfig
from mosaicbert_ds.training.optimizer import OptimizerConfig
from mosaicbert_ds.training.plan import BatchPlan
from mosaicbert_ds.typed_yaml import from_tree, recipe_part

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")  # a checkout; an installed wheel

_REQUIRED_KEYS = {
    "bf16": "state it, so that the precision stands in the file",
    "data_types": 'state {"grad_accum_dtype": "fp32"}: DeepSpeed accumulates in bf16 when silent',
    "gradient_clipping": "state 0.0 for none: DeepSpeed clips at 1.0 when silent",
    "zero_optimization": 'state {"stage": 0} for none',
}
_RECIPE_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.gradient_accumulation_steps",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "tensorboard": "telemetry",
}


@recipe_part
class EngineConfig:
    """`deepspeed`: a file of ds_configs/ by name (`zero1`) or a path to a JSON file.
    `precision`: of the matrix products; weights and moments are fp32 either way.
    `kernels`: of the hot path; auto is triton on a GPU that can run it, torch elsewhere.
    `cuda_graphs`: at ZeRO 0 and 1 on a GPU; false to see each kernel's own error, or to debug the model.
    `compile`: BERT's layers by torch.compile, half a minute at the first start; MosaicBERT's have kernels."""

    deepspeed: str = "zero1"
    precision: Literal["bf16", "fp32"] = "bf16"
    kernels: Literal["auto", "triton", "torch"] = "auto"
    cuda_graphs: bool = True
    compile: bool = False


@recipe_part
class Bf16:
    """DeepSpeed's other keys of this block give up the fp32 master weights that a checkpoint holds."""

    enabled: bool
    check_grad_overflow: bool = True


@recipe_part
class DataTypes:
    grad_accum_dtype: Literal["fp32", "bf16"]


@recipe_part
class DeepSpeedJson:
    """The keys that a file of ds_configs/ may have; `zero_optimization` is checked by DeepSpeed itself."""

    bf16: Bf16
    data_types: DataTypes
    gradient_clipping: Annotated[float, Field(ge=0)]
    zero_optimization: dict[str, Any]
    communication_data_type: Literal["fp32", "bf16"] | None = None
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    memory_breakdown: bool = False
    prescale_gradients: bool = False
    wall_clock_breakdown: bool = False
    zero_force_ds_cpu_optimizer: bool = True


def read_ds_config(config: EngineConfig) -> dict[str, Any]:
    """Find, read and check the JSON that `config.deepspeed` names. Raises ConfigError."""
    path = _find(config.deepspeed)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not an object")
    for key, owner in _RECIPE_KEYS.items():
        if key in tree:
            raise ConfigError(f"{path}: '{key}' belongs to the recipe; set {owner} there")
    for key, reason in _REQUIRED_KEYS.items():
        if key not in tree:
            raise ConfigError(f"{path}: key '{key}' is missing; {reason}")
    from_tree(DeepSpeedJson, tree, str(path))
    _check_zero(tree["zero_optimization"], path)
    return tree


def resolve_ds_config(tree: dict[str, Any], config: EngineConfig, plan: BatchPlan) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: the JSON with the batch sizes of `plan` filled in.

    At stage 0, and in fp32, DeepSpeed is told fp32. Its own bf16 at stage 0 neither accumulates in
    fp32 nor counts Adam's steps right (it takes one step with zero gradients at its start), so the
    engine runs fp32 weights with bf16 copies of its own there; see `engine.Bf16Compute`.
    """
    resolved = dict(tree)
    if config.precision == "fp32" or zero_stage(tree) == 0:
        resolved["bf16"] = {"enabled": False}
        resolved["data_types"] = {"grad_accum_dtype": "fp32"}
    elif not tree["bf16"]["enabled"]:
        raise ConfigError(
            f"engine.precision is bf16 but {config.deepspeed} says bf16.enabled false; change one"
        )
    return resolved | {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        # DeepSpeed's own speedometer waits for the device around every micro batch.
        "timers": {"throughput": {"enabled": False}},
    }


def holds_fp32_sums(ds_config: dict[str, Any]) -> bool:
    """Whether every rank holds the summed gradient of all parameters in fp32, on its device.

    At stage 1 this is DeepSpeed's BF16_Optimizer, taken for bf16 with fp32 sums and no offload.
    """
    zero = ds_config["zero_optimization"]
    return zero.get("stage", 0) == 0 or (
        zero["stage"] == 1
        and ds_config["bf16"]["enabled"]
        and ds_config["data_types"]["grad_accum_dtype"] == "fp32"
        and not zero.get("offload_optimizer")
    )


def check_optimizer(optimizer: OptimizerConfig, ds_config: dict[str, Any]) -> None:
    """Refuse Muon where ranks hold parts of the summed gradients only. Raises ConfigError."""
    if optimizer.name == "muon" and not holds_fp32_sums(ds_config):
        precision = "bf16" if ds_config["bf16"]["enabled"] else "fp32"
        raise ConfigError(
            f"optimizer.name is muon at ZeRO stage {zero_stage(ds_config)} in {precision}; Muon needs whole "
            "gradients on every rank: use engine.deepspeed=zero0, or zero1 with engine.precision=bf16"
        )


def check_recomputation(model: ModelConfig, config: EngineConfig, ds_config: dict[str, Any]) -> None:
    """Refuse activation checkpointing where layers are recomputed without `engine.Bf16Compute`'s copies.
    Raises ConfigError."""
    if model.activation_checkpointing and config.precision == "bf16" and zero_stage(ds_config) == 0:
        raise ConfigError(
            "model.activation_checkpointing is true at ZeRO stage 0 in bf16, whose bf16 weights are gone "
            "when layers are recomputed; use engine.deepspeed=zero1 or engine.precision=fp32"
        )


def name_accelerator() -> None:
    """Before DeepSpeed's import: name the CPU where there is no GPU, or it warns on every rank."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def zero_stage(tree: dict[str, Any]) -> int:
    return tree["zero_optimization"]["stage"]


def _find(name: str) -> Path:
    candidates = [Path(name), *(folder / f"{name}.json" for folder in _FOLDERS)]
    for path in candidates:
        if path.suffix == ".json" and path.is_file():
            return path
    shipped = sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.json")})
    raise ConfigError(
        f"engine.deepspeed is '{name}'; allowed are {', '.join(shipped)} or the path of a .json file"
    )


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"key '{name}' is given twice; remove one of them")
    return dict(pairs)


def _check_zero(block: dict[str, Any], path: Path) -> None:
    if type(block.get("stage")) is not int:
        given = json.dumps(block.get("stage"))
        raise ConfigError(f"{path}: zero_optimization.stage is {given}; allowed are 0, 1, 2 and 3")
    name_accelerator()
    # Imported late: a recipe can be read and a plan made on a machine without DeepSpeed's 2 s start.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**block)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in ("zero_optimization", *fault["loc"]))
        # A fault without a place is of keys that do not go together.
        given = json.dumps(fault["input"] if fault["loc"] else block)
        raise ConfigError(f"{path}: {key} is {given}; {fault['msg'][0].lower()}{fault['msg'][1:]}") from None
    if block.get("round_robin_gradients"):
        raise ConfigError(
            f"{path}: zero_optimization.round_robin_gradients is true; DeepSpeed then takes one parameter's "
            "fp32 weights for another's, in training and in checkpoints; leave it out"
        )
