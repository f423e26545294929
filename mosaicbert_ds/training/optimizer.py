"""Decoupled AdamW with the published meaning, Muon beside it where asked for, and the learning-rate schedule.

The published optimizer multiplies every weight by `1 - (lr_t / lr_peak) * weight_decay` each step;
AdamW by `1 - lr_t * weight_decay_adamw`. They are the same for

    weight_decay_adamw = weight_decay / lr_peak

so 1e-5 at a peak of 5e-4 is AdamW's 0.02. A recipe states the decoupled value, Muon's likewise.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from mosaicbert_ds.typed_yaml import recipe_part

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PeakRate = Annotated[float, Field(gt=0, le=1)]


class _PeakAndDecay:
    """What the decay of AdamW's parameters and that of Muon's have in common."""

    peak_lr: float
    weight_decay: float

    @property
    def adamw_weight_decay(self) -> float:
        """The `weight_decay` that torch.optim.AdamW takes for the same decay."""
        return self.weight_decay / self.peak_lr


@recipe_part
class MuonConfig(_PeakAndDecay):
    """Of the hidden layers' matrices. Both rates follow the one schedule, each from its own peak."""

    peak_lr: PeakRate = 2e-3
    momentum: Beta = 0.95
    weight_decay: Fraction = 1e-5


@recipe_part
class OptimizerConfig(_PeakAndDecay):
    """adamw: on all parameters. muon: Muon on the hidden layers' matrices, AdamW on the others; at ZeRO 0,
    and at 1 in bf16. `weight_decay` is the decoupled value, see above, of what is AdamW's; `muon` counts
    with muon only."""

    name: Literal["adamw", "muon"] = "adamw"
    peak_lr: PeakRate = 5e-4
    muon: MuonConfig = MuonConfig()
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    weight_decay: Fraction = 1e-5


@recipe_part
class ScheduleConfig:
    """Linear warmup over `warmup` of the run, then the way down to `final_lr_fraction` x peak.

    linear, cosine: over all of the rest. wsd: warmup, stable, decay: at the peak until the last `decay` of
    the run, then linear (arXiv 2404.06395).
    """

    shape: Literal["linear", "cosine", "wsd"] = "linear"
    warmup: Fraction = 0.06
    decay: Fraction | None = None
    final_lr_fraction: Fraction = 0.02

    def __post_init__(self) -> None:
        if (self.shape == "wsd") != (self.decay is not None):
            raise ValueError(
                f"schedule.decay is {'null' if self.decay is None else self.decay} with schedule.shape "
                f"{self.shape}; give the part of the run that decays with wsd, and null with the others"
            )
        if self.warmup + (self.decay or 0) > 1:
            raise ValueError(
                f"schedule.warmup {self.warmup} and schedule.decay {self.decay} are more than the run; "
                "lower one"
            )

    def lr_factor_at(self, progress: float) -> float:
        """Learning rate as a fraction of the peak, for `progress` in (0, 1]: the part of the run
        that is done when the update of this step is made."""
        if progress < self.warmup:
            return progress / self.warmup
        stable_until = self.warmup if self.decay is None else 1 - self.decay
        decayed = (progress - stable_until) / (1 - stable_until) if progress > stable_until else 0.0
        if self.shape == "cosine":
            decayed = (1 - math.cos(math.pi * decayed)) / 2
        return 1 - decayed * (1 - self.final_lr_fraction)


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]], config: OptimizerConfig
) -> torch.optim.AdamW:
    """PyTorch's fused AdamW: one pass over memory on GPU and CPU, and nothing to compile.

    parameters: or groups of them, see `muon_groups`.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.adamw_weight_decay,
        fused=True,
    )


def muon_groups(
    matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], config: OptimizerConfig
) -> list[dict[str, Any]]:
    """Parameter groups: Muon's matrices, with their rate as a multiple of AdamW's, and AdamW's parameters."""
    muon = {
        "params": matrices,
        "is_muons": True,
        "lr_ratio": config.muon.peak_lr / config.peak_lr,
        "weight_decay": config.muon.adamw_weight_decay,
    }
    return [muon, {"params": others, "is_muons": False, "lr_ratio": 1.0}]


@torch.no_grad()
def apply_updates(group: dict[str, Any]) -> None:
    """Muon's half of a step: the gradients of `group` hold updates. They are dropped: AdamW passes by."""
    for weight in group["params"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(weight.grad, alpha=-group["lr"])
        weight.grad = None
