"""The run's folder is the record of the run: what was asked, on what, with which code.

RUN/recipe.yaml  ds_config.json     resolved, of the newest start
RUN/launches.jsonl                  one line a start: time, command, commit, versions, hardware
RUN/tokenizer/                      a copy, so that the folder can be exported alone
RUN/metrics.jsonl  tensorboard/  checkpoints/
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from mosaicbert_ds import dist
from mosaicbert_ds.data.tokenizer import copy_tokenizer
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training.checkpoint import make_folder

# How long a process that was killed may take to be gone, and its lock with it.
_GONE_S = 20.0
_PACKAGES = ("mosaicbert-ds", "torch", "deepspeed", "triton", "transformers", "tokenizers", "numpy")


def lock_run_folder(run: Path) -> TextIO:
    """Make the folder, and keep other starts on this host out while the file returned is open. Raises
    ConfigError if another is at work there, or nothing can be written."""
    with _written(run):
        make_folder(run)
        return _lock(run)


def record_start(run: Path, recipe_yaml: str, ds_config: dict[str, Any], tokenizer: Path) -> None:
    """Write down what this start is. Raises ConfigError if it cannot be written."""
    with _written(run):
        (run / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        (run / "ds_config.json").write_text(json.dumps(ds_config, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(tokenizer, run / "tokenizer")
        with (run / "launches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_this_launch()) + "\n")


def was_resumed(run: Path, resume: str) -> bool:
    """Whether an earlier start of this run was given this `--resume`."""
    launches = run / "launches.jsonl"
    text = launches.read_text(encoding="utf-8", errors="replace") if launches.exists() else ""
    return any(json.dumps(words)[1:-1] in text for words in (["--resume", resume], [f"--resume={resume}"]))


@contextlib.contextmanager
def _written(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"--out {run} cannot be written: {error.strerror or error}; give another folder"
        ) from None


def _lock(run: Path) -> TextIO:
    """Hold RUN/.lock. A holder on another host is let be: a shared disk keeps the lock of a lost host for a
    while, and the run has to go on without it."""
    file, me = (run / ".lock").open("a+", encoding="utf-8"), f"process {os.getpid()} of {platform.node()}"
    give_up_at = time.monotonic() + _GONE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read()
            if holder == me or (holder and not holder.endswith(f" of {platform.node()}")):
                return file
            if time.monotonic() > give_up_at:
                raise ConfigError(
                    f"--out {run} is being written by {holder}; stop that run, or give another folder"
                ) from None
            time.sleep(0.5)
        except OSError:  # a file system without locks
            return file
    file.truncate(0)
    file.write(me)
    file.flush()
    return file


def versions() -> dict[str, str]:
    """Installed versions of the packages whose numbers a run depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _this_launch() -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "commit": commit_of_checkout(),
        "versions": versions(),
        "python": platform.python_version(),
        "host": platform.node(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "world_size": dist.world_size(),
    }


def commit_of_checkout() -> str | None:
    """The checkout's commit, with `+changes` where files differ from it; None outside a checkout."""
    package = Path(__file__).parent
    try:
        git = ["git", "-C", str(package)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+changes" if status.strip() else "")
