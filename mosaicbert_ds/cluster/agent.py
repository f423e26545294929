"""The far end of `mosaicbert launch`: one process on each host, between the launcher and the host's ranks.

It speaks JSON lines with the launcher over its standard input and output, so that no argument, value or
secret ever stands on a command line or meets a shell. It starts DeepSpeed's per-host launcher, tells how the
ranks are, and ends them all: when told so, when one of them dies, and when the launcher or the network
between them is gone.

Needs nothing but Python and the package: no torch, to be there at once.
"""

import base64
import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from mosaicbert_ds.training.faults import EXIT_STOPPED, signals_held

JOB_VARIABLE = "MOSAICBERT_JOB"  # stands in the environment of every process of a host's share of a job
HEARTBEATS_VARIABLE = "MOSAICBERT_HEARTBEATS"  # the folder where `dist.beat` touches a file a rank
BEAT_EVERY_S = 1.0
SILENCE_LIMIT_S = 20.0  # no word from the other end for so long: it, or the network, is gone
_LOOK_EVERY_S = 0.2
_HAVE_STOP_REQUEST = ("pretrain.py",)
_KILL_LIMIT_S = 10.0  # a process in the kernel's hands may take a moment to go


class Agent:
    """The share of one host in a job. See the module's docstring for what `main` makes of it."""

    def __init__(self) -> None:
        self.heard_at_s = time.monotonic()
        self.orders: list[dict[str, Any]] = []
        self.launcher_is_gone = self.is_asked = False
        # Slurm's word to all processes of a step when the job has to make room.
        signal.signal(signal.SIGTERM, self._note)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        # Unbuffered: a buffer's lock, held by a thread that waits, would stop this process from ending.
        with open(0, "rb", buffering=0, closefd=False) as lines:
            self._hear_all(lines)
        self.launcher_is_gone = True

    def _hear_all(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self.heard_at_s = time.monotonic()
            if order := json.loads(line):  # {} only says that the launcher is there
                self.orders.append(order)

    def _note(self, number: int, frame: object) -> None:
        self.is_asked = True

    def next_order(self) -> dict[str, Any] | None:
        return self.orders.pop(0) if self.orders else None

    def is_alone(self) -> bool:
        return self.launcher_is_gone or time.monotonic() - self.heard_at_s > SILENCE_LIMIT_S

    def wait_for_order(self) -> dict[str, Any] | None:
        """The next one, or None when the launcher is gone."""
        while not self.is_alone():
            if order := self.next_order():
                return order
            tell("beat", ranks={})
            time.sleep(_LOOK_EVERY_S)
        return None


def tell(event: str, **facts: Any) -> None:
    """Say something to the launcher. It may be gone: then nobody needs to know."""
    try:
        print(json.dumps({"event": event, **facts}), flush=True)
    except OSError:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # also for the flush at exit


def address_towards(peer: str | None, interface: str | None) -> tuple[str, str]:
    """This host's address and interface on the way to host `peer`, or those of `interface`.

    Raises OSError when there is no such interface or way.
    """
    import psutil

    of_interface = {
        name: next((entry.address for entry in entries if entry.family == socket.AF_INET), None)
        for name, entries in psutil.net_if_addrs().items()
    }
    if interface is not None:
        if (address := of_interface.get(interface)) is None:
            raise OSError(f"there is no interface {interface} with an IPv4 address")
        return address, interface
    if peer is None:
        return "127.0.0.1", "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing: it asks the kernel for the way
        address = probe.getsockname()[0]
    return address, next((name for name, found in of_interface.items() if found == address), "")


def processes_of(job: str) -> dict[int, dict[bytes, bytes]]:
    """The environment of every living process, beside this one, that carries the job's mark."""
    mark, found = f"{JOB_VARIABLE}={job}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            entries = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile, or another person's
            continue
        if mark in entries and int(folder.name) != os.getpid():
            pairs = (entry.partition(b"=") for entry in entries if entry)
            found[int(folder.name)] = {name: value for name, _, value in pairs}
    return found


def end_job(job: str, port: int) -> int:
    """Kill what is left of the host's share of a job, remove its files; returns how many would not go.

    By the mark in the environment, which children inherit and which outlives any parent: a process whose
    launcher was killed is found all the same, and no other process ever is.
    """
    deadline = time.monotonic() + _KILL_LIMIT_S
    while (left := processes_of(job)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)  # until the kernel has taken them away
    shutil.rmtree(heartbeat_folder(job), ignore_errors=True)
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        buffer.unlink(missing_ok=True)  # 66 MiB each that DeepSpeed leaves on CPUs
    return len(left)


def heartbeat_folder(job: str) -> Path:
    return Path(tempfile.gettempdir()) / f"mosaicbert-{job}"


def start_ranks(order: dict[str, Any], interface: str) -> "subprocess.Popen[bytes]":
    """DeepSpeed's launcher for this host, in a session of its own, with the variables that were named."""
    heartbeat_folder(order["job"]).mkdir(mode=0o700)
    world = base64.urlsafe_b64encode(json.dumps(on_visible_gpus(order)).encode()).decode()
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    command += [f"--node_rank={order['node_rank']}", f"--master_addr={order['master_address']}"]
    command += [f"--master_port={order['port']}", "--log_level=warning", *order["command"]]
    # Collectives take the way that the hosts reach each other on, unless the host's own variable or
    # --interface says another. Loopback needs no naming.
    sockets = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if interface not in ("", "lo") else ()
    ways = {name: interface for name in sockets if order["interface"] or name not in os.environ}
    environment = os.environ | {
        # Ninja, which DeepSpeed builds with, lies beside Python, and a shell over ssh does not know.
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        **ways,
        **order["environment"],
        JOB_VARIABLE: order["job"],
        HEARTBEATS_VARIABLE: str(heartbeat_folder(order["job"])),
    }
    # Held: DeepSpeed's launcher would end its ranks; they hear it from when they have a `StopRequest`. Other
    # scripts have none, and would never hear it, nor would their children.
    hears = Path(order["command"][0]).name in _HAVE_STOP_REQUEST
    with signals_held() if hears else contextlib.nullcontext():
        return subprocess.Popen(
            command,
            cwd=order["folder"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def on_visible_gpus(order: dict[str, Any]) -> dict[str, list[Any]]:
    """Host to its ranks' GPUs; here those of CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher sets anew."""
    variables, host = os.environ | order["environment"], list(order["world"])[order["node_rank"]]
    visible = [name for name in variables.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    slots = order["world"][host]
    return order["world"] | ({host: visible[: len(slots)]} if len(visible) >= len(slots) else {})


def pass_on(output: IO[bytes]) -> None:
    """The ranks' output to standard error. Not by inheritance: held open by ranks that outlive a killed
    agent, the connection would never end."""
    while piece := os.read(output.fileno(), 1 << 16):
        try:
            os.write(2, piece)
        except OSError:  # the launcher is gone; the ranks must not stop at a full pipe before they are ended
            continue


class Ranks:
    """What is known of the host's ranks: their processes, their exit codes, their heartbeats.

    Which one ended first the kernel says at once (a pidfd), with its code until DeepSpeed's launcher, which
    looks once a second, has reaped it; then the launcher ends with that code itself.
    """

    def __init__(self, order: dict[str, Any], launcher: "subprocess.Popen[bytes]") -> None:
        self.job, self.launcher = order["job"], launcher
        self.is_stopping = False
        self.pids: dict[int, int] = {}  # rank to process
        self.codes: dict[int, int | None] = {}  # rank to exit code, in the order in which they ended
        self._living = selectors.DefaultSelector()

    def look(self) -> None:
        children = Path(f"/proc/{self.launcher.pid}/task/{self.launcher.pid}/children")
        try:
            pids = {int(pid) for pid in children.read_text().split()} - set(self.pids.values())
        except OSError:
            pids = set()
        for pid in pids:
            try:
                entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            number = next((entry[5:] for entry in entries if entry.startswith(b"RANK=")), b"")
            if number.isdigit():
                self.pids[int(number)] = pid
                with contextlib.suppress(OSError):  # gone meanwhile, or a kernel before 5.3
                    if self.is_stopping:  # asked before it was there
                        os.kill(pid, signal.SIGTERM)
                    self._living.register(os.pidfd_open(pid), selectors.EVENT_READ, int(number))

    def wait(self, limit_s: float) -> None:
        """Until a rank ends, or until `limit_s` is over."""
        told = [key for key, _ in self._living.select(limit_s)]
        for key in told:
            self._living.unregister(key.fileobj)
            os.close(key.fd)
        for rank in (*(key.data for key in told), *self.pids):
            if rank not in self.codes and _has_ended(self.pids[rank]):
                self.codes[rank] = _exit_code(self.pids[rank])

    def failure(self) -> tuple[int, int | None] | None:
        """Exit code and rank of the first one that failed, no rank where it is the launcher; None so far."""
        good, code = (0, EXIT_STOPPED), self.launcher.poll()
        self.wait(0)  # whom the launcher has reaped has ended
        for rank, its_code in self.codes.items():
            if its_code is not None and its_code not in good:
                return its_code, rank
        if code is None or code in good:
            return None
        unknown = [rank for rank, its_code in self.codes.items() if its_code is None]
        if code > 0 and unknown:  # sys.exit(-9) is 247 to the parent
            return code - 256 if code >= 256 - signal.NSIG else code, unknown[0]
        return code, None

    def silent_s(self) -> dict[int, float | None]:
        """Seconds since each living rank's last heartbeat; None before its first."""
        folder, now_s, ages = heartbeat_folder(self.job), time.time(), dict[int, float | None]()
        for rank in self.pids.keys() - self.codes.keys():
            try:
                ages[rank] = now_s - (folder / str(rank)).stat().st_mtime
            except OSError:
                ages[rank] = None
        return ages

    def stop(self) -> None:
        self.is_stopping = True
        self.signal(signal.SIGTERM)

    def signal(self, number: signal.Signals) -> None:
        for rank in self.pids.keys() - self.codes.keys():
            try:
                os.kill(self.pids[rank], number)
            except ProcessLookupError:
                continue


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat behind the name: state, parent, ...; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _has_ended(pid: int) -> bool:
    stat = _stat(pid)
    return not stat or stat[0] in "ZX"


def _exit_code(pid: int) -> int | None:
    """Of a process that has ended, as subprocess gives it; None if it is reaped."""
    stat = _stat(pid)
    return os.waitstatus_to_exitcode(int(stat[49])) if stat else None


def watch(agent: Agent, order: dict[str, Any], interface: str) -> None:
    """Start the ranks and stay until they have ended, by themselves or by our hand."""
    launcher = start_ranks(order, interface)
    ranks = Ranks(order, launcher)
    output = threading.Thread(target=pass_on, args=(launcher.stdout,), daemon=True)
    output.start()
    told_at_s = 0.0
    try:
        while not agent.is_alone():
            ranks.look()
            if failure := ranks.failure():
                tell("end", code=failure[0], rank=failure[1])
                break
            if (code := launcher.poll()) is not None:
                tell("end", code=code, rank=None)
                break
            command = agent.next_order() or {}
            if command.get("do") == "end":
                if command["show_stacks"]:
                    ranks.signal(signal.SIGUSR2)  # `training.faults` has each rank print its stack
                    time.sleep(1)
                break
            if agent.is_asked:
                agent.is_asked = False
                tell("asked")
            if command.get("do") == "stop":
                ranks.stop()
            if time.monotonic() - told_at_s >= BEAT_EVERY_S:
                told_at_s = time.monotonic()
                tell("beat", ranks=ranks.silent_s())
            ranks.wait(_LOOK_EVERY_S)
    finally:
        left = end_job(order["job"], order["port"])
        launcher.wait()
        output.join(1.0)  # the last words, unless the network is gone
        tell("ended", left=left)


def main() -> int:
    if sys.argv[1:2] == ["--sweep"]:  # after an agent that was killed itself
        job, port = sys.argv[2:]
        return end_job(job, int(port))
    agent = Agent()
    if (question := agent.wait_for_order()) is None:
        return 1
    try:
        address, interface = address_towards(question["peer"], question["interface"])
    except OSError as error:
        tell("unfit", why=str(error))
        return 1
    tell("hello", address=address, interface=interface)
    if (order := agent.wait_for_order()) is None or order["do"] != "start":
        return 1
    try:
        watch(agent, order, interface)
    except OSError as error:  # a folder that is not there, no more processes
        tell("unfit", why=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
