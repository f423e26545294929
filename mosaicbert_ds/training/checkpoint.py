"""Checkpoints: one format for every ZeRO stage and rank count.

    RUN/checkpoints/step-00000100/
        weights.safetensors        fp32, by parameter name, full shapes
        exp_avg.safetensors        Adam's moments, likewise
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
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

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
        """The safetensors handle of "weights", "exp_avg" or "exp_avg_sq": `.keys()`, `.get_tensor(name)`."""
        return safe_open(self.path / f"{kind}.safetensors", framework="pt")


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def saved_steps(root: Path) -> list[Path]:
    """Folders of finished steps, newest first."""
    folders = [path for path in root.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)


def newest_verified(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest step that passes its checks, and one line for each newer one that does not.

    Raises CheckpointError if steps are there but none is whole: to start afresh would hide the loss.
    """
    complaints: list[str] = []
    for path in saved_steps(root):
        try:
            return open_verified(path), complaints
        except CheckpointError as error:
            complaints.append(f"{error}; trying an older step")
    if complaints:
        raise CheckpointError(f"no checkpoint in {root} is whole: " + "; ".join(complaints))
    return None, []


def find_checkpoint(path: Path) -> Checkpoint:
    """The newest whole step of the run in `path`, or the step in `path`. Raises CheckpointError."""
    if (path / "manifest.json").is_file():
        return open_verified(path)
    checkpoint, _ = newest_verified(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{path} holds no checkpoint; give a run's folder or one of its checkpoints/step-N"
        )
    return checkpoint


def open_verified(path: Path) -> Checkpoint:
    """Check every file of the step against its manifest. Raises CheckpointError naming the file."""
    manifest = _read_json(path / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}"
        )
    expected = {f"{kind}.safetensors" for kind in KINDS} | {"state.json"}
    listed = manifest.get("files")
    if not isinstance(listed, dict) or set(listed) != expected:
        raise CheckpointError(f"{path / 'manifest.json'} does not list exactly {', '.join(sorted(expected))}")
    for name in sorted(expected):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if listed[name] != {"bytes": file.stat().st_size, "sha256": _sha256(file)}:
            raise CheckpointError(f"{file} does not match its size and sha256 in manifest.json")
    state = _read_json(path / "state.json")
    if step_folder(path.parent, state["progress"]["step"]).name != path.name:
        raise CheckpointError(f"{path} holds step {state['progress']['step']}, not the step of its name")
    return Checkpoint(path, state)


def write_step(
    root: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]
) -> Path:
    """Write a step so that it is either whole or absent, whenever the machine stops.

    tensors: kind -> parameter name -> contiguous fp32 CPU tensor. Returns the step's folder.
    """
    final = step_folder(root, step)
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    files = {}
    for kind, named in tensors.items():
        files[f"{kind}.safetensors"] = _write(temporary / f"{kind}.safetensors", _safetensors_bytes(named))
    files["state.json"] = _write(temporary / "state.json", [_json_bytes(state)])
    _write(temporary / "manifest.json", [_json_bytes({"format": FORMAT, "files": files})])
    _fsync_folder(temporary)
    if final.exists():  # this step was saved before, then found damaged, and trained again
        shutil.rmtree(final)
    temporary.rename(final)
    _fsync_folder(root)
    hint = root / "latest.tmp"
    _write(hint, [final.name.encode() + b"\n"])
    hint.rename(root / "latest")
    return final


def prune(root: Path, keep_last: int) -> None:
    """Remove steps beyond the `keep_last` newest, but those whose state says `kept`, and what
    interrupted saves left behind. A folder being removed is renamed first, so that a reader never
    finds half a step."""
    for path in saved_steps(root)[keep_last:]:
        if not _read_json(path / "state.json")["kept"]:
            path.rename(doomed := path.with_name(path.name + ".old"))
            shutil.rmtree(doomed)
    for leftover in (*root.glob("step-*.tmp"), *root.glob("step-*.old")):
        shutil.rmtree(leftover)


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
            raise CheckpointError(f"the checkpoint could not be written: {error}") from error

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
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
