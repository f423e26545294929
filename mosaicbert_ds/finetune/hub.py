"""GLUE from the Hugging Face hub, written as files of the official columns."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaicbert_ds.data.files import write_durably
from mosaicbert_ds.errors import DataError
from mosaicbert_ds.finetune.tasks import GLUE, Task


def fetch_glue(spec: str, names: Sequence[str], folder: Path) -> dict[str, dict[str, Path]]:
    """Task to split to file, from `hf:PATH` such as `hf:nyu-mll/glue`; what `folder` has is not asked again.

    Raises DataError where the hub cannot be reached or holds something else.
    """
    folder /= hashlib.sha256(spec.encode()).hexdigest()[:12]
    return {name: {s: _fetch(spec, GLUE[name], s, folder) for s in GLUE[name].splits} for name in names}


def _fetch(spec: str, task: Task, split: str, folder: Path) -> Path:
    path = folder / task.name / f"{split}.jsonl"
    if path.is_file():
        return path
    import datasets  # takes seconds

    their_split = split.replace("dev", "validation")
    try:
        data: Any = datasets.load_dataset(spec.removeprefix("hf:"), task.name, split=their_split)
    except Exception as error:  # hub, network and format errors of many libraries
        said = " ".join(str(error).split())
        raise DataError(
            f"{spec} cannot be opened for {task.name} {their_split}: {said}; give a folder of files"
        ) from None
    theirs = task.hub_columns or task.text_columns
    try:
        feature = data.features["label"]
        texts = [data[column] for column in theirs]
    except KeyError as error:
        raise DataError(
            f"{spec} {task.name} has no column {error}; it is not GLUE as nyu-mll/glue has it"
        ) from None
    lines = []
    for *row, label in zip(*texts, data["label"], strict=True):
        record = dict(zip(task.text_columns, row, strict=True))
        # Test splits have the label -1; a class is a number, and its names there are the official labels,
        # but for 0 and 1, which have names only there.
        if split in ("train", *task.eval_splits):
            record[task.label_column] = label if task.is_regression else _label(task, feature, label)
        lines.append(json.dumps(record) + "\n")
    write_durably(path, "".join(lines).encode())
    return path


def _label(task: Task, feature: Any, label: int) -> str:
    names = getattr(feature, "names", None)
    return names[label] if names and set(names) == set(task.labels) else str(label)
