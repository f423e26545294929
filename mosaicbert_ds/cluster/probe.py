"""What `mosaicbert cluster check` runs on the hosts: what a host is like, and the speed between two.

python -m mosaicbert_ds.cluster.probe             facts of this host; questions come over standard input
deepspeed ... mosaicbert_ds/cluster/probe.py      on all ranks: times between every two hosts
"""

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

from mosaicbert_ds import dist
from mosaicbert_ds.errors import UserError

NETWORK_MARK = "mosaicbert-network "  # before the one line of the main rank that the check reads
_GPU_BYTES, _CPU_BYTES = (
    1 << 28,
    1 << 22,
)  # a message, in which bandwidth counts more than latency
_REPEATS = 3
_TIMEOUT = datetime.timedelta(minutes=5)


def facts(question: dict[str, Any]) -> dict[str, Any]:
    """Of this host: versions, GPUs, space, hashes of what `question` names (recipe, overrides, data, out)."""
    from mosaicbert_ds.config import load_recipe
    from mosaicbert_ds.training.run_folder import versions

    os.chdir(question["folder"])
    found: dict[str, Any] = {"versions": versions() | {"python": sys.version.split()[0]}, "faults": []}
    on_gpu = torch.cuda.is_available()
    count = torch.cuda.device_count() if on_gpu else 0
    found["gpus"] = [torch.cuda.get_device_name(number) for number in range(count)]
    found["driver"] = _driver() if on_gpu else None
    try:
        recipe = load_recipe(question["recipe"], question["overrides"])
        found["recipe"] = hashlib.sha256(recipe.to_yaml().encode()).hexdigest()[:12]
    except UserError as error:
        found["faults"].append(str(error))
    if question["data"]:
        from mosaicbert_ds.data.shards import ShardSet

        try:
            found["data"] = ShardSet.open(question["data"], "train").fingerprint[:12]
        except (UserError, OSError) as error:
            found["faults"].append(f"data: {error}")
    if question["out"]:
        try:
            out = Path(question["out"])
            out.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=out):
                found["free_bytes"] = shutil.disk_usage(out).free
        except OSError as error:
            found["faults"].append(f"--out {question['out']} cannot be written: {error.strerror}")
    return found


def answer_questions() -> int:
    """Tell the time to empty lines, and facts to the question."""
    while not (line := sys.stdin.readline()).strip():
        if not line:  # whoever asked is gone
            return 1
        print(json.dumps({"time_s": time.time()}), flush=True)
    print(json.dumps(facts(json.loads(line))), flush=True)
    return 0


def time_network(ranks_per_host: list[int]) -> None:
    """On all ranks: an all-reduce over all, and exchanges between the first ranks of every two hosts.

    In rounds in which every host has one partner, as in a tournament. The main rank prints bytes/s.
    """
    device = dist.device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Without DeepSpeed, which would first compile: this looks at the network alone.
    td.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=dist.rank(),
        world_size=dist.world_size(),
        timeout=_TIMEOUT,
    )
    size = _GPU_BYTES if device.type == "cuda" else _CPU_BYTES
    message = torch.ones(size, dtype=torch.uint8, device=device)
    firsts = [sum(ranks_per_host[:number]) for number in range(len(ranks_per_host))]
    reduced = torch.ones(size // 4, device=device)
    dist.sum_over_ranks(reduced)  # connects everybody
    all_reduce_s = min(_timed(lambda: dist.sum_over_ranks(reduced)) for _ in range(_REPEATS))
    count = len(firsts)
    rates = torch.zeros(count, count, dtype=torch.float64, device=device)
    players = count + count % 2  # with an odd number one pauses in each round
    for round_number in range(players - 1):
        dist.barrier()
        order = [0, *((round_number + place) % (players - 1) + 1 for place in range(players - 1))]
        pairs = [tuple(sorted((order[place], order[-1 - place]))) for place in range(players // 2)]
        for one, other in pairs:
            if other < count and dist.rank() in (firsts[one], firsts[other]):
                peer = firsts[other] if dist.rank() == firsts[one] else firsts[one]
                received = torch.empty_like(message)

                def exchange(peer: int = peer, received: torch.Tensor = received) -> None:
                    calls = [td.P2POp(td.isend, message, peer), td.P2POp(td.irecv, received, peer)]
                    for work in td.batch_isend_irecv(calls):
                        work.wait()

                exchange()  # connects the two
                seconds = min(_timed(exchange) for _ in range(_REPEATS))
                if dist.rank() == firsts[one]:
                    rates[one, other] = size / seconds
    dist.sum_over_ranks(rates)
    if dist.is_main():
        told = {"all_reduce_bytes_per_s": size / all_reduce_s, "pairs": rates.tolist()}
        print(NETWORK_MARK + json.dumps(told), flush=True)
    dist.leave()


def _timed(call: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(answer_questions())
    time_network(json.loads(sys.argv[-1]))
