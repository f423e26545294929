"""Decoupled AdamW with the published meaning, and its learning-rate schedule.

The published optimizer multiplies every weight by `1 - (lr_t / lr_peak) * weight_decay` each step;
AdamW by `1 - lr_t * weight_decay_adamw`. They are the same for

    weight_decay_adamw = weight_decay / lr_peak

so 1e-5 at a peak of 5e-4 is AdamW's 0.02. A recipe states the decoupled value.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field

from mosaicbert_ds.typed_yaml import recipe_part

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


@recipe_part
class OptimizerConfig:
    """AdamW on all parameters; `weight_decay` is the decoupled value, see above."""

    peak_lr: Annotated[float, Field(gt=0, le=1)] = 5e-4
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    weight_decay: Fraction = 1e-5

    @property
    def adamw_weight_decay(self) -> float:
        """The `weight_decay` that torch.optim.AdamW takes for the same decay."""
        return self.weight_decay / self.peak_lr


@recipe_part
class ScheduleConfig:
    """Linear warmup over `warmup` of the run, then linear decay to `final_lr_fraction` x peak."""

    warmup: Fraction = 0.06
    final_lr_fraction: Fraction = 0.02

    def lr_factor_at(self, progress: float) -> float:
        """Learning rate as a fraction of the peak, for `progress` in (0, 1]: the part of the run
        that is done when the update of this step is made."""
        if progress < self.warmup:
            return progress / self.warmup
        decayed = (progress - self.warmup) / (1 - self.warmup) if self.warmup < 1 else 0.0
        return 1 - decayed * (1 - self.final_lr_fraction)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """PyTorch's fused AdamW: one pass over memory on GPU and CPU, and nothing to compile."""
    return torch.optim.AdamW(
        parameters,
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.adamw_weight_decay,
        fused=True,
    )
