"""The real `deepspeed` launcher on this machine, and nothing of it left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SCRIPT = str(REPO / "mosaicbert_ds" / "pretrain.py")
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


class Launcher:
    """Starts the command in a process group of its own, on one port, and leaves nothing behind."""

    def __init__(self, port: int, log: Path) -> None:
        self.port, self.log = port, log
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, ranks: int = 2) -> "subprocess.Popen[bytes]":
        launcher = [DEEPSPEED, "--num_gpus", str(ranks), "--master_port", str(self.port), SCRIPT]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*launcher, *arguments], stdout=log, stderr=log, cwd=REPO, start_new_session=True
            )
        self.started.append(process)
        return process

    def run(self, *arguments: str, ranks: int = 2) -> int:
        return self.start(*arguments, ranks=ranks).wait(240)

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """SIGKILL to all of it at once, as a power cut would."""
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                self.kill(process)
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}_*"):
            buffer.unlink(missing_ok=True)
