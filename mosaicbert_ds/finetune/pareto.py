"""The Pareto curve: GLUE of runs' checkpoints against time of training, GPU time and dollars.

    OUT/pareto.csv  pareto.md  pareto.png  pareto.svg
    OUT/points/RUN-step-N/    results.md and results.json of each checkpoint
    OUT/jobs/  cache/         as of `finetune glue`: what has been scored is not scored again

Each job's fingerprint holds that of the checkpoint it starts from, so all share one folder of jobs. An OUT of
before may stand for its runs: its points are taken as they are.
"""

import csv
import io
import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from mosaicbert_ds import tables
from mosaicbert_ds.data.files import sha256_of, sha256_of_facts, write_durably
from mosaicbert_ds.errors import CheckpointError, ConfigError, DataError, TrainingError
from mosaicbert_ds.finetune.config import FinetuneConfig, load_finetune_recipe
from mosaicbert_ds.finetune.models import of_checkpoint
from mosaicbert_ds.finetune.plan import FORMAT_VERSION as JOB_FORMAT
from mosaicbert_ds.finetune.report import make_out
from mosaicbert_ds.finetune.suite import Devices, Request, finetune, glue_request, precision_of, stoppable
from mosaicbert_ds.finetune.tasks import GLUE
from mosaicbert_ds.model.export import FORMAT_VERSION as EXPORT_FORMAT
from mosaicbert_ds.training.checkpoint import Checkpoint, open_verified, saved_steps
from mosaicbert_ds.training.progress import Progress
from mosaicbert_ds.typed_yaml import to_tree

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
_TABLE = "pareto.csv"
_PUBLISHED_GPUS, _PUBLISHED_USD_PER_GPU_HOUR = 8, 2.50


class TaskScore(NamedTuple):
    mean: float
    std: float | None  # over seeds; one has none


@dataclass(frozen=True, kw_only=True)
class Point:
    """One checkpoint: what it cost and what it scores, in percent. `dollars` needs a price in the recipe."""

    curve: str  # checkpoints of one curve are joined by a line
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
    is_official: bool  # all of GLUE's tasks on the official files, whole: it compares with published scores
    protocol: str  # the same for points that were finetuned alike, see `protocol_of`
    by_task: Mapping[str, TaskScore]


def protocol_of(config: FinetuneConfig, files: Mapping[str, Mapping[str, Path]]) -> str:
    """A fingerprint of what decides a score beside the checkpoint: recipe, seeds, files, our own formats."""
    facts = {
        "recipe": to_tree(config) | {"precision": precision_of(config)},
        "files": {
            task: {split: sha256_of(path) for split, path in files[task].items()} for task in config.tasks
        },
        "formats": [EXPORT_FORMAT, JOB_FORMAT],
    }
    return sha256_of_facts(facts)[:12]


def point_of(
    curve: str, run: str, checkpoint: Checkpoint, results: Mapping[str, Any], protocol: str
) -> Point:
    """The checkpoint's place on the curve. Time is that of training, without evaluation and saving; the price
    is that of the start that wrote it."""
    state, average = checkpoint.state, results["average"]
    progress, price = Progress.of(state), state["recipe"]["telemetry"]["usd_per_gpu_hour"]
    gpu_hours = progress.training_gpu_s / 3600
    return Point(
        curve=curve,
        run=run,
        step=progress.step,
        samples=progress.samples_seen,
        hours=progress.training_s / 3600,
        gpu_hours=gpu_hours,
        dollars=None if price is None else gpu_hours * price,
        score=average["score"],
        low=average["interval"][0],
        high=average["interval"][1],
        tasks=average["tasks"],
        is_official=average["is_official"],
        protocol=protocol,
        by_task={name: TaskScore(row["score"], row["std"]) for name, row in results["tasks"].items()},
    )


def named_run(text: str) -> tuple[str | None, Path]:
    """CURVE=RUN, or RUN alone."""
    curve, equals, run = text.partition("=")
    if not equals or Path(text).exists():  # a folder may have "=" in its name
        return None, Path(text)
    return curve, Path(run)


def _is_of_before(run: Path) -> bool:
    """Whether `run` is an OUT of before; one that is a run's folder too counts as the run."""
    return (run / _TABLE).is_file() and not (run / "checkpoints").is_dir()


