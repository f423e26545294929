"""The machine that figures belong to, and the clocks that all benchmarks share."""

import itertools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.run_folder import commit_of_checkout, versions

WARM_UP, REPEATS = 5, 20


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What ran, on what. The two rates are those of one GPU, None where there is none."""

    device: str
    driver: str | None
    versions: dict[str, str]  # of installed packages, by name
    commit: str | None  # with `+changes` where the checkout differs from it
    copy_bytes_per_s: float | None  # read + written, device to device
    matmul_flops_per_s: float | None  # of an 8192^3 product in bf16

    def __str__(self) -> str:
        driver = f", driver {self.driver}" if self.driver else ""
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.device}{driver}; commit {self.commit or 'unknown'}", packages]
        if self.copy_bytes_per_s is not None and self.matmul_flops_per_s is not None:
            copy, matmul = self.copy_bytes_per_s / 1e12, self.matmul_flops_per_s / 1e12
            lines.append(f"copy {copy:.2f} TB/s, 8192^3 product in bf16 {matmul:.0f} TFLOP/s")
        return "\n".join(lines)


def measure_machine() -> Machine:
    """Describe this machine; with a GPU also measure it. Leaves no memory taken on it."""
    copy_bytes_per_s = matmul_flops_per_s = None
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        source = torch.randn(2**29, device="cuda")  # 2 GiB
        target = torch.empty_like(source)
        copy_bytes_per_s = 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        matmul_flops_per_s = 2 * 8192**3 / (median_ms(lambda: a @ b) / 1e3)
        del source, target, a, b
        torch.cuda.empty_cache()
    return Machine(
        device=torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        driver=_driver() if on_gpu else None,
        versions=versions(),
        commit=commit_of_checkout(),
        copy_bytes_per_s=copy_bytes_per_s,
        matmul_flops_per_s=matmul_flops_per_s,
    )


def need_gpu(benchmark: str) -> None:
    """Raise ConfigError where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise ConfigError(
            f"bench {benchmark} measures a GPU and there is none here; run it on a CUDA machine"
        )


def median_ms(function: Callable[[], object]) -> float:
    """Median time of a call on the GPU in milliseconds."""
    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def median_replay_ms(function: Callable[[], object]) -> float:
    """The same from a CUDA graph: without the launches, which a captured step does not pay either."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay)


def lap_times_s(function: Callable[[], object], laps: int) -> list[float]:
    """Seconds of each of `laps` calls in a row. On a GPU the marks between them stand in its own queue, so
    that measuring never makes the host wait: the calls follow each other as in training."""
    if not torch.cuda.is_available():
        marks = [time.perf_counter()]
        for _ in range(laps):
            function()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(laps + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def _driver() -> str | None:
    """The NVIDIA driver's version, which torch does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
