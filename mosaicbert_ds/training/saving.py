"""From the engine to a checkpoint and back, at any ZeRO stage and rank count."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mosaicbert_ds import dist
from mosaicbert_ds.errors import CheckpointError
from mosaicbert_ds.model import ModelConfig
from mosaicbert_ds.model.build import load_weights as copy_weights
from mosaicbert_ds.training import checkpoint as disk
from mosaicbert_ds.training import engine as ds
from mosaicbert_ds.training.progress import Progress, crosses
from mosaicbert_ds.training.run_folder import was_resumed
from mosaicbert_ds.typed_yaml import to_tree

# Model keys that change how the numbers are computed, not which numbers there are.
_FREE_MODEL_KEYS = {"activation_checkpointing"}


class Saver:
    """Saves the run's steps on the schedule of `CheckpointConfig`, beside the training.

    root: the folder of steps. facts: what the state records beside the progress: the recipe, the
    hashes of tokenizer and data, versions.
    """

    def __init__(self, root: Path, config: disk.CheckpointConfig, facts: dict[str, Any]) -> None:
        self._root, self._config, self._facts = root, config, facts
        self._writer = disk.BackgroundWriter()

    def is_due(self, before: int, after: int) -> bool:
        """Whether going from `before` to `after` samples seen passes a mark of the schedule."""
        return crosses(before, after, self._config.every_samples) or self._is_kept(before, after)

    def save(self, engine: Any, progress: Progress, before: int, last: bool = False) -> None:
        """Copy the state to the host, all ranks together, and leave the writing to a thread.

        `before`: samples seen at the step's start. The last step of a run is kept like the marked ones.
        """
        tensors: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in disk.KINDS}
        for name, parameter in ds.named_parameters(engine).items():
            for kind in ("weights", *ds.moments(engine, parameter)):
                full = ds.gather(engine, parameter, kind)
                if dist.is_main():  # a copy even on CPUs: the next step writes into these tensors
                    tensors[kind][name] = full.to("cpu", copy=True)
        adam_steps = ds.adam_steps(engine)
        if not dist.is_main():
            return
        state = self._facts | {
            "progress": progress.to_dict(),
            "adam_steps": adam_steps,
            "kept": last or self._is_kept(before, progress.samples_seen),
        }
        step = progress.step

        def write() -> None:
            disk.write_step(self._root, step, tensors, state)
            disk.prune(self._root, step, self._config.keep_last)

        self._writer.submit(write)

    def wait(self) -> None:
        """Wait until everything saved is on the disk. Raises CheckpointError if it is not."""
        self._writer.wait()

    def _is_kept(self, before: int, after: int) -> bool:
        return any(before < mark <= after for mark in self._config.keep_at_samples)


def choose_checkpoint(resume: str, root: Path) -> tuple[disk.Checkpoint | None, list[str]]:
    """What a run starts from, and lines to say about it. Main rank only.

    resume: "auto" for the newest whole step of this run or none, "never", or the path of a step. Another
    run's step is where to begin: the same command, given again, goes on with this run's own steps.
    """
    if resume == "auto":
        return disk.newest_verified(root)
    if resume == "never":
        if disk.saved_steps(root):
            raise CheckpointError(f"{root} holds checkpoints already; give --resume auto or another --out")
        return None, []
    path = Path(resume)
    # This run began from that step, which may be gone since.
    if (
        path.resolve().parent != root.resolve()
        and disk.saved_steps(root)
        and was_resumed(root.parent, resume)
    ):
        own, notes = disk.newest_verified(root)
        return own, [*notes, f"the run began from --resume {path} and goes on with its own steps"]
    if not path.is_dir():
        raise CheckpointError(f"--resume is '{resume}'; allowed are auto, never or the folder of a step")
    checkpoint = disk.open_verified(path)
    newest = next(iter(disk.saved_steps(root)), None)
    if newest and disk.step_number(newest) > checkpoint.state["progress"]["step"]:
        raise CheckpointError(
            f"{newest} is further than {path}, and the next start would take it; give --resume auto to go on "
            "from there, another --out, or remove the steps after the one to go on from"
        )
    return checkpoint, []


def check_fits(checkpoint: disk.Checkpoint, facts: dict[str, Any]) -> list[str]:
    """Refuse a checkpoint of another model, tokenizer or data; list the recipe's other changes."""
    theirs, ours = checkpoint.state, facts
    # A key that the checkpoint's version did not know yet had the meaning of its default.
    model = _changes(to_tree(ModelConfig()) | theirs["recipe"]["model"], ours["recipe"]["model"])
    if fatal := [line for key, line in model.items() if key not in _FREE_MODEL_KEYS]:
        raise CheckpointError(
            f"{checkpoint.path} is of another model: {', '.join(fatal)}; change --recipe or --out"
        )
    optimizers = [facts["recipe"]["optimizer"].get("name", "adamw") for facts in (theirs, ours)]
    if optimizers[0] != optimizers[1]:
        raise CheckpointError(
            f"{checkpoint.path} was trained with optimizer.name={optimizers[0]}, now {optimizers[1]}: their "
            "moments differ; go on with the former, or start a new run with another --out"
        )
    for key, meaning in (("data_fingerprint", "shards"), ("tokenizer_sha256", "tokenizer"), ("seed", "seed")):
        if theirs[key] != ours[key]:
            raise CheckpointError(
                f"{checkpoint.path} was trained with other {meaning} ({key} {theirs[key]}, now {ours[key]}); "
                "to go on in the same order give the same, or begin a new run from its export, with --init"
            )
    changes = _changes(_flat(theirs["recipe"]), _flat(ours["recipe"]))
    return [f"changed since the checkpoint: {line}" for line in changes.values()]


