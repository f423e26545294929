"""What a task is, and the eight of GLUE: one row each, nothing else knows a task by name.

Columns, labels and row counts are those of the official files (https://gluebenchmark.com/tasks; counts
after the rows that everyone drops as broken, see `may_be_broken`). Published figures: MosaicBERT-Base at
70,000 batches, https://arxiv.org/abs/2312.17482.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task. `labels` is empty for regression; `eval_splits` with a label, `test_splits` without."""

    name: str
    title: str
    text_columns: tuple[str, ...]  # one, or two that are read as a pair
    label_column: str
    labels: tuple[str, ...] = ()  # label i is class i
    metrics: tuple[str, ...]  # names in `score.METRICS`; the task's score is their mean
    eval_splits: tuple[str, ...] = ("dev",)
    optional_splits: tuple[str, ...] = ()  # of `eval_splits`: scored where they are
    score_split: str | None = None  # the one of `eval_splits` that the task's score is of; None: all
    test_splits: tuple[tuple[str, str], ...] = ()  # split and name of its submission file
    label_range: tuple[float, float] | None = None  # of a regression
    header: tuple[str, ...] = ()  # the columns of files that do not name them in their first line
    may_be_broken: bool = False  # rows with missing fields are counted and left out instead of refused
    official_rows: Mapping[str, int] = field(default_factory=dict)
    published: float | None = None  # the task's score, in percent
    hub_columns: tuple[str, ...] = ()  # text columns on the Hugging Face hub, where the names differ

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def learns_standardised(self) -> bool:
        """Whether the model learns labels of mean 0 and deviation 1, whatever the user's numbers are: years
        or prices are out of a new head's reach. STS-B's, of a known range, are learned as published."""
        return self.is_regression and self.label_range is None

    @property
    def num_outputs(self) -> int:
        """Width of the classifier."""
        return max(len(self.labels), 1)

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", *self.eval_splits, *(split for split, _ in self.test_splits))


_SENTENCES = ("sentence1", "sentence2")

_GLUE = (
    Task(
        name="mnli",
        title="MNLI",
        text_columns=_SENTENCES,
        label_column="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        eval_splits=("dev_matched", "dev_mismatched"),
        optional_splits=("dev_mismatched",),
        test_splits=(("test_matched", "MNLI-m"), ("test_mismatched", "MNLI-mm")),
        official_rows={"train": 392_702, "dev_matched": 9_815, "dev_mismatched": 9_832},
        published=84.95,
        hub_columns=("premise", "hypothesis"),
    ),
    Task(
        name="qnli",
        title="QNLI",
        text_columns=("question", "sentence"),
        label_column="label",
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        test_splits=(("test", "QNLI"),),
        official_rows={"train": 104_743, "dev": 5_463},
        published=90.74,
    ),
    Task(
        name="qqp",
        title="QQP",
        text_columns=("question1", "question2"),
        label_column="is_duplicate",
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
        test_splits=(("test", "QQP"),),
        may_be_broken=True,  # a few questions hold line breaks; run_classifier.py and the hub drop them too
        official_rows={"train": 363_846, "dev": 40_430},
        published=90.29,
    ),
    Task(
        name="sst2",
        title="SST-2",
        text_columns=("sentence",),
        label_column="label",
        labels=("0", "1"),
        metrics=("accuracy",),
        test_splits=(("test", "SST-2"),),
        official_rows={"train": 67_349, "dev": 872},
        published=92.46,
    ),
    Task(
        name="cola",
        title="CoLA",
        text_columns=("sentence",),
        label_column="label",
        labels=("0", "1"),
        metrics=("matthews",),
        test_splits=(("test", "CoLA"),),
        header=("source", "label", "mark", "sentence"),
        official_rows={"train": 8_551, "dev": 1_043},
        published=55.11,
    ),
    Task(
        name="rte",
        title="RTE",
        text_columns=_SENTENCES,
        label_column="label",
        labels=("entailment", "not_entailment"),
        metrics=("accuracy",),
        test_splits=(("test", "RTE"),),
        official_rows={"train": 2_490, "dev": 277},
        published=81.36,
    ),
    Task(
        name="mrpc",
        title="MRPC",
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
        labels=("0", "1"),
        metrics=("accuracy", "f1"),
        test_splits=(("test", "MRPC"),),
        official_rows={"train": 3_668, "dev": 408},
        published=90.03,
        hub_columns=_SENTENCES,
    ),
    Task(
        name="stsb",
        title="STS-B",
        text_columns=_SENTENCES,
        label_column="score",
        label_range=(0.0, 5.0),
        metrics=("spearman",),
        test_splits=(("test", "STS-B"),),
        official_rows={"train": 5_749, "dev": 1_500},
        published=89.27,
    ),
)

GLUE: Mapping[str, Task] = MappingProxyType({task.name: task for task in _GLUE})
GLUE_PUBLISHED_AVERAGE = 84.28
