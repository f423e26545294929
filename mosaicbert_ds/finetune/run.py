"""The queue: jobs side by side on this host's devices, shared with every other queue on the same folder.

Started with the same arguments on several hosts, queues claim jobs one by one (`claim.py`), and each waits
until all jobs are settled. A job that ended with an error is reported and the rest go on; those that start
from it are not run. A job whose process was killed is tried once more and goes on from its checkpoint.
"""

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnContext, SpawnProcess
from pathlib import Path

import torch

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.finetune.claim import Claim, Watch
from mosaicbert_ds.finetune.job import JobSpec, cuda_is_lost, run_in_process, write_failure
from mosaicbert_ds.training.faults import EXIT_STOPPED, signals_held

_POLL_S = 0.2
_ATTEMPTS = 2  # for a job whose process is killed: once may be bad luck
_GRACE_S = 120.0  # for a job that was asked to stop, to save


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended: `result` of a finished one, or the reason why there is none."""

    result: dict | None = None
    reason: str = ""


@dataclass
class _Running:
    spec: JobSpec
    claim: Claim
    process: ForkServerProcess | SpawnProcess
    slot: int


@dataclass
class Queue:
    """Runs `specs` on `slots`, a device a slot. `say` tells the person how it goes."""

    specs: Sequence[JobSpec]
    slots: Sequence[str]
    num_threads: int
    say: Callable[[str], None]
    asked_to_stop: Callable[[], bool] = lambda: False
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _running: list[_Running] = field(default_factory=list)
    _attempts: dict[str, int] = field(default_factory=dict)
    _watch: Watch = field(default_factory=Watch)

    def run(self) -> dict[str, Outcome] | None:
        """Settle all jobs and return how each ended, by name; None if asked to stop before."""
        # A failure from before this start is forgiven: whoever starts again has mended something.
        self._forgiven = {path for path in map(_failure_of, self.specs) if path.exists()}
        context = _process_context()
        while True:
            self._reap()
            waiting = [spec for spec in self.specs if not self._is_settled(spec)]
            if not waiting and not self._running:
                return self._outcomes
            if self.asked_to_stop():
                self._stop()
                return None
            for spec in waiting:
                free = set(range(len(self.slots))) - {running.slot for running in self._running}
                if free and self._can_start(spec):
                    self._start(context, spec, min(free))
            time.sleep(_POLL_S)

    def _is_settled(self, spec: JobSpec) -> bool:
        name = spec.job.name
        if name in self._outcomes:
            return True
        outcome = None
        if spec.finished.is_dir():
            outcome = Outcome(result=json.loads((spec.finished / "result.json").read_text(encoding="utf-8")))
        elif (failure := _failure_of(spec)).exists() and failure not in self._forgiven:
            outcome = Outcome(reason=json.loads(failure.read_text(encoding="utf-8"))["reason"])
        elif spec.job.after and (start := self._outcomes.get(spec.job.after)) and start.result is None:
            outcome = Outcome(reason=f"not run, since {spec.job.after} has no result")
        if outcome is None:
            return False
        self._outcomes[name] = outcome
        told = _news(outcome.result) if outcome.result else outcome.reason
        self.say(f"[{len(self._outcomes)}/{len(self.specs)}] {name}: {told}")
        return True

    def _can_start(self, spec: JobSpec) -> bool:
        if any(running.spec is spec for running in self._running):
            return False
        after = spec.job.after
        return after is None or (after in self._outcomes and self._outcomes[after].result is not None)

    def _start(self, context: ForkServerContext | SpawnContext, spec: JobSpec, slot: int) -> None:
        claim = self._watch.try_claim(spec.work)
        if claim is None:
            return
        if spec.finished.is_dir():  # another queue's job ended between our look and our claim
            shutil.rmtree(spec.work, ignore_errors=True)
            return
        failure = _failure_of(spec)
        failure.unlink(missing_ok=True)
        self._forgiven.discard(failure)
        self._attempts[spec.job.name] = self._attempts.get(spec.job.name, 0) + 1
        arguments = (spec, claim, self.slots[slot], self.num_threads)
        process = context.Process(target=run_in_process, args=arguments, name=spec.job.name)
        process.start()
        self._running.append(_Running(spec, claim, process, slot))

    def _reap(self) -> None:
        for running in [running for running in self._running if not running.process.is_alive()]:
            self._running.remove(running)
            spec, code = running.spec, running.process.exitcode or 0
            if not spec.finished.is_dir() and running.claim.is_held():
                if code != EXIT_STOPPED and not _failure_of(spec).exists():
                    if self.asked_to_stop():
                        self.say(f"{spec.job.name}: {_death(code)} before it had saved")
                    elif self._attempts[spec.job.name] < _ATTEMPTS:
                        self.say(f"{spec.job.name}: {_death(code)}; tried once more")
                    else:
                        write_failure(
                            spec.work, f"{_death(code)}, {_ATTEMPTS} times; see {spec.work / 'log.txt'}"
                        )
                running.claim.release()

    def _stop(self) -> None:
        """Ask the jobs to save and end, and end those that do not."""
        for running in self._running:
            running.process.terminate()
        until = time.monotonic() + _GRACE_S
        for running in self._running:
            running.process.join(max(0.0, until - time.monotonic()))
            running.process.kill()
            running.process.join()
        self._reap()


def _process_context() -> ForkServerContext | SpawnContext:
    """How jobs start: forked from a server that has imported everything, which would else take them seconds.

    A signal to stop may go to all processes at once, as a scheduler's does. The server holds it off, else the
    queue would lose its jobs; a job takes it once it can (`StopRequest`).

    A process may not be forked once its CUDA driver is up, and a library that looks for GPUs while it is
    imported may start it. NVML answers most of them without; where it does not, jobs import for themselves.
    """
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([run_in_process.__module__])
    resource_tracker.ensure_running()  # whose start would let the signals in again
    with signals_held(), ProcessPoolExecutor(1, mp_context=server) as pool:
        is_unusable = pool.submit(cuda_is_lost).result()
    return multiprocessing.get_context("spawn") if is_unusable else server


def _news(result: dict) -> str:
    """A finished job's scores and time, on one line."""
    several = len(result["metrics"]) > 1
    scores = [
        f"{metric}{f' ({split})' if several else ''} "
        + (f"{100 * value:.1f}" if isinstance(value, float) else f"none, since {value}")
        for split, values in result["metrics"].items()
        for metric, value in values.items()
    ]
    return f"{', '.join(scores)}; {result['seconds']:.0f} s"


def _failure_of(spec: JobSpec) -> Path:
    return spec.work / "failure.json"


def _death(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"ended with code {code}"


def choose_slots(gpus: int | None, jobs_per_gpu: int, jobs: int) -> list[str]:
    """A device for each job that runs at a time: GPUs in turn, or the CPU `jobs` times where there is none.

    gpus: how many of the host's to use; None for all. Raises ConfigError where there are fewer.
    """
    found = torch.cuda.device_count()
    for name, value in (("--jobs-per-gpu", jobs_per_gpu), ("--jobs", jobs), ("--gpus", gpus)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; give 1 or more")
    if gpus is not None and gpus > found:
        raise ConfigError(
            f"--gpus, or a hostfile's slots, is {gpus}, but this host has {found}; "
            + (f"give {found}" if found else "start the command with --jobs on each host, without a hostfile")
        )
    if not found:
        return ["cpu"] * jobs
    return [f"cuda:{number}" for _ in range(jobs_per_gpu) for number in range(gpus or found)]
