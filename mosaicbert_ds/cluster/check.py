"""`mosaicbert cluster check`: whether the hosts are what a run needs, before a GPU second is spent.

Each host is asked alone, then all of them time the network between them. What differs from the first host,
from the hostfile's promise, or from the others' speed is a reason, and one reason is enough to fail.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicbert_ds.cluster.launch import Job, StopRequest, far_side, run_once
from mosaicbert_ds.cluster.probe import NETWORK_MARK
from mosaicbert_ds.config import load_recipe
from mosaicbert_ds.model import count_parameters
from mosaicbert_ds.tables import column, table

_ANSWER_LIMIT_S = 120.0  # torch from a slow shared disk
_CLOCK_LIMIT_S = 1.0  # logs and file times of hosts further apart than this do not sort
_SLOW = 0.5  # of the median pair
_GIB = 1 << 30
_CHECKPOINT_BYTES = 12  # a parameter: weight and two moments in fp32


@dataclass(frozen=True)
class _Row:
    host: str = column("host")
    gpus: str = column("GPUs")
    driver: str = column("driver")
    package: str = column("package")
    torch: str = column("torch")
    deepspeed: str = column("DeepSpeed")
    recipe: str = column("recipe")
    data: str = column("data")
    clock_ms: float | None = column("clock ms", "+.0f")
    free_gib: float | None = column("free GiB", ",.0f")
    to_others: float | None = column("GB/s to others", ",.3f")
    verdict: str = column("")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the run that is being prepared for will use. Without data and out those are not looked at."""

    recipe: str
    overrides: list[str]
    data: str | None
    out: str | None


def check_cluster(
    hosts: dict[str, int], wanted: Wanted, port: int, interface: str | None
) -> tuple[str, bool]:
    """The table with all reasons, and whether there are none. Raises ConfigError for an impossible recipe."""
    recipe = load_recipe(wanted.recipe, wanted.overrides)
    with ThreadPoolExecutor(len(hosts)) as pool:
        asked = list(pool.map(lambda host: _ask(host, wanted), hosts))
    answers = dict(zip(hosts, asked, strict=True))
    faults = {host: list(answer["faults"]) for host, answer in answers.items()}
    for host in hosts:
        faults[host] += _differences(host, hosts, answers)
    keeps = recipe.checkpoint.keep_last + 1 + len(recipe.checkpoint.keep_at_samples)
    needed = keeps * _CHECKPOINT_BYTES * count_parameters(recipe.model)
    main = next(iter(hosts))
    if answers[main].get("free_bytes", needed) < needed:
        free = answers[main]["free_bytes"]
        faults[main].append(f"{free / _GIB:.1f} GiB are free, {needed / _GIB:.1f} are needed for checkpoints")

    network, notes = None, []
    good = {host: slots for host, slots in hosts.items() if "versions" in answers[host]}
    if len(good) > 1:
        network, reason = _time_network(good, port, interface)
        if network is None:
            notes.append(f"the network was not timed: {reason}")
        else:
            rate = network["all_reduce_bytes_per_s"] / 1e9
            notes.append(f"all-reduce over {sum(good.values())} ranks: {rate:,.3f} GB/s")
            for host, fault in _slow_ways(list(good), network["pairs"]):
                faults[host].append(fault)
    rows = [
        _row(host, slots, answers[host], faults[host], list(good), network) for host, slots in hosts.items()
    ]
    reasons = [f"{host}: {fault}" for host in hosts for fault in faults[host]]
    ready = not reasons and (len(good) == 1 or network is not None)
    return "\n".join([table(rows), "", *notes, *reasons, *(["ready"] if ready else [])]), ready


def _ask(host: str, wanted: Wanted) -> dict[str, Any]:
    """The host's facts (`probe.facts`) with the offset of its clock; only `faults` where it cannot tell."""
    command = far_side(host, [sys.executable, "-m", "mosaicbert_ds.cluster.probe"])
    question = {
        "recipe": wanted.recipe,
        "overrides": wanted.overrides,
        "data": wanted.data,
        "out": wanted.out,
        "folder": str(Path.cwd()),
    }
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process, ThreadPoolExecutor(1) as reader:
        to, back, errors = process.stdin, process.stdout, process.stderr
        assert to is not None and back is not None and errors is not None
        try:

            def ask(line: str) -> Any:
                to.write(line + "\n")
                to.flush()
                return json.loads(reader.submit(back.readline).result(_ANSWER_LIMIT_S))

            ask("")  # Python's start is over
            asked_s = time.time()
            clock_s = ask("")["time_s"] - (asked_s + time.time()) / 2
            told = ask(json.dumps(question)) | {"clock_s": clock_s}
        except (OSError, ValueError, TimeoutError) as error:
            process.kill()
            said = errors.read().strip().splitlines()
            return {"faults": [f"no answer: {said[-1] if said else error}"]}
    return told