def pareto(
    runs: Sequence[tuple[str | None, Path]],
    config: FinetuneConfig,
    files: Mapping[str, Mapping[str, Path]],
    out: Path,
    *,
    devices: Devices,
    say: Callable[[str], None] = print,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> list[Point]:
    """Score every checkpoint of `runs` that has not been scored, and write tables and pictures. `runs`: pairs
    of a curve (None: named as its run, or as in the OUT of before) and a folder.

    Raises ConfigError for scores that do not compare, CheckpointError for a run without checkpoints,
    StoppedError if asked to stop, TrainingError when jobs have failed, after what has a score is written.
    """
    make_out(out)
    points: dict[tuple[str, str, int], Point] = {}
    before = [(curve, run) for curve, run in runs if _is_of_before(run)]
    runs = [pair for pair in runs if pair not in before]
    for curve, run in before:
        for point in _read(run / _TABLE, curve):
            if points.setdefault(_name(point), point) != point:
                raise ConfigError(
                    f"{run / _TABLE} has another score of {point.run} step {point.step}, curve {point.curve}"
                    f", than the table before it; leave one out, or give its curve another name, NAME={run}"
                )
    scored = [set(point.by_task) for point in points.values()] + ([set(config.tasks)] if runs else [])
    if other := next((tasks for tasks in scored if tasks != scored[0]), None):
        one, two = (" ".join(task for task in GLUE if task in tasks) for tasks in (scored[0], other))
        raise ConfigError(
            f"means of {one} and of {two} do not compare; give --tasks {one}, or another --out of before"
        )
    protocol = protocol_of(config, files) if runs else ""
    if len({point.protocol for point in points.values()} | ({protocol} if runs else set())) > 1:
        raise ConfigError(
            "scores by different finetuning recipes, seeds, GLUE files or versions do not compare; score all "
            "runs with the same --recipe, --set, --seeds and --glue-dir"
        )
    names = [run.resolve().name for _, run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"runs {', '.join(names)} share a name; rename their folders")
    todo = []
    for (curve, run), name in zip(runs, names, strict=True):
        folders = saved_steps(run / "checkpoints")[::-1]
        if not folders:
            raise CheckpointError(f"{run} holds no checkpoint; give a run's folder")
        todo += [(curve or name, name, folder) for folder in folders]
    if points:
        _write(points.values(), out)
    complaints = []
    for curve, name, folder in todo:
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
        point = point_of(curve, name, checkpoint, results, protocol)
        points[_name(point)] = point
        _write(points.values(), out)
        # What was needed to start from takes gigabytes a checkpoint; the answers stay.
        shutil.rmtree(pretrained.folder, ignore_errors=True)
        for job in results["jobs"]:
            shutil.rmtree(out / "jobs" / job / "model", ignore_errors=True)
    if complaints:
        raise TrainingError(f"{len(complaints)} checkpoints have no score: " + "; ".join(complaints))
    return _in_order(points.values())


def _name(point: Point) -> tuple[str, str, int]:
    return point.curve, point.run, point.step


def _in_order(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda point: (point.curve, point.gpu_hours))


def _write(points: Iterable[Point], out: Path) -> None:
    points = _in_order(points)
    text = io.StringIO()
    rows = [_row_of(point) for point in points]
    columns = dict.fromkeys(column for row in rows for column in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_durably(out / _TABLE, text.getvalue().encode())
    write_durably(out / "pareto.md", markdown(points).encode())
    plot(points, [out / "pareto.png", out / "pareto.svg"])


def _row_of(point: Point) -> dict[str, Any]:
    row = asdict(point)
    for task, (mean, std) in row.pop("by_task").items():
        row |= {task: mean, f"{task} std": std}
    return row


def _read(table: Path, curve: str | None) -> list[Point]:
    """The points that `_write` wrote, all of `curve` if it is given. Raises DataError for another table."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        points = [
            Point(
                **{field.name: _TYPES[field.name](row[field.name]) for field in fields(Point)[:-1]},
                by_task={
                    task: TaskScore(float(row[task]), _number(row[f"{task} std"]))
                    for task in GLUE
                    if row.get(task)
                },
            )
            for row in rows
        ]
    except (KeyError, ValueError) as error:
        raise DataError(f"{table} is no table of `mosaicbert pareto` ({error}); make it again") from None
    if curve is None:
        return points
    if len(curves := {point.curve for point in points}) > 1:
        raise ConfigError(f"{table} holds the curves {', '.join(curves)}; give it without {curve}=")
    return [replace(point, curve=curve) for point in points]


def _number(text: str) -> float | None:
    return float(text) if text else None


_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("curve", "run", "protocol"), str),
    **dict.fromkeys(("step", "samples", "tasks"), int),
    **dict.fromkeys(("hours", "gpu_hours", "score", "low", "high"), float),
    "dollars": _number,
    "is_official": {"True": True, "False": False}.__getitem__,
}
_NOT_COMPARABLE = (
    "Scores of part of the tasks, or on files that are not the official ones, whole: NOT comparable with "
    "published GLUE."
)


def markdown(points: Sequence[Point]) -> str:
    """The points by task, as a Markdown table: means over seeds, and their standard deviations."""
    tasks = [task for task in GLUE if any(task in point.by_task for point in points)]
    unit, factor = _unit(points)
    titles = ["model", f"GPU-{unit}", "$", "samples", *(GLUE[task].title for task in tasks), "mean"]
    rows = []
    for point in points:
        cost = "" if point.dollars is None else f"{point.dollars:,.2f}"
        scores = [_said(point.by_task[task]) if task in point.by_task else "" for task in tasks]
        mean = f"**{point.score:.1f}** ({point.low:.1f} to {point.high:.1f})"
        rows.append(
            [point.curve, f"{factor * point.gpu_hours:,.1f}", cost, f"{point.samples:,}", *scores, mean]
        )
    notes = catching_up(points)
    if not all(point.is_official for point in points):
        notes.insert(0, _NOT_COMPARABLE)
    return tables.markdown(titles, rows) + "".join(f"\n{note}\n" for note in notes)


def catching_up(points: Sequence[Point]) -> list[str]:
    """A sentence for each curve that reaches another's best score in less GPU time; between two checkpoints
    the score is taken to rise with the logarithm of time. It says so where in that other's time no
    score is so much higher that its interval leaves that best one out."""
    curves: dict[str, list[Point]] = {}
    for point in _in_order(points):
        if point.gpu_hours:  # none before the first step that counts
            curves.setdefault(point.curve, []).append(point)
    unit, factor = _unit(points)
    said = []
    for (fast, mine), (slow, others) in itertools.permutations(curves.items(), 2):
        best = max(others, key=lambda point: point.score)
        there = next((number for number, point in enumerate(mine) if point.score >= best.score), None)
        if there is None:
            continue
        after, at_most = mine[there], "" if there else "at most "
        hours = after.gpu_hours
        if there:
            before = mine[there - 1]
            share = (best.score - before.score) / (after.score - before.score)
            hours = before.gpu_hours * (after.gpu_hours / before.gpu_hours) ** share
        is_clear = any(point.low > best.score for point in mine if point.gpu_hours <= best.gpu_hours)
        if hours < best.gpu_hours:
            said.append(
                f"{fast} reaches {slow}'s best score, {best.score:.1f}, after {at_most}{factor * hours:.1f} "
                f"GPU-{unit}, {slow} after {factor * best.gpu_hours:.1f}: "
                f"{hours / best.gpu_hours:.2f} of its time"
                f"{'.' if is_clear else ', within the 95 % intervals.'}"
            )
    return said


def _said(score: TaskScore) -> str:
    return f"{score.mean:.1f}" if score.std is None else f"{score.mean:.1f} ± {score.std:.1f}"


def _unit(points: Sequence[Point]) -> tuple[str, float]:
    """What time is told in, and how many of it an hour has."""
    return ("minutes", 60.0) if max(point.gpu_hours for point in points) < 1 else ("hours", 1.0)


def plot(points: Sequence[Point], pictures: Sequence[Path]) -> None:
    """Draw the curves to `pictures`, beside the published ones where these compare. Raises ConfigError where
    matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
    except ImportError:
        raise ConfigError("drawing needs matplotlib; pip install 'mosaicbert-ds[report]'") from None

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    unit, per_hour = _unit(points)
    costs = (
        ("hours", f"{unit} of training", per_hour, 1.0),
        ("gpu_hours", f"GPU-{unit}", per_hour, _PUBLISHED_GPUS),
        ("dollars", "dollars", 1.0, _PUBLISHED_GPUS * _PUBLISHED_USD_PER_GPU_HOUR),
    )
    references = PUBLISHED if all(point.is_official for point in points) else {}
    for panel, (cost, label, scale, published) in zip(axes, costs, strict=True):
        for (name, (hours, scores)), style in zip(references.items(), ("--", ":"), strict=False):
            xs = [scale * published * h for h in hours]
            panel.plot(xs, scores, style, color="0.4", label=f"{name} (8 A100)")
        for number, curve in enumerate(dict.fromkeys(point.curve for point in points)):
            mine = [p for p in points if p.curve == curve and getattr(p, cost) is not None]
            below, above = [p.score - p.low for p in mine], [p.high - p.score for p in mine]
            # A percentile interval may leave out the score itself by a hair.
            errors = [[max(0.0, e) for e in side] for side in (below, above)]
            xs, ys = [scale * getattr(p, cost) for p in mine], [p.score for p in mine]
            panel.errorbar(xs, ys, errors, fmt="o-", color=f"C{number}", capsize=3, label=curve)
        panel.set(xlabel=label, xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    tasks = points[0].tasks
    of = "GLUE" if tasks == len(GLUE) else f"mean of {tasks} GLUE tasks"
    axes[0].set_ylabel(f"{of}, %" if references else f"{of} (not comparable with published GLUE), %")
    axes[0].legend(frameon=False, fontsize=8)
    for picture in pictures:
        figure.savefig(picture, dpi=150)


def pareto_command(
    request: Request,
    runs: Sequence[str],
    glue_dir: str | None,
    tasks: list[str] | None,
    from_pretrained: bool,
) -> None:
    """`mosaicbert pareto`."""
    named = [named_run(run) for run in runs]
    if glue_dir is not None:
        config, files = glue_request(request, glue_dir, tasks, from_pretrained)
    elif unscored := [run for _, run in named if not _is_of_before(run)]:
        raise ConfigError(f"{unscored[0]} has no score yet; give --glue-dir, the folder of the GLUE files")
    else:
        config, files = load_finetune_recipe(request.recipe, request.overrides), {}
    with stoppable() as stop:
        points = pareto(
            named, config, files, request.out,
            devices=request.devices, asked_to_stop=lambda: bool(stop),
        )  # fmt: skip
    print(markdown(points), f"curve in {request.out / 'pareto.png'}, pareto.svg and pareto.csv", sep="\n")
