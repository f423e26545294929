"""Numbers of a run: speed, utilisation, cost, from what the steps of one logging window counted."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Dense bf16 peak by name as CUDA reports it, from the vendor's datasheets. A GPU that is not here has
# no MFU rather than a guessed one.
_PEAK_BF16_FLOPS_PER_S = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
_GIB = 1 << 30


def peak_flops_per_s() -> float | None:
    """Peak of one of this process's GPUs, or None where it is not known (a CPU, another GPU)."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    # "H100 PCIe" and "H100 NVL" have lower peaks than the SXM part that the table means.
    if "PCIe" in name or "NVL" in name:
        return None
    return next((peak for key, peak in _PEAK_BF16_FLOPS_PER_S.items() if key in name), None)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the run's hardware and price make of counts and seconds."""

    num_parameters: int
    max_length: int
    world_size: int
    peak_flops_per_s: float | None
    usd_per_gpu_hour: float | None

    def mfu(self, tokens_per_s: float) -> float | None:
        """6 x parameters x tokens/s over the peak of all GPUs: the published definition. Work that a model
        leaves out, as at tokens that nobody reads (`model.masked_only_layers`), counts as done."""
        if self.peak_flops_per_s is None:
            return None
        return 6 * self.num_parameters * tokens_per_s / (self.world_size * self.peak_flops_per_s)

    def dollars(self, gpu_s: float) -> float | None:
        return None if self.usd_per_gpu_hour is None else self.usd_per_gpu_hour * gpu_s / 3600


class Stopwatch:
    """Seconds that go on from `elapsed_s`, but for pauses."""

    def __init__(self, elapsed_s: float) -> None:
        self._zero_s = time.perf_counter() - elapsed_s

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._zero_s

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        from_s = time.perf_counter()
        yield
        self._zero_s += time.perf_counter() - from_s


class Window:
    """The time since the last flush, and how much of it the step waited for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.started_s = time.perf_counter()
        self.data_wait_s = 0.0
        self.steps = 0

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s

    def speed(self, rates: Rates, samples: int, tokens: int) -> dict[str, float]:
        """Speed of the window for `samples` and real `tokens`, both over all ranks.

        "real" counts the documents' tokens; "padded" counts `max_length` a sample, as the published
        figures do, and is what a padding implementation would have had to compute.
        """
        seconds, padded = self.elapsed_s(), samples * rates.max_length
        values = {
            "speed/samples_per_s": samples / seconds,
            "speed/tokens_per_s_real": tokens / seconds,
            "speed/tokens_per_s_padded": padded / seconds,
            "speed/mfu_real": rates.mfu(tokens / seconds),
            "speed/mfu_padded": rates.mfu(padded / seconds),
            "speed/step_time_s": seconds / max(self.steps, 1),
            "speed/padding_share": 1 - tokens / padded,
            "speed/data_wait_share": self.data_wait_s / seconds,
        }
        return {tag: value for tag, value in values.items() if value is not None}


def memory() -> dict[str, float]:
    """Peak memory of this process in GiB: the GPU's, or the host's where there is none."""
    if torch.cuda.is_available():
        return {
            "memory/gpu_allocated_peak_gib": torch.cuda.max_memory_allocated() / _GIB,
            "memory/gpu_reserved_gib": torch.cuda.memory_reserved() / _GIB,
        }
    import resource

    return {"memory/host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB}
