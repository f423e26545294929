"""The loss curve of one or several runs as a picture, from their `metrics.jsonl`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mosaicbert_ds.errors import ConfigError, DataError

# Training loss is drawn as the mean of so many neighbouring points: single steps hide the curve.
_POINTS_ON_CURVE = 200


def plot_loss(runs: Sequence[Path], out: Path) -> None:
    """Draw training and held-out loss of `runs` against samples seen to `out` (.png, .svg or .pdf).

    Raises DataError for a folder without metrics, ConfigError where matplotlib is missing or `out` cannot be
    written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib; pip install 'mosaicbert-ds[report]'") from None

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    unigram_entropy = None
    for number, run in enumerate(runs):
        records = _read(run)
        name = f"{run.name}: " if len(runs) > 1 else ""
        for tag, label, style in (
            ("train/loss", "training (at the training mask rate)", {"alpha": 0.45, "linewidth": 1.2}),
            ("evaluation/loss", "held out (at 15 %)", {"marker": "o", "markersize": 3.5, "linewidth": 1.8}),
        ):
            points = [(record["samples_seen"], record[tag]) for record in records if tag in record]
            axes.plot(*_thinned(points), color=f"C{number}", label=name + label, **style)
        entropies = [
            record["evaluation/unigram_entropy"] for record in records if "evaluation/loss" in record
        ]
        unigram_entropy = entropies[-1] if entropies else unigram_entropy
    if unigram_entropy is not None:
        label = "unigram entropy: word frequencies alone"
        axes.axhline(unigram_entropy, color="0.5", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="samples seen", ylabel="loss, nats a masked token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: of a suffix that matplotlib does not know
        raise ConfigError(f"{out} cannot be written: {error}; give a .png, .svg or .pdf") from None


def _read(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the --out folder of a run")
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a run may be writing, or was killed while it did
    return [json.loads(line) for line in whole.splitlines()]


def _thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Means of groups of neighbours, at most _POINTS_ON_CURVE of them: x and y."""
    size = max(1, -(-len(points) // _POINTS_ON_CURVE))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    xs, ys = ([sum(point[axis] for point in group) / len(group) for group in groups] for axis in (0, 1))
    return xs, ys
