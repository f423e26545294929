"""The commands `mosaicbert finetune glue` and `finetune task`, put together.

OUT/recipe.yaml  results.md  results.json  submission/
OUT/jobs/        a folder a job, see job.py
OUT/cache/       tokenised files; models/ exported from runs
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from mosaicbert_ds.data.files import write_durably
from mosaicbert_ds.errors import ConfigError, DataError, TrainingError
from mosaicbert_ds.finetune.config import FinetuneConfig, load_finetune_recipe
from mosaicbert_ds.finetune.dataset import encode_split, labels_in, open_split
from mosaicbert_ds.finetune.hub import fetch_glue
from mosaicbert_ds.finetune.job import JobSpec
from mosaicbert_ds.finetune.models import Pretrained, check_fits, find_pretrained, load_classifier
from mosaicbert_ds.finetune.plan import Job, TaskData, choose_tasks, plan_jobs
from mosaicbert_ds.finetune.report import (
    SplitRows,
    make_out,
    summarise,
    table,
    write_report,
    write_submission,
)
from mosaicbert_ds.finetune.run import Queue, choose_slots
from mosaicbert_ds.finetune.score import METRICS, REGRESSION_METRICS
from mosaicbert_ds.finetune.tasks import GLUE, Task
from mosaicbert_ds.training.faults import EXIT_STOPPED, StopRequest
from mosaicbert_ds.typed_yaml import to_tree

SAVE_EVERY_S = 120.0  # between a long job's checkpoints; a short job starts again instead


@dataclass(frozen=True, kw_only=True)
class Devices:
    """How many jobs run at a time on this host."""

    gpus: int | None = None  # None: all of the host's
    jobs_per_gpu: int = 1
    jobs: int = 1  # where there is no GPU


class StoppedError(Exception):
    """Asked to stop; the same command goes on."""


def glue_files(glue_dir: Path, names: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Task to split to file of an official GLUE folder, with the optional splits that are there.

    Raises DataError for one that is missing.
    """
    files: dict[str, dict[str, Path]] = {}
    for name in names:
        task = GLUE[name]
        optional = {*task.optional_splits, *(split for split, _ in task.test_splits)}
        found = {split: glue_dir / task.title / f"{split}.tsv" for split in task.splits}
        files[name] = {s: path for s, path in found.items() if s not in optional or path.is_file()}
        for path in files[name].values():
            if not path.is_file():
                raise DataError(
                    f"{path} does not exist; --glue-dir takes the folder of the official GLUE files"
                )
    return files


def precision_of(config: FinetuneConfig) -> str:
    """bf16 or fp32."""
    if config.precision == "auto":
        return "bf16" if torch.cuda.is_available() else "fp32"
    return config.precision


