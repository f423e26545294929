"""Who works on a job, when processes of several hosts share one folder and nothing else.

A claim is a file `claim-K` in the job's work folder, made by whoever is first (O_EXCL), and the highest K
counts. Its owner touches it every few seconds. A claim whose owner is gone is not removed but followed by
`claim-K+1`: of two that see a dead owner only one gets the next number, and an owner that was only asleep
sees the higher number and ends.

An owner is gone if its process number is free on the same machine, or if its file has not changed for
`STALE_S` of the watcher's own clock: clocks of hosts need not agree.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_BEAT_S = 2.0
STALE_S = 60.0  # long against a beat and against what a shared file system may hold back
_STOLEN = 4  # exit code of a process whose job is another's by now


def _place() -> str:
    """Names where process numbers mean something: this boot of this host, this space of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    facts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]
    with contextlib.suppress(OSError):
        facts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(facts)


@dataclass(frozen=True)
class Claim:
    """A job that is this process's, or its child's after `take_over`."""

    path: Path

    def take_over(self) -> None:
        """Make the calling process the owner: what a job does first, so that it outlives its queue."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(_owner())
        temporary.replace(self.path)

    def is_held(self) -> bool:
        """Whether no later claim was made."""
        return not self.path.with_name(f"claim-{_number(self.path) + 1}").exists()

    def beat(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the job has just finished, and its folder moved
            os.utime(self.path)

    def release(self) -> None:
        """Say that nobody works on the job any more."""
        with contextlib.suppress(FileNotFoundError):
            self.path.write_text(json.dumps({"released": True}))


@dataclass
class Watch:
    """Claims jobs, and remembers when it saw which claim change."""

    seen: dict[Path, tuple[int, float]] = field(default_factory=dict)

    def try_claim(self, work: Path) -> Claim | None:
        """The job of folder `work`, if it is free or its owner is gone; else None."""
        work.mkdir(parents=True, exist_ok=True)
        newest = max(work.glob("claim-*"), key=_number, default=None)
        if newest is not None and self._is_alive(newest):
            return None
        claim = work / f"claim-{_number(newest) + 1 if newest else 0}"
        try:
            descriptor = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # another was faster, or has finished the job
            return None
        with os.fdopen(descriptor, "w") as file:
            file.write(_owner())
        return Claim(claim)

    def _is_alive(self, claim: Path) -> bool:
        try:
            changed, text = claim.stat().st_mtime_ns, claim.read_text()
        except FileNotFoundError:
            return True  # its folder has just been renamed: finished
        with contextlib.suppress(ValueError):  # an owner that has not yet written who it is: see the clock
            owner = json.loads(text)
            if owner.get("released"):
                return False
            if owner["place"] == _place() and not Path(f"/proc/{owner['pid']}").exists():
                return False
        before, since = self.seen.get(claim, (None, 0.0))
        if before != changed:
            since = time.monotonic()
            self.seen[claim] = (changed, since)
        return time.monotonic() - since < STALE_S


def _owner() -> str:
    return json.dumps({"place": _place(), "pid": os.getpid()})


def _number(claim: Path) -> int:
    return int(claim.name.removeprefix("claim-"))


def keep_alive(claim: Claim) -> None:
    """In a job's process: beat until the end, and end at once when the queue is gone or the job another's."""
    queue = multiprocessing.parent_process()

    def watch() -> None:
        while True:
            if not claim.is_held() or (queue is not None and not queue.is_alive()):
                os._exit(_STOLEN)
            claim.beat()
            time.sleep(_BEAT_S)

    threading.Thread(target=watch, name="claim", daemon=True).start()
