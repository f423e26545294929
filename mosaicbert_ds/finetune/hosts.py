"""The same command on every host of a hostfile: the queues share the work through the --out folder."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mosaicbert_ds.errors import TrainingError
from mosaicbert_ds.hostfile import read_hostfile


def run_on_hosts(hostfile: Path, arguments: Sequence[str]) -> None:
    """Run `mosaicbert ARGUMENTS` on each host by ssh, in this folder with this Python: with --gpus SLOTS
    instead of --hostfile FILE. Raises TrainingError naming the hosts where it failed.
    """
    arguments = _without(_without(arguments, "--hostfile"), "--gpus")
    started = {}
    for host, slots in read_hostfile(hostfile).items():
        command = [sys.executable, "-m", "mosaicbert_ds.cli", *arguments, "--gpus", str(slots)]
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
        # A terminal (-tt), so that the far end stops when this one does.
        started[host] = subprocess.Popen(
            ["ssh", "-tt", "-o", "BatchMode=yes", host, line], stdin=subprocess.DEVNULL
        )
    try:
        codes = {host: process.wait() for host, process in started.items()}
    except BaseException:
        for process in started.values():
            process.terminate()
        raise
    failed = [f"{host} (exit code {code})" for host, code in codes.items() if code]
    if failed:
        raise TrainingError(f"the command failed on {', '.join(failed)}; what it said stands above")


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """`arguments` without `option` and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = not skip and argument == option
    return kept
