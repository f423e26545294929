"""What survives a restart, beside weights and moments: how far the run has come.

There is no random state in it: the order of samples, the masks and the dropout of a step are pure
functions of the seed and the samples seen.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Progress:
    """Counted in samples seen over all ranks; seconds are wall-clock time of the main rank."""

    step: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    elapsed_s: float = 0.0  # all of the run so far
    training_s: float = 0.0  # without evaluation and saving, and without each start's first step
    scheduled_s: float = 0.0  # of a run of minutes: where in them its schedule stands
    gpu_s: float = 0.0  # `elapsed_s`, each second as often as there were ranks
    training_gpu_s: float = 0.0  # `training_s` likewise

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        """What a checkpoint's state says. One by a version that did not count GPUs' time is taken for a run
        on as many ranks throughout."""
        seconds, ranks = state["progress"], state["world_size"]
        counted = {"gpu_s": seconds["elapsed_s"] * ranks, "training_gpu_s": seconds["training_s"] * ranks}
        return cls(**counted | seconds)

    def count_gpus(self, ranks: int, start: "Progress") -> None:
        """Count the time since `start` for so many ranks."""
        self.gpu_s = start.gpu_s + ranks * (self.elapsed_s - start.elapsed_s)
        self.training_gpu_s = start.training_gpu_s + ranks * (self.training_s - start.training_s)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return before // every != after // every


def step_seed(seed: int, samples_seen: int, rank: int) -> int:
    """Seed of the dropout of one step on one rank (63 bits, as torch.manual_seed takes)."""
    # Odd multipliers of splitmix64 and its kin: neighbouring steps and ranks land far apart.
    mixed = seed * 0x9E3779B97F4A7C15 + samples_seen * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB
    return (mixed ^ (mixed >> 31)) & 0x7FFF_FFFF_FFFF_FFFF
