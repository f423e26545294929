"""Run a function on several gloo ranks of this machine, through the real DeepSpeed."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(*args)` on `world_size` ranks and return what each gave, in rank order.

    `function` is importable and returns plain Python objects or numpy arrays (a tensor dies with its
    rank). DeepSpeed leaves 66 MiB in /dev/shm for every CPU rank, named after the port: they are
    removed here.
    """
    port = free_port()
    # Forked from a server that has imported everything, which takes a rank longer than most of what it does.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["mosaicbert_ds.pretrain"])
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(function, rank, world_size, port, results, args))
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        answers = dict(results.get(timeout=240) for _ in ranks)
        failures = [answer for answer in answers.values() if isinstance(answer, _Failure)]
        assert not failures, "\n".join(failure.text for failure in failures)
        return [answers[rank] for rank in range(world_size)]
    finally:
        for process in ranks:
            process.join(5)
            process.kill()
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            buffer.unlink(missing_ok=True)


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(function: Any, rank: int, world_size: int, port: int, results: Any, args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    sys.stdout = Path(os.devnull).open("w")  # DeepSpeed's log; open until the rank ends  # noqa: SIM115
    try:
        import torch

        torch.set_num_threads(1)
        from mosaicbert_ds.training.engine import init_distributed

        init_distributed()
        results.put((rank, function(*args)))
    except BaseException:
        results.put((rank, _Failure(f"rank {rank}: {traceback.format_exc()}")))
