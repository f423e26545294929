"""Hosts and their GPUs, from a hostfile as DeepSpeed's launcher takes it: lines `HOST slots=N`, and comments.

DeepSpeed's own reader passes on whatever stands there, to ssh and to shells: `-oProxyCommand=...` as a host
runs a command. Here a host is a name or an address and nothing else.
"""

import re
from pathlib import Path

from mosaicbert_ds.errors import ConfigError

MAX_SLOTS = 1024  # processes of a host: beyond any machine
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_SLOTS = re.compile(r"slots=([1-9][0-9]{0,3})")


def is_host(name: str) -> bool:
    """Whether `name` is the name or IPv4 address of a host, safe as a word for ssh and in a shell."""
    return _HOST.fullmatch(name) is not None


def read_hostfile(path: Path) -> dict[str, int]:
    """Host to number of processes, in the file's order, which is that of the ranks.

    Raises ConfigError that names every bad line.
    """
    try:
        # newline=None ends lines at \n, \r\n and \r alone: splitlines() would also split at form feeds.
        with path.open(encoding="utf-8") as file:
            lines = [line.removesuffix("\n") for line in file]
    except OSError as error:
        raise ConfigError(
            f"--hostfile {path} cannot be read: {error.strerror}; give a file of lines HOST slots=N"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--hostfile {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    hosts: dict[str, int] = {}
    seen: dict[str, int] = {}
    faults = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        fault = _fault(words, seen)
        if fault:
            faults.append(f"{path}:{number}: {fault}")
            continue
        seen[words[0]] = number
        hosts[words[0]] = int(words[1].removeprefix("slots="))
    if faults:
        raise ConfigError("\n".join(faults))
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host; give a line HOST slots=N for each")
    return hosts


def _fault(words: list[str], seen: dict[str, int]) -> str | None:
    """What is wrong with a line of `words`; `seen`: the lines of the hosts before. Shown with ascii(): a
    terminal would obey the bytes of a hostile file."""
    host, *rest = words
    if not is_host(host):
        return f"host {host!a} is no name; allowed are letters, digits, dots and dashes inside"
    slots = _SLOTS.fullmatch(rest[0]) if len(rest) == 1 else None
    if slots is None or int(slots[1]) > MAX_SLOTS:
        given = ascii(" ".join(rest)) if rest else "nothing"
        return f"after host {host} stands {given}; allowed is slots=N, N from 1 to {MAX_SLOTS}"
    if host in seen:
        return f"host {host} stands in line {seen[host]} already; remove one of them"
    return None
