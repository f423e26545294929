"""The DeepSpeed engine: the only `deepspeed.initialize`, and the only code that knows how ZeRO lays
out weights and moments.

What a run's state is, whatever the ZeRO stage and the number of ranks: for every parameter name the
fp32 weight and Adam's two moments or Muon's one, full shape (`gather`, `scatter`), and one count of Adam
steps.
"""

import datetime
import functools
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.cpp_extension import get_default_build_root

from mosaicbert_ds import dist
from mosaicbert_ds.errors import ConfigError, TrainingError
from mosaicbert_ds.training.ds_config import check_optimizer, holds_fp32_sums, name_accelerator
from mosaicbert_ds.training.micro_batch import MicroBatch
from mosaicbert_ds.training.muon import Muon, is_muons
from mosaicbert_ds.training.optimizer import OptimizerConfig, apply_updates, build_optimizer, muon_groups

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's first and second, by torch's names
_RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)
# The slowest build seen took 110 s on a busy machine; a lock this old belongs to a killed process.
_STALE_LOCK_AGE_S = 15 * 60


class Bf16Compute(nn.Module):
    """Run `module`, whose weights are fp32, on bf16 copies of them.

    Gives at ZeRO stage 0 what DeepSpeed's bf16 gives at stages 1 to 3: bf16 products, fp32 master
    weights, and gradients that accumulate and are summed over ranks in fp32.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        halves = {name: weight.to(torch.bfloat16) for name, weight in self.module.named_parameters()}
        return functional_call(self.module, halves, args, kwargs)


def init_distributed() -> None:
    """Join the run's process group: NCCL on GPUs, gloo on CPUs. A lone process needs no launcher."""
    on_gpu = torch.cuda.is_available()
    defaults = {
        "RANK": dist.rank(),
        "WORLD_SIZE": dist.world_size(),
        "LOCAL_RANK": dist.local_rank(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
        # Recordings of different shapes then share one set of activations, whatever their order.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, str(value))
    _refuse_stale_build_locks()
    name_accelerator()
    # DeepSpeed calls collectives by their former names; torch says so on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed

    if on_gpu:
        torch.cuda.set_device(dist.local_rank())
    try:
        if not on_gpu and not torch.distributed.is_initialized():
            # All meet before any loads DeepSpeed's extension: where the main rank has refused to start, the
            # others are ended while they wait for it, and none leaves a lock that later starts wait for.
            torch.distributed.init_process_group("gloo", timeout=_RENDEZVOUS_TIMEOUT)
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            timeout=_RENDEZVOUS_TIMEOUT,
            verbose=False,
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} is in use, perhaps by another run; "
            "give the launcher another --master_port, or stop that run"
        ) from None