def load_weights(model: nn.Module, checkpoint: disk.Checkpoint | None) -> None:
    """Fill the fp32 `model` from the main rank's checkpoint, on all ranks. `None` elsewhere."""
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    dist.on_main(lambda: _check_names(checkpoint, expected))
    for name, weight in model.named_parameters():
        weight.data.copy_(_broadcast(checkpoint, "weights", name, weight.shape))


def begin_with(model: PreTrainedModel, weights: dict[str, torch.Tensor] | None, source: str) -> None:
    """Fill the fp32 `model` with the main rank's `weights`, by name and of `source`, on all ranks. `None`
    elsewhere."""
    if dist.is_main():
        assert weights is not None
        copy_weights(model, weights, source)
    for weight in model.parameters():
        weight.data.copy_(dist.broadcast(weight.data.to(dist.device())))


def load_moments(engine: Any, checkpoint: disk.Checkpoint | None) -> None:
    """Fill the optimizer's moments and Adam's step count from the main rank's checkpoint, on all ranks."""
    ds.create_moments(engine, dist.on_main(lambda: checkpoint.state["adam_steps"] if checkpoint else None))
    shapes = dist.on_main(lambda: _shapes(checkpoint))
    for name, parameter in ds.named_parameters(engine).items():
        for kind in ds.moments(engine, parameter):
            ds.scatter(engine, parameter, kind, _broadcast(checkpoint, kind, name, shapes[name]))


def _broadcast(checkpoint: disk.Checkpoint | None, kind: str, name: str, shape: Any) -> torch.Tensor:
    if dist.is_main():
        assert checkpoint is not None
        with checkpoint.open(kind) as file:
            return dist.broadcast(file.get_tensor(name).to(dist.device()))
    return dist.broadcast(torch.empty(tuple(shape), device=dist.device()))


def _shapes(checkpoint: disk.Checkpoint | None) -> dict[str, list[int]]:
    assert checkpoint is not None
    with checkpoint.open("weights") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _check_names(checkpoint: disk.Checkpoint | None, expected: dict[str, tuple[int, ...]]) -> None:
    assert checkpoint is not None
    found = {name: tuple(shape) for name, shape in _shapes(checkpoint).items()}
    if found != expected:
        differing = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise CheckpointError(
            f"{checkpoint.path} has other parameters than the model: {', '.join(differing[:5])}"
        )


def _changes(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, str]:
    keys = sorted(theirs.keys() | ours.keys())
    return {k: f"{k} {theirs.get(k)} -> {ours.get(k)}" for k in keys if theirs.get(k) != ours.get(k)}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
