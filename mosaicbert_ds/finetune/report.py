"""Results of a finetuning: the table for people, results.json, and test files in GLUE's submission format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mosaicbert_ds import tables
from mosaicbert_ds.data.files import write_durably
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.finetune.plan import Job
from mosaicbert_ds.finetune.run import Outcome
from mosaicbert_ds.finetune.score import (
    METRICS,
    Answers,
    bootstrap,
    interval,
    predictions_of,
    task_score,
)
from mosaicbert_ds.finetune.tasks import GLUE, GLUE_PUBLISHED_AVERAGE, Task

_BOOTSTRAP_SEED = 0  # the same answers get the same interval
_NAMES = {"accuracy": "accuracy", "f1": "F1", "macro_f1": "macro F1", "matthews": "Matthews"} | {
    "pearson": "Pearson",
    "spearman": "Spearman",
}
_INTERVALS = (
    "Intervals: 95 %, bootstrap percentiles over rows and seeds drawn anew together. std: over seeds (n - 1)."
)


def make_out(out: Path) -> None:
    """The folder for results, before any work is done. Raises ConfigError where it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}; give another folder") from None


@dataclass(frozen=True, kw_only=True)
class SplitRows:
    """What a split's file held, for the notes under the table."""

    rows: int
    broken: int


def summarise(
    tasks: Mapping[str, Task],
    jobs: Sequence[Job],
    outcomes: Mapping[str, Outcome],
    folder: Path,
    rows: Mapping[str, Mapping[str, SplitRows]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Everything in results.json. Scores are in percent.

    folder: of the finished jobs; rows: by task and split; about: facts to record as they are.
    """
    rng = np.random.default_rng(_BOOTSTRAP_SEED)
    notes = _row_notes(tasks, rows)
    rows_of_tasks: dict[str, Any] = {}
    replicates = []
    for name, task in tasks.items():
        mine = [job for job in jobs if job.task == name]
        done = [job for job in mine if outcomes[job.name].result]
        for job in mine:
            if job not in done:
                notes.append(f"{job.name} has no result: {outcomes[job.name].reason}")
        if not done:
            continue
        if "f1" in task.metrics and task.labels != ("0", "1"):
            notes.append(f"{task.title}: F1 is that of '{task.labels[1]}'")
        runs = [read_answers(folder / job.name, task) for job in done]
        drawn = 100 * bootstrap(task, runs, rng)
        if len(done) == len(mine):
            replicates.append(drawn)
        metrics = []
        for split in runs[0]:
            for metric in task.metrics:
                values = []
                for job, run in zip(done, runs, strict=True):
                    # Of the answers: the job may be of before, when other metrics were asked for.
                    value = METRICS[metric](run[split].predictions, run[split].labels)
                    if isinstance(value, str):
                        where = f"{task.title} {split}, seed {job.seed}"
                        notes.append(f"{where}: no {_NAMES[metric]}, since {value}; counted as 0")
                        value = 0.0
                    values.append(100 * value)
                metrics.append({"split": split, "metric": metric, **_spread(values)})
        low, high = interval(drawn)
        rows_of_tasks[name] = {
            "title": task.title,
            "score": 100 * task_score(task, runs),
            "std": _spread([100 * task_score(task, [run]) for run in runs])["std"],
            "interval": [low, high],
            "published": task.published,
            "complete": len(done) == len(mine),
            "seeds": [job.seed for job in done],
            "metrics": metrics,
        }
    results: dict[str, Any] = {**about, "tasks": rows_of_tasks, "notes": notes}
    complete = [row["score"] for row in rows_of_tasks.values() if row["complete"]]
    if complete:
        low, high = interval(np.mean(replicates, axis=0))
        results["average"] = {
            "score": float(np.mean(complete)),
            "interval": [low, high],
            "tasks": len(complete),
        }
        results["average"]["is_glue"] = len(complete) == len(GLUE) and set(tasks) == set(GLUE)
        results["average"]["is_official"] = results["average"]["is_glue"] and are_official(tasks, rows)
    return results


def are_official(tasks: Mapping[str, Task], rows: Mapping[str, Mapping[str, SplitRows]]) -> bool:
    """Whether the files hold the official rows, so that scores compare with published ones.

    Broken rows are not counted: everyone drops them.
    """
    return all(
        split in rows[name] and rows[name][split].rows == official
        for name, task in tasks.items()
        for split, official in task.official_rows.items()
    )


def read_answers(job: Path, task: Task) -> dict[str, Answers]:
    """A finished job's answers to the splits that have labels."""
    arrays = safetensors.numpy.load_file(job / "answers.safetensors")
    return {
        split: Answers(predictions_of(task, arrays[f"{split}.logits"]), arrays[f"{split}.labels"])
        for split in task.splits
        if f"{split}.labels" in arrays
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; one seed has none."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "n": len(values)}


def _row_notes(tasks: Mapping[str, Task], rows: Mapping[str, Mapping[str, SplitRows]]) -> list[str]:
    notes, other = [], []
    for name, task in tasks.items():
        for split, found in rows[name].items():
            official = task.official_rows.get(split)
            if official is not None and found.rows != official:
                other.append(f"{task.title} {split} {found.rows:,} of {official:,}")
            if found.broken:
                notes.append(f"{task.title} {split}: {found.broken:,} rows with missing fields were left out")
        for split in task.optional_splits:
            if split not in rows[name]:
                notes.append(f"{task.title} {split} is absent: the score is the mean over what is there")
    if other:
        notes.insert(
            0,
            f"Rows differ from the official files ({'; '.join(other)}): these scores are NOT comparable with "
            "published GLUE",
        )
    return notes


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table with its notes."""
    titles = ["task", "metric", "mean", "std", "n", "95 % interval", "published MosaicBERT-Base"]
    lines: list[list[str]] = []
    for row in results["tasks"].values():
        several = len(row["metrics"]) > 1
        end = [_interval(row), _number(row["published"])]
        for metric in row["metrics"]:
            name = _NAMES[metric["metric"]]
            if len({m["split"] for m in row["metrics"]}) > 1:
                name += f" ({metric['split'].removeprefix('dev_')})"
            cells = [row["title"], name, _number(metric["mean"]), _number(metric["std"]), str(metric["n"])]
            lines.append([*cells, *(["", ""] if several else end)])
        if several:
            lines.append([row["title"], "**score**", _number(row["score"]), _number(row["std"]), "", *end])
    average = results.get("average")
    if average and average["tasks"] > 1:
        name = "GLUE" if average["is_glue"] else f"mean of {average['tasks']} tasks"
        published = _number(GLUE_PUBLISHED_AVERAGE if average["is_glue"] else None)
        lines.append(
            [f"**{name}**", "", f"**{average['score']:.2f}**", "", "", _interval(average), published]
        )
    if not any(line[-1] for line in lines):  # tasks of your own
        titles, lines = titles[:-1], [line[:-1] for line in lines]
    notes = "".join(f"- {note}\n" for note in [*results["notes"], _INTERVALS])
    return f"Model: {results['model']}\n\n{tables.markdown(titles, lines)}\n{notes}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{low:.2f} to {high:.2f}"


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """results.json and results.md in `out`."""
    write_durably(out / "results.json", json.dumps(results, indent=1).encode())
    write_durably(out / "results.md", table(results).encode())


def write_submission(
    tasks: Mapping[str, Task], jobs: Sequence[Job], outcomes: Mapping[str, Outcome], finished: Path, out: Path
) -> None:
    """`out/NAME.tsv` for every test split that was answered, by the task's first seed.

    Format: https://gluebenchmark.com/faq. The benchmark also asks for WNLI and AX, which are not run here.
    """
    for earlier in out.glob("*.tsv"):  # perhaps of another model
        earlier.unlink(missing_ok=True)
    for name, task in tasks.items():
        first = next((job for job in jobs if job.task == name and outcomes[job.name].result), None)
        if first is None:
            continue
        arrays = safetensors.numpy.load_file(finished / first.name / "answers.safetensors")
        for split, file in task.test_splits:
            if f"{split}.logits" not in arrays:
                continue
            answers = predictions_of(task, arrays[f"{split}.logits"])
            lines = [f"{index}\t{_said(task, answer)}\n" for index, answer in enumerate(answers.tolist())]
            write_durably(out / f"{file}.tsv", "".join(["index\tprediction\n", *lines]).encode())


def _said(task: Task, answer: float) -> str:
    if not task.is_regression:
        return task.labels[int(answer)]
    low, high = task.label_range or (-np.inf, np.inf)
    return f"{min(max(answer, low), high):.3f}"
