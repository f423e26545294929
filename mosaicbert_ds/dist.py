"""Rank, world and sums over ranks. Works with and without a process group.

The one place that reads the launcher's environment: DeepSpeed's launcher and torchrun set RANK,
WORLD_SIZE and LOCAL_RANK; under `srun` the same facts stand in SLURM_PROCID, SLURM_NTASKS and
SLURM_LOCALID. `mosaicbert launch` names a folder for signs of life in MOSAICBERT_HEARTBEATS.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

from mosaicbert_ds.errors import UserError

JSON = Any  # what json.dumps takes


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


def beat() -> None:
    """Tell the launcher, where it listens, that this rank has got a little further."""
    if folder := os.environ.get("MOSAICBERT_HEARTBEATS"):
        Path(folder, str(rank())).touch()


def leave() -> None:
    """Leave the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()


def on_main(decide: Callable[[], JSON]) -> JSON:
    """Call `decide` on the main rank only and return its JSON-like result on every rank.

    A `UserError` there is raised on all ranks, so that they stop together instead of waiting for
    one that has left.
    """
    answer: dict[str, Any] = {}
    if is_main():
        try:
            answer = {"result": decide()}
        except UserError as error:
            answer = {"error": str(error)}
    # JSON as bytes rather than broadcast_object_list, which pickles.
    text = json.dumps(answer).encode() if is_main() else b""
    length = broadcast(torch.tensor([len(text)], device=device()))
    data = torch.zeros(int(length), dtype=torch.uint8)
    if is_main():
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    answer = json.loads(bytes(broadcast(data.to(device())).cpu().numpy()))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]
