"""Pure: from a recipe to the ordered list of jobs. A job is one task with one seed."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mosaicbert_ds.data.files import sha256_of_facts
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.finetune.config import LARGEST_SEED, PRETRAINED, FinetuneConfig
from mosaicbert_ds.finetune.tasks import Task
from mosaicbert_ds.typed_yaml import to_tree

FORMAT_VERSION = 1  # of what a job computes: with another one, no finished job counts as finished


@dataclass(frozen=True, kw_only=True)
class Job:
    """`after`: the job whose encoder and pooler this one starts from; None: the pretrained model."""

    task: str
    seed: int
    after: str | None
    keep_model: bool  # others start from it, or the user wants it
    steps: int
    fingerprint: str  # of everything that decides the result, the weights that it starts from included

    @property
    def name(self) -> str:
        return f"{self.task}-seed{self.seed}-{self.fingerprint[:10]}"


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a plan needs to know of a task's files: rows to train on, and a hash of each split by name."""

    num_rows: int
    splits: Mapping[str, str]


def choose_tasks(
    config: FinetuneConfig, tasks: Sequence[str] | None, seeds: Sequence[int] | None, from_pretrained: bool
) -> FinetuneConfig:
    """The recipe with only `tasks`, other `seeds` and, if so asked, without stages. Raises ConfigError."""
    names = list(config.tasks) if tasks is None else list(dict.fromkeys(tasks))
    unknown = [name for name in names if name not in config.tasks]
    if unknown:
        raise ConfigError(f"task '{unknown[0]}' is unknown; the recipe has {', '.join(config.tasks)}")
    chosen = {}
    for name in names:
        row = config.tasks[name]
        if from_pretrained:
            row = dataclasses.replace(row, starts_from=PRETRAINED)
        if seeds:
            said = f"--seeds {' '.join(map(str, seeds))}"
            if len(set(seeds)) < len(seeds):
                raise ConfigError(f"{said} name one twice; each is one job")
            if not all(0 <= seed <= LARGEST_SEED for seed in seeds):
                raise ConfigError(f"{said} are not all whole numbers from 0 to {LARGEST_SEED}")
            row = dataclasses.replace(row, seeds=tuple(seeds))
        chosen[name] = row
    for name, row in chosen.items():
        start = row.starts_from
        if start != PRETRAINED and start not in config.tasks:
            raise ConfigError(
                f"tasks.{name}.starts_from is '{start}'; allowed are {PRETRAINED}, {', '.join(config.tasks)}"
            )
        if start != PRETRAINED and start not in chosen:
            raise ConfigError(
                f"{name} starts from the finished {start}, which is not among the tasks; add {start}, or "
                "give --from-pretrained if every task is to start from the pretrained model"
            )
    return dataclasses.replace(config, tasks=chosen)


def plan_jobs(
    config: FinetuneConfig,
    tasks: Mapping[str, Task],
    data: Mapping[str, TaskData],
    *,
    model: str,
    tokenizer: str,
    precision: str,
    pads: bool,
    keep_models: bool = False,
) -> list[Job]:
    """The jobs of `config`, each after the one that it starts from, and else the longest first.

    model, tokenizer: fingerprints of what is started from; precision: bf16 or fp32; pads: whether the model
    computes padding, and so sorts by length. Raises ConfigError for tasks that start from each other.
    """
    parents = {row.starts_from for row in config.tasks.values()}
    jobs: dict[tuple[str, int], Job] = {}
    for name in _in_order(config):
        row = config.tasks[name]
        start = config.tasks.get(row.starts_from)
        for seed in row.seeds:
            after = None
            if start is not None:
                after = jobs[row.starts_from, seed if seed in start.seeds else start.seeds[0]]
            shared = {
                key: value
                for key, value in to_tree(config).items()
                if key not in ("tasks", "precision", *(() if pads and config.shuffle else ("sort_window",)))
            }
            facts: dict[str, Any] = {
                "format": FORMAT_VERSION,
                "task": [tasks[name].labels, tasks[name].label_range, *_standardised(tasks[name])],
                "recipe": {k: v for k, v in to_tree(row).items() if k not in ("seeds", "starts_from")},
                "shared": shared,
                "data": dict(data[name].splits),
                "seed": seed,
                "start": after.fingerprint if after else model,
                "tokenizer": tokenizer,
                "precision": precision,
            }
            jobs[name, seed] = Job(
                task=name,
                seed=seed,
                after=after.name if after else None,
                keep_model=keep_models or name in parents,
                steps=row.epochs * -(-data[name].num_rows // row.batch_size),
                fingerprint=sha256_of_facts(facts),
            )
    # What others wait for first, then the longest: the last job to end should be a short one. A stable sort
    # by depth of the stage keeps each behind its start.
    depth = {name: _depth(config, name) for name in config.tasks}
    return sorted(jobs.values(), key=lambda job: (job.task not in parents, depth[job.task], -job.steps))


def _standardised(task: Task) -> list[str]:
    return ["standardised"] if task.learns_standardised else []


def _depth(config: FinetuneConfig, name: str) -> int:
    start = config.tasks[name].starts_from
    return 0 if start == PRETRAINED else 1 + _depth(config, start)


def _in_order(config: FinetuneConfig) -> list[str]:
    """The tasks, each behind the one that it starts from."""
    for name in config.tasks:
        chain = [name]
        while (start := config.tasks[chain[-1]].starts_from) != PRETRAINED:
            if start in chain:
                raise ConfigError(f"tasks start from each other in a circle: {' -> '.join((*chain, start))}")
            chain.append(start)
    return sorted(config.tasks, key=lambda name: _depth(config, name))