def _differences(host: str, hosts: dict[str, int], answers: dict[str, Any]) -> list[str]:
    """What a host has that the first answering one has not, and what it was promised to have."""
    mine = answers[host]
    if "versions" not in mine:
        return []
    first = next(name for name in hosts if "versions" in answers[name])
    theirs, faults = answers[first], []
    for name in sorted(mine["versions"].keys() | theirs["versions"].keys()):
        ours, other = mine["versions"].get(name, "absent"), theirs["versions"].get(name, "absent")
        if ours != other:
            faults.append(f"{name} {ours}, but {other} on {first}")
    for name in ("driver", "recipe", "data"):
        if mine.get(name) != theirs.get(name) and mine.get(name) is not None:
            faults.append(f"{name} {mine[name]}, but {theirs.get(name)} on {first}")
    has_gpus = any(answer.get("gpus") for answer in answers.values())
    if has_gpus and len(mine["gpus"]) != hosts[host]:
        faults.append(f"{hosts[host]} GPUs are promised, {len(mine['gpus'])} are there")
    if set(mine["gpus"]) - set(theirs["gpus"]):
        faults.append(f"GPUs are {', '.join(sorted(set(mine['gpus'])))}, unlike those of {first}")
    if abs(mine["clock_s"]) > _CLOCK_LIMIT_S:
        faults.append(f"the clock is {mine['clock_s']:+.1f} s off this host's; let chrony or ntpd set it")
    return faults


def _time_network(
    hosts: dict[str, int], port: int, interface: str | None
) -> tuple[dict[str, Any] | None, str]:
    """What `probe.time_network` found, or None and why not."""
    script = str(Path(__file__).with_name("probe.py"))
    job = Job(command=[script, json.dumps(list(hosts.values()))], port=port, interface=interface)
    with tempfile.TemporaryFile() as output:
        outcome = run_once(job, hosts, StopRequest(), output)
        output.seek(0)
        said = output.read().decode(errors="replace").splitlines()
    for line in said:
        if line.startswith(NETWORK_MARK):
            return json.loads(line.removeprefix(NETWORK_MARK)), ""
    return None, "; ".join([outcome.reason, *said[-3:]])


def _slow_ways(hosts: list[str], pairs: list[list[float]]) -> list[tuple[str, str]]:
    """Pairs below half of the median, as (host, reason); a host that is slow to most others once."""
    count = len(hosts)
    rates = {(i, j): pairs[i][j] for i in range(count) for j in range(i + 1, count)}
    usual = statistics.median(rates.values()) if len(rates) > 2 else max(rates.values())
    slow = {pair for pair, rate in rates.items() if rate < _SLOW * usual}
    found, explained = [], set[int]()
    for number in sorted(range(count), key=lambda number: -sum(number in pair for pair in slow)):
        mine = [pair for pair in slow if number in pair and not explained & set(pair)]
        if count > 2 and len(mine) > (count - 1) / 2:
            explained.add(number)
            rate = statistics.median(rates[pair] for pair in mine)
            found.append((hosts[number], f"slow to most hosts: {rate / 1e9:.3f} GB/s of {usual / 1e9:.3f}"))
    for i, j in sorted(slow):
        if not explained & {i, j}:
            ways = f"{rates[i, j] / 1e9:.3f} GB/s of {usual / 1e9:.3f}"
            found.append((hosts[i], f"slow to {hosts[j]}: {ways}"))
    return found


def _row(
    host: str, slots: int, answer: dict[str, Any], faults: list[str], timed: list[str], network: Any
) -> _Row:
    rate = None
    if network is not None and host in timed:
        number = timed.index(host)
        ways = [max(network["pairs"][number][j], network["pairs"][j][number]) for j in range(len(timed))]
        rate = statistics.median(way for j, way in enumerate(ways) if j != number) / 1e9
    versions, free = answer.get("versions", {}), answer.get("free_bytes")
    return _Row(
        host=host,
        gpus=f"{len(answer.get('gpus', []))} of {slots}",
        driver=answer.get("driver") or "-",
        package=versions.get("mosaicbert-ds", "-"),
        torch=versions.get("torch", "-"),
        deepspeed=versions.get("deepspeed", "-"),
        recipe=answer.get("recipe", "-"),
        data=answer.get("data", "-"),
        clock_ms=answer["clock_s"] * 1e3 if "clock_s" in answer else None,
        free_gib=None if free is None else free / _GIB,
        to_others=rate,
        verdict=f"{len(faults)} fault(s)" if faults else "good",
    )
