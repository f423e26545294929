"""What a disk may hold after a power cut: every prefix of a recorded trace, with what was not fsynced
lost, torn or zeroed.

    with record(folder) as trace:
        save_something(folder)
        trace.mark("saved")
    for state in crash_states(trace, random.Random(0), per_prefix=10):
        state.write(fresh_folder); look at it; state.marks says what had been promised by then

The model is POSIX's: fsync of a file keeps its bytes, fsync of a folder keeps its entries, and
everything since then may or may not be there, each change by itself.
"""

import contextlib
import copy
import io
import os
import random
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass
class File:
    content: bytes = b""
    durable: bytes = b""


@dataclass
class Folder:
    content: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)  # since the last fsync

    def change(self, kind: str, name: str, node: Any) -> None:
        self.pending.append((kind, name, node))
        _apply(self.content, kind, name, node)


def _apply(entries: dict[str, Any], kind: str, name: str, node: Any) -> None:
    if kind == "add":
        entries[name] = node
    elif kind == "remove":
        entries.pop(name, None)
    else:  # a rename within the folder: one change, never half of it
        new_name, moved = node
        entries.pop(name, None)
        entries[new_name] = moved


@dataclass
class Trace:
    root: Path
    start: Folder
    operations: list[tuple[Any, ...]] = field(default_factory=list)

    def mark(self, what: Any) -> None:
        """`what` has been promised from here on."""
        self.operations.append(("mark", what))

    def note(self, kind: str, path: Any, *more: Any) -> None:
        path = Path(os.fsdecode(path))
        if path.is_relative_to(self.root):
            self.operations.append((kind, path.relative_to(self.root).parts, *more))


@contextlib.contextmanager
def record(root: Path) -> Iterator[Trace]:
    """Note every change made below `root`; what is there already counts as durable."""
    trace = Trace(root, _snapshot(root))
    open_path, real = Path.open, {name: getattr(os, name) for name in ("mkdir", "rename", "unlink", "rmdir")}

    class Recorded(io.FileIO):
        def write(self, data: Any) -> int:
            taken = super().write(data)
            trace.note("write", self.name, bytes(memoryview(data)[:taken]))
            return taken

    def recorded_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode != "wb" or not path.is_relative_to(root):
            return open_path(path, mode, *args, **kwargs)
        trace.note("create", path)
        return Recorded(os.fspath(path), "w")

    def recorded(name: str) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            result = real[name](path, *args, **kwargs)
            if name == "rename":
                trace.note(name, path, Path(args[0]).relative_to(root).parts)
            else:
                trace.note("remove" if name in ("unlink", "rmdir") else name, path)
            return result

        return call

    def recorded_fsync(handle: int) -> None:
        trace.note("fsync", Path(f"/proc/self/fd/{handle}").readlink())

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(Path, "open", recorded_open))
        patches.enter_context(mock.patch.object(os, "fsync", recorded_fsync))
        patches.enter_context(
            mock.patch.object(shutil, "_use_fd_functions", False)
        )  # else paths are relative
        for name in real:
            patches.enter_context(mock.patch.object(os, name, recorded(name)))
        yield trace


@dataclass
class CrashState:
    tree: dict[str, Any]  # name -> bytes or such a dict
    marks: list[Any]

    def write(self, folder: Path) -> None:
        _write(self.tree, folder)


def crash_states(trace: Trace, rng: random.Random, per_prefix: int) -> Iterator[CrashState]:
    """After each operation: nothing lost (the process was killed), all that can be lost, and
    `per_prefix` draws of what is lost."""
    disk, marks = copy.deepcopy(trace.start), []
    for operation in trace.operations:
        if operation[0] == "mark":
            marks.append(operation[1])
        else:
            _perform(disk, operation)
        for chance in (1.0, 0.0, *(rng.choice((0.5, 0.8, 0.95)) for _ in range(per_prefix))):
            yield CrashState(_survivors(disk, chance, rng), list(marks))


def final_tree(trace: Trace) -> dict[str, Any]:
    """The tree that the whole trace makes: equal to the real one if nothing was overlooked."""
    disk = copy.deepcopy(trace.start)
    for operation in trace.operations:
        if operation[0] != "mark":
            _perform(disk, operation)
    return _survivors(disk, 1.0, random.Random(0))


def read_tree(folder: Path) -> dict[str, Any]:
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def _perform(disk: Folder, operation: tuple[Any, ...]) -> None:
    kind, parts, *more = operation
    if kind == "fsync":
        node = _find(disk, parts)
        node.durable = dict(node.content) if isinstance(node, Folder) else node.content
        if isinstance(node, Folder):
            node.pending.clear()
        return
    folder, name = _find(disk, parts[:-1]), parts[-1]
    if kind == "write":
        folder.content[name].content += more[0]
    elif kind == "rename":
        assert more[0][:-1] == parts[:-1], "a rename across folders is not modelled"
        folder.change("rename", name, (more[0][-1], folder.content[name]))
    elif kind == "remove":
        folder.change("remove", name, None)
    else:
        folder.change("add", name, File() if kind == "create" else Folder())


def _find(disk: Folder, parts: tuple[str, ...]) -> Any:
    node: Any = disk
    for part in parts:
        node = node.content[part]
    return node


def _survivors(node: Any, chance: float, rng: random.Random) -> Any:
    """What is left of `node`: each change that is not durable stays with probability `chance`."""
    if isinstance(node, File):
        if node.content == node.durable or rng.random() < chance:
            return node.content
        cut = rng.randrange(len(node.durable), len(node.content))
        return rng.choice(
            [node.durable, node.content[:cut], node.content[:cut] + bytes(len(node.content) - cut)]
        )
    entries = dict(node.durable)
    for change in node.pending:
        if rng.random() < chance:
            _apply(entries, *change)
    return {name: _survivors(child, chance, rng) for name, child in entries.items()}


def _snapshot(path: Path) -> Any:
    if not stat.S_ISDIR(path.stat().st_mode):
        return File(path.read_bytes(), path.read_bytes())
    entries = {child.name: _snapshot(child) for child in path.iterdir()}
    return Folder(entries, dict(entries))


def _write(tree: dict[str, Any], folder: Path) -> None:
    folder.mkdir()
    for name, node in tree.items():
        if isinstance(node, dict):
            _write(node, folder / name)
        else:
            (folder / name).write_bytes(node)
