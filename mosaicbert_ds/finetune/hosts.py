"""The same command on every host of a hostfile: the queues share the work through the --out folder."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mosaicbert_ds.errors import ConfigError, TrainingError


def read_hostfile(path: Path) -> dict[str, int]:
    """Host to number of GPUs, from lines `HOST slots=N` as DeepSpeed's launcher takes them."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error.strerror}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        # A name that begins with a dash would be an option to ssh.
        if not slots.isdecimal() or int(slots) < 1 or words[0].startswith("-") or words[0] in hosts:
            raise ConfigError(
                f"{path}:{number}: '{line.strip()}' is not HOST slots=N with a host not named before"
            )
        hosts[words[0]] = int(slots)
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host")
    return hosts


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
