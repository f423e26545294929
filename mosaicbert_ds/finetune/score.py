"""Metrics, and confidence intervals for their means.

Each metric takes predictions and labels, both (rows,), and returns a number in [-1, 1], or a text: why there
is no such number. Classification metrics agree with scikit-learn, correlations with SciPy, ties included.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from mosaicbert_ds.finetune.tasks import Task

Array = np.ndarray
Metric = Callable[[Array, Array], float | str]

REPLICATES = 1000  # of the bootstrap: the ends of a 95 % interval then vary by a tenth of its width
_COVERED = (2.5, 97.5)  # percent


def accuracy(predictions: Array, labels: Array) -> float | str:
    """Share of the rows whose class is right."""
    return float((predictions == labels).mean())


def f1(predictions: Array, labels: Array) -> float | str:
    """F1 of class 1; 0 where class 1 is neither there nor predicted."""
    hits = np.count_nonzero((predictions == 1) & (labels == 1))
    named = np.count_nonzero(predictions == 1) + np.count_nonzero(labels == 1)
    return 2 * hits / named if named else 0.0


def macro_f1(predictions: Array, labels: Array) -> float | str:
    """Mean F1 over the classes that are there or predicted."""
    counts = _confusion(predictions, labels)
    named = counts.sum(0) + counts.sum(1)
    return float((2 * np.diag(counts)[named > 0] / named[named > 0]).mean())


def matthews(predictions: Array, labels: Array) -> float | str:
    """Matthews correlation of two or more classes; 0 where either side names one class only."""
    counts = _confusion(predictions, labels)
    predicted, true, rows = counts.sum(0), counts.sum(1), counts.sum()
    spread = np.sqrt(float(rows**2 - predicted @ predicted)) * np.sqrt(float(rows**2 - true @ true))
    return float((np.trace(counts) * rows - true @ predicted) / spread) if spread else 0.0


def pearson(predictions: Array, labels: Array) -> float | str:
    """Linear correlation."""
    for values, name in ((predictions, "predictions"), (labels, "labels")):
        if not np.isfinite(values).all():
            return f"not all {name} are finite"
        if values.min() == values.max():
            return f"all {name} are equal"
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predictions, labels))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)  # first, so that no product overflows
    return float(np.clip(x @ y, -1.0, 1.0))


def spearman(predictions: Array, labels: Array) -> float | str:
    """Correlation of ranks; equal values share the mean of their ranks."""
    if not np.isfinite(predictions).all():
        return "not all predictions are finite"
    return pearson(rankdata(predictions), rankdata(labels))


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
REGRESSION_METRICS = ("pearson", "spearman")


def _confusion(predictions: Array, labels: Array) -> Array:
    """(classes, classes) counts: label i predicted as j."""
    classes = int(max(predictions.max(), labels.max())) + 1
    cells = labels.astype(np.int64) * classes + predictions.astype(np.int64)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def predictions_of(task: Task, logits: Array) -> Array:
    """(rows, outputs) -> (rows,): the class, or the value of a regression."""
    return logits[:, 0] if task.is_regression else logits.argmax(1)


@dataclass(frozen=True)
class Answers:
    """What a finished job said to the rows of one split, beside the truth; both (rows,)."""

    predictions: Array
    labels: Array


def task_score(task: Task, runs: Sequence[Mapping[str, Answers]]) -> float:
    """The task's score as the authors take it: the plain mean over seeds x splits x metrics.

    A metric without a value counts as 0. runs: one a seed, split name to answers.
    """
    values = [
        METRICS[name](answers.predictions, answers.labels)
        for run in runs
        for split, answers in run.items()
        if task.score_split in (None, split)
        for name in task.metrics
    ]
    return float(np.mean([0.0 if isinstance(value, str) else value for value in values]))


def bootstrap(
    task: Task, runs: Sequence[Mapping[str, Answers]], rng: np.random.Generator, replicates: int = REPLICATES
) -> Array:
    """(replicates,) task scores, each of seeds and rows drawn anew with replacement.

    The same rows are drawn for all seeds, since all seeds answered the same rows. With a single seed the
    spread is that of the rows alone.
    """
    scores = np.empty(replicates)
    for replicate in range(replicates):
        rows = {
            split: rng.integers(len(answers.labels), size=len(answers.labels))
            for split, answers in runs[0].items()
        }
        drawn = [runs[seed] for seed in rng.integers(len(runs), size=len(runs))]
        scores[replicate] = task_score(
            task,
            [
                {s: Answers(a.predictions[rows[s]], a.labels[rows[s]]) for s, a in run.items()}
                for run in drawn
            ],
        )
    return scores


def interval(replicates: Array) -> tuple[float, float]:
    """Ends of the 95 % percentile interval."""
    low, high = np.percentile(replicates, _COVERED)
    return float(low), float(high)
