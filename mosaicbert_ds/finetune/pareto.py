"""The Pareto curve: GLUE of a run's checkpoints against hours, GPU-hours and dollars.

    OUT/pareto.csv  pareto.png  pareto.svg
    OUT/points/RUN-step-N/    results.md and results.json of each checkpoint
    OUT/jobs/  cache/         as of `finetune glue`: what has been scored is not scored again

Each job's fingerprint holds that of the checkpoint it starts from, so all share one folder of jobs.
"""

import csv
import io
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mosaicbert_ds.data.files import write_durably
from mosaicbert_ds.errors import CheckpointError, ConfigError, TrainingError
from mosaicbert_ds.finetune.config import FinetuneConfig
from mosaicbert_ds.finetune.models import of_checkpoint
from mosaicbert_ds.finetune.suite import Devices, Request, finetune, glue_request, stoppable
from mosaicbert_ds.finetune.tasks import GLUE
from mosaicbert_ds.training.checkpoint import Checkpoint, open_verified, saved_steps

# Read off the published plot, 8 A100 (https://arxiv.org/abs/2312.17482): hours and GLUE in percent.
PUBLISHED: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "MosaicBERT-Base, published": (
        (0.49, 1.45, 2.41, 3.37, 4.34, 5.78, 6.74, 7.70, 8.68, 9.64),
        (76.08, 80.65, 81.80, 82.52, 82.95, 83.52, 83.85, 83.99, 83.97, 84.26),
    ),
    "BERT-Base, published": (
        (0.55, 1.65, 2.75, 3.85, 4.96, 6.60, 7.70, 8.80, 9.91, 11.01),
        (72.58, 79.88, 80.97, 81.60, 82.14, 82.84, 83.02, 83.11, 83.09, 83.51),
    ),
}
_PUBLISHED_GPUS, _PUBLISHED_USD_PER_GPU_HOUR = 8, 2.50


@dataclass(frozen=True, kw_only=True)
class Point:
    """One checkpoint: what it cost and what it scores, in percent. `dollars` needs a price in the recipe."""

    run: str
    step: int
    samples: int
    hours: float
    gpu_hours: float
    dollars: float | None
    score: float
    low: float  # of the 95 % interval
    high: float
    tasks: int


def point_of(run: str, checkpoint: Checkpoint, average: Mapping[str, Any]) -> Point:
    """The checkpoint's place on the curve. GPUs and price are those of the start that wrote it."""
    state = checkpoint.state
    progress, price = state["progress"], state["recipe"]["telemetry"]["usd_per_gpu_hour"]
    hours = progress["elapsed_s"] / 3600
    gpu_hours = hours * state["world_size"]
    return Point(
        run=run,
        step=progress["step"],
        samples=progress["samples_seen"],
        hours=hours,
        gpu_hours=gpu_hours,
        dollars=None if price is None else gpu_hours * price,
        score=average["score"],
        low=average["interval"][0],
        high=average["interval"][1],
        tasks=average["tasks"],
    )


def pareto(
    runs: Sequence[Path],
    config: FinetuneConfig,
    files: Mapping[str, Mapping[str, Path]],
    out: Path,
    *,
    devices: Devices,
    say: Callable[[str], None] = print,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> list[Point]:
    """Score every checkpoint of `runs` that has not been scored, and write table and pictures.

    Raises CheckpointError for a run without checkpoints, StoppedError if asked to stop, TrainingError when
    jobs have failed, after what has a score is written.
    """
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"runs {', '.join(names)} share a name; rename their folders")
    steps = {name: saved_steps(run / "checkpoints")[::-1] for name, run in zip(names, runs, strict=True)}
    for name, run in zip(names, runs, strict=True):
        if not steps[name]:
            raise CheckpointError(f"{run} holds no checkpoint; give a run's folder")
    points, complaints = [], []
    for name, folder in ((name, folder) for name, folders in steps.items() for folder in folders):
        say(f"{name} {folder.name}")
        try:
            checkpoint = open_verified(folder)
            pretrained = of_checkpoint(checkpoint, out / "models")
            tasks = {task: GLUE[task] for task in config.tasks}
            report = out / "points" / f"{name}-{folder.name}"
            results = finetune(
                config, tasks, files, pretrained, out,
                report=report, devices=devices, say=say, asked_to_stop=asked_to_stop,
            )  # fmt: skip
        except (CheckpointError, TrainingError) as error:  # removed by its run meanwhile, damaged, diverged
            complaints.append(f"{name} {folder.name}: {error}")
            continue
        points.append(point_of(name, checkpoint, results["average"]))
        _write(points, out)
        # What was needed to start from takes gigabytes a checkpoint; the answers stay.
        shutil.rmtree(pretrained.folder, ignore_errors=True)
        for job in results["jobs"]:
            shutil.rmtree(out / "jobs" / job / "model", ignore_errors=True)
    if complaints:
        raise TrainingError(f"{len(complaints)} checkpoints have no score: " + "; ".join(complaints))
    return points


def _write(points: Sequence[Point], out: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(asdict(points[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in points)
    write_durably(out / "pareto.csv", text.getvalue().encode())
    plot(points, [out / "pareto.png", out / "pareto.svg"])


def plot(points: Sequence[Point], pictures: Sequence[Path]) -> None:
    """Draw the curves to `pictures`. Raises ConfigError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib; pip install 'mosaicbert-ds[report]'") from None

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    costs = (
        ("hours", "hours of training", 1.0),
        ("gpu_hours", "GPU-hours", _PUBLISHED_GPUS),
        ("dollars", "dollars", _PUBLISHED_GPUS * _PUBLISHED_USD_PER_GPU_HOUR),
    )
    for panel, (cost, label, factor) in zip(axes, costs, strict=True):
        for (name, (hours, scores)), style in zip(PUBLISHED.items(), ("--", ":"), strict=True):
            panel.plot([factor * h for h in hours], scores, style, color="0.4", label=f"{name} (8 A100)")
        for number, run in enumerate(dict.fromkeys(point.run for point in points)):
            mine = [p for p in points if p.run == run and getattr(p, cost) is not None]
            below, above = [p.score - p.low for p in mine], [p.high - p.score for p in mine]
            # A percentile interval may leave out the score itself by a hair.
            errors = [[max(0.0, e) for e in side] for side in (below, above)]
            xs, ys = [getattr(p, cost) for p in mine], [p.score for p in mine]
            panel.errorbar(xs, ys, errors, fmt="o-", color=f"C{number}", capsize=3, label=run)
        panel.set(xlabel=label, xscale="log")
        panel.grid(alpha=0.3)
    tasks = points[0].tasks
    axes[0].set_ylabel("GLUE, %" if tasks == len(GLUE) else f"mean of {tasks} GLUE tasks, %")
    axes[0].legend(frameon=False, fontsize=8)
    for picture in pictures:
        figure.savefig(picture, dpi=150)


def pareto_command(
    request: Request, runs: Sequence[Path], glue_dir: str, tasks: list[str] | None, from_pretrained: bool
) -> None:
    """`mosaicbert pareto`."""
    config, files = glue_request(request, glue_dir, tasks, from_pretrained)
    with stoppable() as stop:
        pareto(runs, config, files, request.out, devices=request.devices, asked_to_stop=lambda: bool(stop))
    print(f"curve in {request.out / 'pareto.png'}, pareto.svg and pareto.csv", flush=True)
