"""Files that survive a power cut, their hashes, and the little tables that the commands print."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mosaicbert_ds.errors import DataError


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_facts(facts: dict[str, Any]) -> str:
    """Hex sha256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` to `path` so that it holds all of them or does not exist, even after a power cut.

    Raises DataError where the disk is full or may not be written.
    """
    # The process number keeps two writers of the same file apart; the last rename wins.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except FileNotFoundError:
        raise DataError(
            f"{path} was taken away while it was written; another command works in this folder; let it "
            "end, then give this one again"
        ) from None
    except OSError as error:
        temporary.unlink(missing_ok=True)
        size = sum(memoryview(part).nbytes for part in parts)
        raise DataError(
            f"{path} ({size:,} bytes) cannot be written: {error.strerror}; free or choose a disk"
        ) from None


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Summary:
    """What a command did, as rows of (what, value); `str()` of it is the table to print."""

    title: str
    rows: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows)
        return "\n".join([self.title, *(f"  {what:<{width}}  {value}" for what, value in self.rows)])
