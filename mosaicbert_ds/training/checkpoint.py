"""Checkpoints: one format for every ZeRO stage and rank count.

    RUN/checkpoints/step-00000100/
        weights.safetensors        fp32, by parameter name, full shapes
        exp_avg.safetensors        Adam's moments, likewise; Muon's momenta stand among the first
        exp_avg_sq.safetensors
        state.json                 progress, recipe, hashes of tokenizer and data
        manifest.json              size and sha256 of each file above; written last

A step is written to `step-N.tmp/`, every file and the folder are fsynced, then one rename makes it
real. So a folder without `.tmp` is whole unless the disk damaged it, and the hashes tell that.
`latest` is a hint for people; `newest_verified` scans and believes only the manifests.
Only the main rank touches the disk: hosts need no shared folder.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from mosaicbert_ds.data.files import sync_folder
from mosaicbert_ds.errors import CheckpointError
from mosaicbert_ds.training.plan import Count
from mosaicbert_ds.typed_yaml import recipe_part

FORMAT = 1
KINDS = ("weights", "exp_avg", "exp_avg_sq")  # fp32 weights and Adam's moments, by torch's names
_READ_BLOCK = 1 << 22


@recipe_part
class CheckpointConfig:
    """When to save, in samples seen, and what stays.

    `keep_last` newest steps stay; those saved at `keep_at_samples` stay for good, for the Pareto
    curve. A step is saved at the first global batch that reaches its mark.
    """

    every_samples: Count = 14_336_000
    keep_last: Count = 2
    keep_at_samples: tuple[Count, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A step on disk whose files have been checked against its manifest."""

    path: Path
    state: dict[str, Any]

    def open(self, kind: str) -> Any:
        """The safetensors handle of "weights", "exp_avg" or "exp_avg_sq": `.keys()`, `.get_tensor(name)`.

        Raises CheckpointError if the run has removed the step meanwhile.
        """
        file = self.path / f"{kind}.safetensors"
        try:
            return safe_open(file, framework="pt")
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read any more: {error}") from None


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def saved_steps(root: Path) -> list[Path]:
    """Folders of finished steps, newest first."""
    # By name alone: to look at each would lose one that a running run removes meanwhile, without a trace.
    folders = [path for path in root.glob("step-*") if re.fullmatch("[0-9]+", path.name[5:])]
    return sorted(folders, key=step_number, reverse=True)


def step_number(folder: Path) -> int:
    return int(folder.name[5:])


