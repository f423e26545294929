"""`mosaicbert launch`: a script on every GPU of every host, watched, ended as a whole, started again.

Like `deepspeed --hostfile`, whose per-host launcher it runs on each host, with three things mended. Names,
arguments and values are data all the way (`agent.py`). Whatever process dies, hangs or is cut off, all others
end, and the exit code says so: DeepSpeed's own exits 0 when its launcher on a host is killed, and waits half
an hour for a host that is gone. And a run that broke is started again, on the hosts that are left.

    with a host cut off, its connection or launcher gone       SILENCE_LIMIT_S = 20 s until it is noticed
    with a rank dead                                           1 s
    with a rank that makes no progress                         --hang-limit
    from then until every other process has ended              END_LIMIT_S = 15 s
"""

import contextlib
import json
import math
import os
import queue
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from mosaicbert_ds.cluster.agent import BEAT_EVERY_S, SILENCE_LIMIT_S
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.hostfile import MAX_SLOTS, is_host, read_hostfile
from mosaicbert_ds.training.faults import EXIT_STOPPED, EXIT_USER_ERROR

EXIT_FAILED = 1
END_LIMIT_S = 15.0
_HELLO_LIMIT_S = 60.0  # to reach a host and start Python there, on a slow shared disk
_STOPPED_LIMIT_S = 300.0  # from one host's "stopped on request" to the last one's: its checkpoint is written
_PAUSE_S = 60  # before the first start after a host did not answer; twice that before the second, ...
_ONE_REQUEST_S = 5.0  # signals that are no further apart are one request, but for a person's Ctrl-C
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOCAL = "localhost"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run on every rank, and how it is watched.

    command: the script and its arguments. environment: the variables that travel, and no others do.
    hang_limit_s: without a sign of progress for so long a rank counts as hanging, from its first sign on.
    """

    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict, repr=False)  # values may be secret
    port: int = 29500
    interface: str | None = None
    hang_limit_s: float = 900.0


@dataclass(frozen=True)
class Outcome:
    """The exit code, and one line that names what broke and where; hosts that could not be reached."""

    code: int
    reason: str = ""
    unreachable: frozenset[str] = frozenset()


class StopRequest:
    """Counts SIGTERM, SIGINT and SIGUSR1: the first asks the ranks to save and stop, the next ends them."""

    def __init__(self) -> None:
        self.times, self._asked_at_s = 0, -math.inf
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A scheduler tells every process of a job, and a batch script passes it on: that is one request.
        if number == signal.SIGINT or time.monotonic() - self._asked_at_s > _ONE_REQUEST_S:
            self.times += 1
        self._asked_at_s = time.monotonic()

    def note_other(self) -> None:
        """Another process of the job was asked: the same request, whichever is heard of first."""
        self.times, self._asked_at_s = max(self.times, 1), time.monotonic()


def launch(job: Job, hostfile: Path | None, restarts: int, min_hosts: int | None) -> int:
    """Run `job` to its end, up to `restarts` times again after a failure. Returns the exit code.

    The hosts are read anew before each start. After a failure, those that do not answer are left out as long
    as `min_hosts` do. Raises ConfigError for a hostfile, a host or a value that is not possible.
    """
    stop, attempt, pauses, hosts = StopRequest(), 0, 0, find_hosts(hostfile)
    while True:
        outcome = run_once(job, hosts, stop)
        if outcome.unreachable:
            rest = {host: slots for host, slots in hosts.items() if host not in outcome.unreachable}
            if min_hosts is not None and len(rest) >= min_hosts:
                _say(f"{outcome.reason}; going on with the {len(rest)} other hosts")
                hosts = rest
                continue
        if outcome.code == 0 or outcome.code == EXIT_STOPPED:
            if outcome.reason:
                _say(outcome.reason)
            return outcome.code
        if outcome.code == EXIT_USER_ERROR or attempt == restarts or stop.times:
            _say(f"error: {outcome.reason}")
            return outcome.code
        attempt += 1
        pauses += bool(outcome.unreachable)
        pause_s = pauses * _PAUSE_S if outcome.unreachable else 0  # it may be starting anew
        later = f" in {pause_s} s" if pause_s else ""
        _say(f"error: {outcome.reason}; restart {attempt} of {restarts}{later}")
        until_s = time.monotonic() + pause_s
        while time.monotonic() < until_s and not stop.times:
            time.sleep(0.2)
        hosts = find_hosts(hostfile)


def find_hosts(hostfile: Path | None) -> dict[str, int]:
    """Host to number of ranks: of the file, or of the Slurm job that this runs in. Raises ConfigError."""
    if hostfile is not None:
        return read_hostfile(hostfile)
    if (nodes := os.environ.get("SLURM_JOB_NODELIST")) is None:
        raise ConfigError("there is neither a hostfile nor a Slurm job; give --hostfile FILE, or use sbatch")
    names = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    ).stdout.split()
    # "8(x3),4": eight tasks on each of three nodes, four on the next.
    tasks: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_TASKS_PER_NODE"]):
        tasks += [int(number)] * int(times or 1)
    return dict(zip(names, tasks, strict=True))


def named_variables(names: Sequence[str]) -> dict[str, str]:
    """The values of `NAME` (from here) and `NAME=VALUE`. Raises ConfigError, which tells no value."""
    found = {}
    for text in names:
        name, given, value = text.partition("=")
        if _NAME.fullmatch(name) is None:
            raise ConfigError(f"--env names {name!a}; allowed are letters, digits and _, as in --env HF_HOME")
        if not given and name not in os.environ:
            raise ConfigError(f"--env {name} is not set here; set it, or give --env {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def run_once(job: Job, hosts: dict[str, int], stop: StopRequest, output: IO[bytes] | None = None) -> Outcome:
    """Start `job` on all `hosts` and watch it until nothing of it is left.

    output: where the ranks' output goes instead of standard error.
    """
    for host, slots in hosts.items():
        if not is_host(host) or not 1 <= slots <= MAX_SLOTS:
            raise ConfigError(
                f"{host!a} with {slots} slots is no host; allowed are 1 to {MAX_SLOTS} and a name"
            )
    for text in (*job.command, *job.environment.values()):
        if "\0" in text:
            raise ConfigError("an argument or value holds a zero byte, which no process can be given")
    run = _Run(job, hosts, stop, output)
    try:
        outcome = run.start() or run.watch()
    except BaseException:
        run.end(show_stacks=False)
        raise
    began_s = time.monotonic()
    run.end(show_stacks="no progress" in outcome.reason)
    if outcome.code in (0, EXIT_STOPPED) or outcome.unreachable:
        return outcome
    ended = f"everything else was ended in {time.monotonic() - began_s:.1f} s"
    return Outcome(outcome.code, f"{outcome.reason}; {ended}{run.remains()}")


class _Host:
    """The connection to the agent of one host."""

    def __init__(self, name: str, number: int, job_id: str, output: IO[bytes] | None) -> None:
        self.name, self.job_id = name, f"{job_id}.{number}"
        self.heard_at_s = time.monotonic()
        self.hello: dict[str, Any] | None = None
        self.code: int | None = None  # of its share of the job
        self.is_clean = self.is_gone = False
        self.beats: dict[int, float] = {}  # rank to the time of its last sign of progress, by our clock
        self.process = subprocess.Popen(
            far_side(name, [sys.executable, "-m", "mosaicbert_ds.cluster.agent"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # a Ctrl-C at the terminal is ours to pass on
        )

    def order(self, **what: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # gone: its silence will tell
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()


def far_side(host: str, command: list[str]) -> list[str]:
    """The words that run `command` on `host`: by ssh, or in a Slurm job by srun; directly on localhost.

    Only `command`'s fixed words meet the far shell, quoted.
    """
    if host == _LOCAL:
        return command
    if "SLURM_JOB_ID" in os.environ:
        step = ["--overlap", "--nodes=1", "--ntasks=1", "--cpu-bind=none", "--kill-on-bad-exit=0"]
        return ["srun", *step, f"--nodelist={host}", *command]
    return ["ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "--", host, shlex.join(command)]


class _Run:
    """One start of a job on all hosts."""

    def __init__(self, job: Job, hosts: dict[str, int], stop: StopRequest, output: IO[bytes] | None) -> None:
        self.job, self.slots, self.stop = job, hosts, stop
        self.messages: queue.Queue[tuple[_Host, dict[str, Any] | None]] = queue.Queue()
        self.job_id = secrets.token_hex(8)
        self.hosts = [_Host(name, number, self.job_id, output) for number, name in enumerate(hosts)]
        self.stops_passed_on = 0
        self.spoke_at_s = 0.0
        for host in self.hosts:
            threading.Thread(target=self._read, args=(host,), daemon=True).start()

    def _read(self, host: _Host) -> None:
        assert host.process.stdout is not None
        for line in host.process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # what a login script prints
                continue
            if isinstance(message, dict) and "event" in message:
                self.messages.put((host, message))
        host.process.wait()
        self.messages.put((host, None))

    def start(self) -> Outcome | None:
        """Reach every host, then start the ranks on all of them; an Outcome if that fails."""
        names = list(self.slots)
        for number, host in enumerate(self.hosts):
            peer = names[0] if number else names[1] if len(names) > 1 else None
            host.order(do="hello", peer=peer, interface=self.job.interface)
        deadline = time.monotonic() + _HELLO_LIMIT_S
        while waiting := [host for host in self.hosts if host.hello is None]:
            failed = [host for host in waiting if host.is_gone]
            if len(failed) == len(waiting) or time.monotonic() > deadline or self.stop.times:
                if self.stop.times:
                    return Outcome(EXIT_STOPPED, "stopped while the hosts were being reached")
                lost = ", ".join(f"{host.name} ({self._how_it_went(host)})" for host in waiting)
                return Outcome(
                    EXIT_FAILED, f"no answer from {lost}", frozenset(host.name for host in waiting)
                )
            if outcome := self._hear():
                return outcome
        assert self.hosts[0].hello is not None
        world = {name: list(range(slots)) for name, slots in self.slots.items()}
        for number, host in enumerate(self.hosts):
            host.order(
                do="start",
                job=host.job_id,
                interface=self.job.interface,
                world=world,
                node_rank=number,
                master_address=self.hosts[0].hello["address"],
                port=self.job.port,
                command=list(self.job.command),
                environment=self.job.environment,
                folder=str(Path.cwd()),
            )
        return None

    def watch(self) -> Outcome:
        """Until all hosts' ranks have ended well, or something is wrong."""
        stopped_at_s: float | None = None
        while any(host.code is None for host in self.hosts):
            if outcome := self._hear() or self._hanging():
                return outcome
            if self.stop.times > 1:
                return Outcome(EXIT_FAILED, "asked twice to stop; the ranks were not waited for")
            if self.stop.times > self.stops_passed_on:
                self.stops_passed_on = self.stop.times
                for host in self.hosts:
                    host.order(do="stop")
            if EXIT_STOPPED in {host.code for host in self.hosts}:
                stopped_at_s = stopped_at_s or time.monotonic()
                if time.monotonic() - stopped_at_s > _STOPPED_LIMIT_S:
                    late = ", ".join(host.name for host in self.hosts if host.code is None)
                    return Outcome(EXIT_FAILED, f"the ranks on {late} do not stop as the others did")
        if all(host.code == 0 for host in self.hosts):
            return Outcome(0)
        return Outcome(EXIT_STOPPED, "stopped on request; the same command goes on from there")

    def _hear(self) -> Outcome | None:
        """Take one message, keep all hosts hearing from us; an Outcome if a host or a rank is lost."""
        now_s = time.monotonic()
        if now_s - self.spoke_at_s > BEAT_EVERY_S:
            self.spoke_at_s = now_s
            for host in self.hosts:
                host.order()
        try:
            host, message = self.messages.get(timeout=0.2)
        except queue.Empty:
            pass
        else:
            host.heard_at_s = time.monotonic()
            if outcome := self._understand(host, message):
                return outcome
        for host in self.hosts:
            silence_s = time.monotonic() - host.heard_at_s
            if host.hello and host.code is None and silence_s > SILENCE_LIMIT_S:
                ranks = self._ranks_of(host)
                return Outcome(
                    EXIT_FAILED, f"{host.name} ({ranks}) is cut off or down: silent for {silence_s:.0f} s"
                )
        return None

    def _understand(self, host: _Host, message: dict[str, Any] | None) -> Outcome | None:
        if message is None:
            host.is_gone = True
            if host.hello and host.code is None:
                whose = f"{host.name} ({self._ranks_of(host)})"
                return Outcome(EXIT_FAILED, f"the agent on {whose} is gone: {self._how_it_went(host)}")
        elif message["event"] == "hello":
            host.hello = message
        elif message["event"] == "asked":
            self.stop.note_other()
        elif message["event"] == "unfit":
            return Outcome(EXIT_USER_ERROR, f"{host.name}: {message['why']}")
        elif message["event"] == "beat":
            now_s = time.monotonic()
            for rank, silent_s in message["ranks"].items():
                if silent_s is not None:
                    host.beats[int(rank)] = now_s - silent_s
        elif message["event"] == "ended":
            host.is_clean = message["left"] == 0
        elif message["event"] == "end":
            host.code, rank = message["code"], message["rank"]
            if host.code not in (0, EXIT_STOPPED):
                who = f"{'the launcher of the ranks' if rank is None else f'rank {rank}'} on {host.name}"
                code = EXIT_USER_ERROR if host.code == EXIT_USER_ERROR else EXIT_FAILED
                return Outcome(code, f"{who} {_how(host.code)}")
        return None

    def _hanging(self) -> Outcome | None:
        beats = [
            (at_s, rank, host)
            for host in self.hosts
            if host.code is None
            for rank, at_s in host.beats.items()
        ]
        if not beats:
            return None
        at_s, rank, host = min(beats, key=lambda beat: beat[0])
        now_s = time.monotonic()
        silent_s = now_s - at_s
        # A host that is not heard tells no progress either: that it is gone is the better answer, if it is.
        if silent_s < self.job.hang_limit_s or any(
            now_s - other.heard_at_s > 3 * BEAT_EVERY_S for other in self.hosts if other.code is None
        ):
            return None
        return Outcome(
            EXIT_FAILED,
            f"rank {rank} on {host.name} hangs: no progress for {silent_s:.0f} s, longest of all ranks",
        )

    def end(self, show_stacks: bool) -> None:
        """End what is left on every host, and wait for it. Hosts that answer no more end their own share."""
        for host in self.hosts:
            host.order(do="end", show_stacks=show_stacks)
        deadline = time.monotonic() + END_LIMIT_S
        while any(not host.is_gone and not self._cut(host) for host in self.hosts):
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(queue.Empty):
                host, message = self.messages.get(timeout=0.2)
                if message is None:
                    host.is_gone = True
                elif message["event"] == "ended":
                    host.is_clean = message["left"] == 0
        for host in self.hosts:
            if host.process.poll() is None:
                host.process.kill()  # our end of the connection
        sweeps = [
            (host, subprocess.Popen(self._sweep(host), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
            for host in self.hosts
            if host.hello and not host.is_clean and not self._cut(host)
        ]
        for host, sweep in sweeps:
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.is_clean = sweep.wait(END_LIMIT_S) == 0
            sweep.kill()

    def remains(self) -> str:
        """What may still be there, for the line that is said at the end."""
        left = [host.name for host in self.hosts if host.hello and not host.is_clean]
        if not left:
            return ""
        return f" ({', '.join(left)} does not answer and ends its share within {SILENCE_LIMIT_S:.0f} s)"

    def _sweep(self, host: _Host) -> list[str]:
        agent = [sys.executable, "-m", "mosaicbert_ds.cluster.agent", "--sweep"]
        return far_side(host.name, [*agent, host.job_id, str(self.job.port)])

    def _cut(self, host: _Host) -> bool:
        return time.monotonic() - host.heard_at_s > SILENCE_LIMIT_S

    def _ranks_of(self, host: _Host) -> str:
        first = 0
        for name, slots in self.slots.items():
            if name == host.name:
                return f"rank {first}" if slots == 1 else f"ranks {first} to {first + slots - 1}"
            first += slots
        raise AssertionError(host.name)

    def _how_it_went(self, host: _Host) -> str:
        code = host.process.poll()
        return "no word from it" if code is None else f"the connection {_how(code)}"


def _how(code: int) -> str:
    if code < 0:
        return f"was killed ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


def _say(line: str) -> None:
    print(f"mosaicbert launch: {line}", file=sys.stderr, flush=True)