def build_engine(
    model: nn.Module,
    optimizer: OptimizerConfig,
    ds_config: dict[str, Any],
    bf16: bool,
    cuda_graphs: bool = True,
) -> Any:
    """Wrap `model`, whose weights are fp32 and equal on all ranks, in a DeepSpeedEngine.

    DeepSpeed builds its fp32 master weights from the bf16 module. They are written again from the
    original weights, so that every stage starts, and every resumed run goes on, from the same bits.
    Raises ConfigError for what DeepSpeed refuses, and for Muon where it cannot work.
    """
    import deepspeed
    from deepspeed.runtime import bf16_optimizer

    check_optimizer(optimizer, ds_config)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    deepspeed_bf16 = ds_config["bf16"]["enabled"]
    model = model.to(dist.device(), torch.bfloat16 if deepspeed_bf16 else torch.float32)
    matrices = {p: name for name, p in model.named_parameters() if is_muons(name, p)}
    if optimizer.name == "adamw":
        base = build_optimizer(model.parameters(), optimizer)
    else:
        others = [p for p in model.parameters() if p not in matrices]
        base = build_optimizer(muon_groups(list(matrices), others, optimizer), optimizer)
    if units := getattr(model, "zero3_units", None):
        deepspeed.utils.set_z3_leaf_modules(model, units)
    stage = ds_config["zero_optimization"].get("stage", 0)
    module = Bf16Compute(model) if bf16 and not deepspeed_bf16 else model
    if holds_fp32_sums(ds_config):
        record = cuda_graphs and dist.device().type == "cuda" and getattr(model, "is_recordable", False)
        module = MicroBatch(module, record)
    # DeepSpeed looks at each step's gradient norm on the host and skips the step where it is not finite, and
    # waits for the device to do so. The loop looks at the norms of many steps at once and ends the run.
    bf16_optimizer.is_invalid_grad_norm = lambda norm: False
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=base,
            config=ds_config,
            dist_init_required=False,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"DeepSpeed refuses the configuration: {error}") from error
    if stage == 0 and engine.gradient_clipping() > 0:
        engine.clip_fp32_gradients = functools.partial(_clip_and_note_norm, engine)
    elif stage == 0:
        base.register_step_pre_hook(_note_grad_norm)
    if isinstance(module, MicroBatch):
        sums = _sum_gradients_in_fp32(engine, module)
        if optimizer.name == "muon":
            gradients = {matrix: sums[matrix] for matrix in matrices}
            engine.muon = Muon(optimizer.muon.momentum, matrices, gradients)
            base.register_step_pre_hook(functools.partial(_muon_step, engine.muon))
    for name, parameter in named_parameters(engine).items():
        scatter(engine, parameter, "weights", weights[name])
    return engine


def named_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """The model's parameters by the names that checkpoints use."""
    module = engine.module
    while isinstance(module, MicroBatch | Bf16Compute):
        module = module.module
    return dict(module.named_parameters())


def _sum_gradients_in_fp32(engine: Any, micro_batch: MicroBatch) -> dict[nn.Parameter, torch.Tensor]:
    """Tell `micro_batch` where DeepSpeed keeps the summed gradients, and DeepSpeed that they are there.

    Returns them by parameter, in the parameters' shapes.
    """
    optimizer, parameters = engine.optimizer, dict(micro_batch.module.named_parameters())
    if engine.zero_optimization_stage() == 0:
        sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

        def attach(*_: Any) -> None:  # the engine drops `.grad` after each step
            if any(parameter.grad is None for parameter in parameters.values()):
                torch._foreach_zero_(list(sums.values()))
                for name, parameter in parameters.items():
                    parameter.grad = sums[name]

        micro_batch.register_forward_pre_hook(attach)
    else:
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        sum_of = {parameter: flat for pair in groups for parameter, flat in zip(*pair, strict=True)}
        sums = {name: sum_of[parameter].view_as(parameter) for name, parameter in parameters.items()}
        # For the norm: a flat tensor a group, always there, not a list of those that DeepSpeed filled itself.
        flat = optimizer.fp32_groups_actual_gradients_flat
        optimizer.get_grads_for_norm = lambda for_clipping=False: flat if for_clipping else (flat, {})
    micro_batch.sum_into(sums, in_kernels=not isinstance(micro_batch.module, Bf16Compute))
    return {parameter: sums[name] for name, parameter in parameters.items()}


def set_learning_rate(engine: Any, lr: float) -> None:
    """AdamW's; Muon's is a fixed multiple of it."""
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def set_accumulation(engine: Any, micro_batches: int) -> None:
    """Make a step of so many micro batches a rank, from the next one on. Between two steps only."""
    if micro_batches == engine.gradient_accumulation_steps():
        return
    engine.set_train_batch_size(micro_batches * engine.train_micro_batch_size_per_gpu() * dist.world_size())
    # DeepSpeed ends a step where the count of all micro batches so far is a multiple of the new number.
    engine.micro_steps = 0
    # ZeRO's optimizers keep a copy, by which offload decides where it finds the gradients of the norm.
    if hasattr(engine.optimizer, "gradient_accumulation_steps"):
        engine.optimizer.gradient_accumulation_steps = micro_batches


def moments(engine: Any, parameter: nn.Parameter) -> tuple[str, ...]:
    """The kinds of moments that there are of `parameter`: Muon's matrices have the first alone."""
    return MOMENTS[:1] if parameter in _momenta(engine) else MOMENTS