def finetune(
    config: FinetuneConfig,
    tasks: Mapping[str, Task],
    files: Mapping[str, Mapping[str, Path]],
    pretrained: Pretrained,
    out: Path,
    *,
    devices: Devices,
    report: Path | None = None,
    keep_models: bool = False,
    say: Callable[[str], None] = print,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run what of the recipe has not been run before; write the results to `report` (default `out`).

    Raises StoppedError if asked to stop, TrainingError when jobs have failed, after the report is written.
    """
    started_s = time.perf_counter()
    slots = choose_slots(devices.gpus, devices.jobs_per_gpu, devices.jobs)
    cache, jobs_folder, report = out / "cache", out / "jobs", report or out
    make_out(out)
    jobs_folder.mkdir(exist_ok=True)
    tokenizer = pretrained.tokenizer(cache)
    check_fits(pretrained, tokenizer, config.max_length)
    precision = precision_of(config)
    recipe = yaml.safe_dump(to_tree(config), sort_keys=False, default_flow_style=None)
    write_durably(report / "recipe.yaml", recipe.encode())

    # -- every file is read before the first job starts: mistakes in the last one cost no training
    splits: dict[str, dict[str, Path]] = {}
    rows: dict[str, dict[str, SplitRows]] = {}
    data: dict[str, TaskData] = {}
    for name, task in tasks.items():
        splits[name], rows[name] = {}, {}
        unlabelled = {split for split, _ in task.test_splits}
        for split, path in files[name].items():
            folder = encode_split(task, path, split not in unlabelled, tokenizer, config.max_length, cache)
            encoded = open_split(folder)
            splits[name][split] = folder
            rows[name][split] = SplitRows(rows=encoded.num_rows, broken=encoded.num_broken)
        hashes = {split: folder.name for split, folder in splits[name].items()}
        data[name] = TaskData(num_rows=rows[name]["train"].rows, splits=hashes)
    pads = pretrained.pads()
    jobs = plan_jobs(
        config,
        tasks,
        data,
        model=pretrained.fingerprint,
        tokenizer=tokenizer.sha256,
        precision=precision,
        pads=pads,
        keep_models=keep_models,
    )
    _forget_starts_without_model(jobs, jobs_folder)
    if not all((jobs_folder / job.name).is_dir() for job in jobs):
        pretrained.prepare()
        if pretrained.checkpoint is None:  # a folder of somebody's: said once, and not by every job
            load_classifier(pretrained.folder, next(iter(tasks.values())), seed=0)

    # -- the jobs
    def spec(job: Job) -> JobSpec:
        return JobSpec(
            job=job,
            task=tasks[job.task],
            config=config,
            start=jobs_folder / job.after / "model" if job.after else pretrained.folder,
            tokenizer=tokenizer.folder,
            splits=splits[job.task],
            jobs=jobs_folder,
            precision=precision,
            pads=pads,
            save_every_s=SAVE_EVERY_S,
        )

    say(f"{len(jobs)} jobs, {sum(job.steps for job in jobs):,} steps, on {', '.join(slots)}")
    num_threads = max(1, len(os.sched_getaffinity(0)) // len(slots)) if slots[0] == "cpu" else 1
    outcomes = Queue([spec(job) for job in jobs], slots, num_threads, say, asked_to_stop).run()
    if outcomes is None:
        raise StoppedError

    # -- the results
    results_of_jobs = [outcome.result for outcome in outcomes.values() if outcome.result]
    about = {
        "model": str(pretrained.source),
        "model_fingerprint": pretrained.fingerprint,
        "precision": precision,
        "shuffle": config.shuffle,
        "device": next((result["device"] for result in results_of_jobs), None),
        "job_seconds": sum(result["seconds"] for result in results_of_jobs),
        "jobs": {job.name: outcomes[job.name].result or outcomes[job.name].reason for job in jobs},
    }
    results = summarise(tasks, jobs, outcomes, jobs_folder, rows, about)
    write_report(results, report)
    write_submission(tasks, jobs, outcomes, jobs_folder, report / "submission")
    say(f"{report / 'results.md'} after {time.perf_counter() - started_s:.0f} s")
    failed = {name: outcome.reason for name, outcome in outcomes.items() if not outcome.result}
    if failed:
        followers = {job.name for job in jobs if job.name in failed and job.after in failed}
        own = [f"{job.name}: {failed[job.name]}" for job in jobs if job.name in failed.keys() - followers]
        raise TrainingError(
            f"{len(failed)} of {len(jobs)} jobs have no result: {'; '.join(own)}"
            + (f"; {len(followers)} start from these and were not run" if followers else "")
            + "; the same command tries them again"
        )
    return results


def _forget_starts_without_model(jobs: Sequence[Job], folder: Path) -> None:
    """A finished job whose model was removed must run again if an unfinished one starts from it."""
    for job in reversed(jobs):  # from the last stage to the first
        if job.after and not (folder / job.name).is_dir() and not (folder / job.after / "model").is_dir():
            shutil.rmtree(folder / job.after, ignore_errors=True)


def custom_task(
    name: str,
    train: Path,
    *,
    text_columns: Sequence[str],
    label_column: str,
    regression: bool,
    metrics: Sequence[str] | None,
    has_test: bool,
) -> Task:
    """A task from a user's files. The classes are the labels of the training file. Raises ConfigError."""
    if len(text_columns) not in (1, 2):
        raise ConfigError(f"--text names {len(text_columns)} columns; give one, or two for a pair")
    labels = () if regression else labels_in(train, label_column)
    default = ("spearman", "pearson") if regression else ("accuracy", "macro_f1")
    chosen = tuple(metrics or default)
    allowed = [metric for metric in METRICS if (metric in REGRESSION_METRICS) == regression]
    for metric in chosen:
        if metric not in allowed:
            raise ConfigError(f"--metrics '{metric}' is not allowed here; allowed are {', '.join(allowed)}")
        if metric == "f1" and len(labels) != 2:
            raise ConfigError(f"--metrics f1 is for two classes, not {len(labels)}; give macro_f1")
    return Task(
        name=name,
        title=name,
        text_columns=tuple(text_columns),
        label_column=label_column,
        labels=labels,
        metrics=chosen,
        eval_splits=("dev", "test") if has_test else ("dev",),
        score_split="test" if has_test else None,
    )


# ---- the commands


@dataclass(frozen=True, kw_only=True)
class Request:
    """What all commands take: see `mosaicbert finetune glue --help`."""

    out: Path
    recipe: str
    overrides: list[str]
    seeds: list[int] | None
    devices: Devices


def glue_request(
    request: Request, glue_dir: str, tasks: list[str] | None, from_pretrained: bool
) -> tuple[FinetuneConfig, dict[str, dict[str, Path]]]:
    """The recipe of the chosen tasks, and their files: of a folder, or of the hub (`hf:PATH`)."""
    config = load_finetune_recipe(request.recipe, request.overrides)
    config = choose_tasks(config, tasks, request.seeds, from_pretrained)
    names = list(config.tasks)
    if unknown := [name for name in names if name not in GLUE]:
        raise ConfigError(f"task '{unknown[0]}' is none of GLUE's: {', '.join(GLUE)}")
    if glue_dir.startswith("hf:"):
        return config, fetch_glue(glue_dir, names, request.out / "cache" / "hub")
    return config, glue_files(Path(glue_dir), names)


def finetune_glue(
    model: Path, request: Request, glue_dir: str, tasks: list[str] | None, from_pretrained: bool
) -> None:
    """`mosaicbert finetune glue`."""
    config, files = glue_request(request, glue_dir, tasks, from_pretrained)
    _finetune_and_show(model, request, config, {name: GLUE[name] for name in config.tasks}, files)


def finetune_task(model: Path, request: Request, files: Mapping[str, Path], **about: Any) -> None:
    """`mosaicbert finetune task`. files: train, dev and, if there is one, test; about: see `custom_task`."""
    config = load_finetune_recipe(request.recipe, request.overrides)
    config = choose_tasks(config, None, request.seeds, from_pretrained=False)
    if len(config.tasks) != 1:
        raise ConfigError(f"recipe {request.recipe} has {len(config.tasks)} tasks; finetune task runs one")
    (name,) = config.tasks
    task = custom_task(name, files["train"], has_test="test" in files, **about)
    _finetune_and_show(model, request, config, {name: task}, {name: files}, keep_models=True)


def _finetune_and_show(
    model: Path,
    request: Request,
    config: FinetuneConfig,
    tasks: Mapping[str, Task],
    files: Mapping[str, Mapping[str, Path]],
    keep_models: bool = False,
) -> None:
    pretrained = find_pretrained(model, request.out / "models")
    with stoppable() as stop:
        results = finetune(
            config,
            tasks,
            files,
            pretrained,
            request.out,
            devices=request.devices,
            keep_models=keep_models,
            asked_to_stop=lambda: bool(stop),
        )
    print(table(results), end="", flush=True)
    if keep_models:
        for name in results["jobs"]:
            job = request.out / "jobs" / name
            kept = (job / "model").is_dir()
            gone = f"no model is left in {job}; remove it, and the same command makes it again"
            print(f"model in {job / 'model'}" if kept else gone, flush=True)


@contextlib.contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Signals ask to stop instead of ending the process; having stopped, it ends with EXIT_STOPPED."""
    try:
        yield StopRequest()
    except StoppedError:
        print("stopped on request; the same command goes on from there", flush=True)
        raise SystemExit(EXIT_STOPPED) from None
