"""Rank, world and sums over ranks. Works with and without a process group.

The one place that reads the launcher's environment: DeepSpeed's launcher and torchrun set RANK,
WORLD_SIZE and LOCAL_RANK; under `srun` the same facts stand in SLURM_PROCID, SLURM_NTASKS and
SLURM_LOCALID.
"""

import os

import torch
import torch.distributed as td


def _from_launcher(name: str, slurm_name: str, default: int) -> int:
    return int(os.environ.get(name) or os.environ.get(slurm_name) or default)


def rank() -> int:
    """This process's rank, 0 <= rank < world_size."""
    return _from_launcher("RANK", "SLURM_PROCID", 0)


def world_size() -> int:
    """Number of processes in the run; 1 without a launcher."""
    return _from_launcher("WORLD_SIZE", "SLURM_NTASKS", 1)


def local_rank() -> int:
    """This process's number on its host: the GPU that it uses."""
    return _from_launcher("LOCAL_RANK", "SLURM_LOCALID", 0)


def is_main() -> bool:
    """True on the one process that prints, logs and writes."""
    return rank() == 0


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """Sum `value` over all ranks, in place, and return it. Does not wait for the device."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.all_reduce(value)
    return value


def broadcast(value: torch.Tensor, source: int = 0) -> torch.Tensor:
    """Copy `value` from rank `source` to all ranks, in place, and return it."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.broadcast(value, source)
    return value


def barrier() -> None:
    """Wait for all ranks."""
    if td.is_initialized() and td.get_world_size() > 1:
        td.barrier()