def _momenta(engine: Any) -> dict[nn.Parameter, torch.Tensor]:
    """Muon's, full shape on every rank, by parameter; none without Muon."""
    return engine.muon.momenta if hasattr(engine, "muon") else {}


def gather(engine: Any, parameter: nn.Parameter, kind: str) -> torch.Tensor:
    """The full fp32 tensor of `parameter`: its "weights", "exp_avg" or "exp_avg_sq". A collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind != "weights" and parameter in _momenta(engine):
        return _momenta(engine)[parameter]
    if engine.zero_optimization_stage() == 0:
        return parameter.detach() if kind == "weights" else engine.basic_optimizer.state[parameter][kind]
    full = (
        safe_get_full_fp32_param(parameter)
        if kind == "weights"
        else safe_get_full_optimizer_state(parameter, kind)
    )
    assert full is not None
    return full


@torch.no_grad()
def scatter(engine: Any, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """Write the full fp32 tensor `value`, equal on all ranks, to where ZeRO keeps this rank's part."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    value = value.to(dist.device())
    stage = engine.zero_optimization_stage()
    if kind != "weights" and parameter in _momenta(engine):
        _momenta(engine)[parameter].copy_(value)
    elif stage == 0:
        (parameter if kind == "weights" else engine.basic_optimizer.state[parameter][kind]).copy_(value)
    elif stage == 3:
        # Stage 3 pads a parameter to equal parts; DeepSpeed's full setter does not, and fails there.
        part = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        padded = F.pad(value.flatten(), (0, part * dist.world_size() - value.numel()))
        mine = padded[dist.rank() * part : (dist.rank() + 1) * part]
        if kind == "weights":
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, kind)
    elif kind == "weights":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def create_moments(engine: Any, adam_steps: int) -> None:
    """Make Adam's state before its first step, zero, with `adam_steps` taken; `scatter` then fills it."""
    optimizer, base = engine.optimizer, engine.basic_optimizer
    if engine.zero_optimization_stage() == 3:
        parts = optimizer.fp32_partitioned_groups_flat
    else:
        groups = [group for group in base.param_groups if not group.get("is_muons")]
        parts = [part for group in groups for part in group["params"]]
    for part in parts:
        base.state[part] = {
            "step": torch.tensor(float(adam_steps), device=part.device),
            **{moment: torch.zeros_like(part, requires_grad=False) for moment in MOMENTS},
        }
    if engine.zero_optimization_stage() in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()  # points each parameter at its moments


def adam_steps(engine: Any) -> int:
    """Steps that Adam counts on this rank: what its bias correction uses. Waits for the device."""
    counts = {int(state["step"]) for state in engine.basic_optimizer.state.values() if state}
    assert len(counts) == 1, f"Adam's step counts differ: {counts}"
    return counts.pop()


def _muon_step(muon: Muon, optimizer: Any, args: Any, kwargs: Any) -> None:
    """Before AdamW's step on the others; at stage 1 the group holds one weight, this rank's part of all."""
    muon.gradients_to_updates()
    apply_updates(next(group for group in optimizer.param_groups if group["is_muons"]))


def _note_grad_norm(optimizer: Any, args: Any, kwargs: Any) -> None:
    """At stage 0 DeepSpeed computes no gradient norm; it reports this attribute."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer._global_grad_norm = nn.utils.get_total_norm(gradients)


def _clip_and_note_norm(engine: Any) -> None:
    """The norm before clipping, as the other stages report it."""
    parameters, limit = engine.module.parameters(), engine.gradient_clipping()
    engine.basic_optimizer._global_grad_norm = nn.utils.clip_grad_norm_(parameters, limit)


def _refuse_stale_build_locks() -> None:
    """A killed build leaves a lock file, and every later start waits for it without a word."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")):
        age_s = time.time() - lock.stat().st_mtime
        if age_s > _STALE_LOCK_AGE_S:
            raise TrainingError(
                f"{lock} is {age_s / 60:.0f} minutes old, left by a build that was killed; remove it"
            )
