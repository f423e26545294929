"""The DeepSpeed JSON: what DeepSpeed alone knows, checked, and completed from the recipe.

A file in `ds_configs/` owns the ZeRO stage, buckets, overlap, offload, accumulation type and
clipping. The recipe owns batch sizes, optimizer and schedule; a JSON that states those too, or a key
that is not known here, is refused: DeepSpeed itself accepts a misspelt top-level key in silence.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.plan import BatchPlan
from mosaicbert_ds.typed_yaml import recipe_part

_PACKAGE = Path(__file__).resolve().parent.parent
_FOLDERS = (_PACKAGE.parent / "ds_configs", _PACKAGE / "ds_configs")  # a checkout; an installed wheel

_REQUIRED_KEYS = {
    "bf16": "state it, so that the precision stands in the file",
    "data_types": 'state {"grad_accum_dtype": "fp32"}: DeepSpeed accumulates in bf16 when silent',
    "gradient_clipping": "state 0.0 for none: DeepSpeed clips at 1.0 when silent",
    "zero_optimization": 'state {"stage": 0} for none',
}
_OPTIONAL_KEYS = {
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "wall_clock_breakdown",
    "zero_force_ds_cpu_optimizer",
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
    `precision`: of the matrix products; weights and moments are fp32 either way."""

    deepspeed: str = "zero1"
    precision: Literal["bf16", "fp32"] = "bf16"


def read_ds_config(config: EngineConfig) -> dict[str, Any]:
    """Find, read and check the JSON that `config.deepspeed` names. Raises ConfigError."""
    path = _find(config.deepspeed)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, not an object")
    for key in tree:
        if key in _RECIPE_KEYS:
            raise ConfigError(f"{path}: '{key}' belongs to the recipe; set {_RECIPE_KEYS[key]} there")
        if key not in _REQUIRED_KEYS and key not in _OPTIONAL_KEYS:
            allowed = ", ".join(sorted({*_REQUIRED_KEYS, *_OPTIONAL_KEYS}))
            raise ConfigError(f"{path}: unknown key '{key}'; allowed are {allowed}")
    for key, reason in _REQUIRED_KEYS.items():
        if key not in tree:
            raise ConfigError(f"{path}: key '{key}' is missing; {reason}")
    clipping = tree["gradient_clipping"]
    if (
        isinstance(clipping, bool)
        or not isinstance(clipping, (int, float))
        or not 0 <= clipping < float("inf")
    ):
        raise ConfigError(
            f"{path}: gradient_clipping is {clipping!r}; allowed is a number >= 0, 0.0 for none"
        )
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
    elif not tree["bf16"].get("enabled"):
        raise ConfigError(
            f"engine.precision is bf16 but {config.deepspeed} says bf16.enabled false; change one"
        )
    return resolved | {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
    }


def zero_stage(tree: dict[str, Any]) -> int:
    return tree["zero_optimization"].get("stage", 0)


def _find(name: str) -> Path:
    candidates = [Path(name), *(folder / f"{name}.json" for folder in _FOLDERS)]
    for path in candidates:
        if path.suffix == ".json" and path.is_file():
            return path
    shipped = sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.json")})
    raise ConfigError(
        f"engine.deepspeed is '{name}'; allowed are {', '.join(shipped)} or the path of a .json file"
    )


def _check_zero(block: Any, path: Path) -> None:
    # Imported late: a recipe can be read and a plan made on a machine without DeepSpeed's 2 s start.
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**block)
    except (ValidationError, TypeError) as error:
        faults = (
            error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": "is no object"}]
        )
        key = ".".join(str(part) for part in ("zero_optimization", *faults[0]["loc"]))
        raise ConfigError(f"{path}: {key}: {faults[0]['msg']}") from None