def newest_verified(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest step that passes its checks, and one line for each newer one that does not.

    Raises CheckpointError if steps are there but none is whole: to start afresh would hide the loss.
    """
    complaints: list[str] = []
    for path in saved_steps(root):
        try:
            return open_verified(path), complaints
        except CheckpointError as error:
            if not path.exists():  # removed by a run that goes on meanwhile, after it wrote a newer one
                return newest_verified(root)
            complaints.append(f"{error}; trying an older step")
    if complaints:
        raise CheckpointError(f"no checkpoint in {root} is whole: " + "; ".join(complaints))
    return None, []


def find_checkpoint(path: Path) -> Checkpoint:
    """The newest whole step of the run in `path`, or the step in `path`; a newer one that is damaged is told
    on stderr. Raises CheckpointError."""
    if (path / "manifest.json").is_file():
        return open_verified(path)
    checkpoint, complaints = newest_verified(path / "checkpoints")
    for line in complaints:
        print(line, file=sys.stderr)
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run's folder or one of its checkpoints/step-N"
        )
    return checkpoint


def open_verified(path: Path) -> Checkpoint:
    """Check every file of the step against its manifest. Raises CheckpointError naming the file."""
    manifest = _read_json(path / "manifest.json")
    if "format" not in manifest:
        raise CheckpointError(
            f"{path} is no step of a run; give a run's folder or one of its checkpoints/step-N"
        )
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}; this version reads format {FORMAT}")
    expected = {f"{kind}.safetensors" for kind in KINDS} | {"state.json"}
    listed = manifest.get("files")
    if not isinstance(listed, dict) or set(listed) != expected:
        raise CheckpointError(f"{path / 'manifest.json'} does not list exactly {', '.join(sorted(expected))}")
    for name in sorted(expected):
        if listed[name] != _size_and_sha256(path / name):
            raise CheckpointError(f"{path / name} does not match its size and sha256 in manifest.json")
    state = _read_json(path / "state.json")
    if step_folder(path.parent, state["progress"]["step"]).name != path.resolve().name:
        raise CheckpointError(f"{path} holds step {state['progress']['step']}, not the step of its name")
    return Checkpoint(path, state)


def write_step(
    root: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]
) -> Path:
    """Write a step so that it is either whole or absent, whenever the machine stops.

    tensors: kind -> parameter name -> contiguous fp32 CPU tensor. Returns the step's folder. Raises
    CheckpointError if the disk does not take it; the older steps are untouched then.
    """
    final = step_folder(root, step)
    temporary = final.with_name(final.name + ".tmp")
    try:
        make_folder(root)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        files = {}
        for kind, named in tensors.items():
            files[f"{kind}.safetensors"] = _write(
                temporary / f"{kind}.safetensors", _safetensors_bytes(named)
            )
        files["state.json"] = _write(temporary / "state.json", [_json_bytes(state)])
        _write(temporary / "manifest.json", [_json_bytes({"format": FORMAT, "files": files})])
        sync_folder(temporary)
        if final.exists():  # this step was saved before, then found damaged, and trained again
            _remove(final)
        temporary.rename(final)
        sync_folder(root)
        hint = root / "latest.tmp"
        _write(hint, [final.name.encode() + b"\n"])
        hint.rename(root / "latest")
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # what it holds may be the room that is missing
        size = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
        raise CheckpointError(
            f"{final}, {size:,} bytes, could not be written: {error.strerror or error}; mend that or make "
            "room, then start the same command again: it goes on from the newest whole step"
        ) from error
    return final


def prune(root: Path, newest: int, keep_last: int) -> None:
    """Remove what interrupted saves and removals left behind, and the steps beyond the `keep_last`
    newest, but those whose state says `kept`.

    newest: the step just written. Steps past it were found damaged: they do not count, or the ones
    removed for them would be whole.
    """
    for leftover in (*root.glob("step-*.tmp"), *root.glob("step-*.old")):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in [path for path in saved_steps(root) if step_number(path) <= newest][keep_last:]:
        if not _is_kept(path):
            _remove(path)


def make_folder(path: Path) -> None:
    """`mkdir -p` that a power cut does not undo: a folder is there once the one above it says so."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def _remove(folder: Path) -> None:
    """Renamed first, so that a reader never finds half a step. What cannot be deleted (a file open
    elsewhere on NFS) is tried again by the next `prune`."""
    doomed = folder.with_name(folder.name + ".old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _is_kept(folder: Path) -> bool:
    try:
        return bool(_read_json(folder / "state.json").get("kept", True))
    except CheckpointError:
        return True  # nobody knows: leave it alone


class BackgroundWriter:
    """Writes one step at a time on a thread; the training step goes on meanwhile.

    A failed write is raised at the next `submit` or `wait`: nothing is lost in silence.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Run `write()` on the thread, after the one before has ended: at most one copy waits."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the write under way, and raise what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error


def _safetensors_bytes(named: dict[str, torch.Tensor]) -> Iterator[Any]:
    """The safetensors format, a piece at a time: header length, JSON header, the tensors' bytes.

    Written here and not by safetensors' own writer because a write that streams lets go of the
    interpreter lock and hashes on the way; theirs holds the lock for the whole file.
    """
    header, offset = {}, 0
    for name, tensor in named.items():
        assert tensor.dtype == torch.float32
        end = offset + tensor.numel() * 4
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in named.values():
        yield tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _write(path: Path, pieces: Iterable[Any]) -> dict[str, Any]:
    """Write `pieces`, fsync, and return the file's size and sha256."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            _write_all(file, memoryview(piece))
            digest.update(piece)
            size += len(piece)
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_all(file: BinaryIO, piece: memoryview) -> None:
    while piece:  # an unbuffered write may take less than it was given
        piece = piece[file.write(piece) :]


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds {type(tree).__name__}, not an object")
    return tree


def _size_and_sha256(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BLOCK):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    return {"bytes": size, "sha256": digest.hexdigest()}
