"""One job, in a process of its own: train, evaluate, and let a finished folder appear.

    OUT/jobs/NAME.work/   while it is not finished: claim, log.txt, tensorboard/, checkpoints/
    OUT/jobs/NAME/        when it is: result.json, answers.safetensors, tensorboard/, log.txt, model/

The folder is renamed when everything in it is on the disk, so `NAME/` is a finished job or absent.
"""

import json
import math
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch.utils.tensorboard import SummaryWriter

from mosaicbert_ds.data.files import sync_folder, write_durably
from mosaicbert_ds.errors import DataError, TrainingError, UserError
from mosaicbert_ds.finetune.batches import epoch_batches, evaluation_batches, pack, shape_of
from mosaicbert_ds.finetune.claim import Claim, keep_alive
from mosaicbert_ds.finetune.config import FinetuneConfig
from mosaicbert_ds.finetune.dataset import EncodedSplit, open_split
from mosaicbert_ds.finetune.models import load_classifier, plain_classifier
from mosaicbert_ds.finetune.plan import Job
from mosaicbert_ds.finetune.score import METRICS, predictions_of
from mosaicbert_ds.finetune.step import Trainer
from mosaicbert_ds.finetune.tasks import Task
from mosaicbert_ds.model.export import write_folder
from mosaicbert_ds.training import checkpoint as disk
from mosaicbert_ds.training.faults import EXIT_STOPPED, EXIT_USER_ERROR, StopRequest

# Steps whose buffers are made and sent at a time, while a GPU works on those before. A request to stop waits
# for them.
_CHUNK = {"cuda": 64, "cpu": 1}
_EVALUATION_TOKENS = {"cuda": 65_536, "cpu": 4_096}  # slots of an evaluation batch
_LOSS_POINTS = 10  # steps whose mean loss is a point of the curve


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Everything that a job's process needs to know."""

    job: Job
    task: Task
    config: FinetuneConfig
    start: Path  # Hugging Face folder to start from
    tokenizer: Path  # folder that a kept model gets its tokenizer from
    splits: Mapping[str, Path]  # split name to folder of `dataset.encode_split`
    jobs: Path  # where NAME.work and NAME stand
    precision: str  # bf16 or fp32
    pads: bool
    save_every_s: float

    @property
    def padded_up_to(self) -> int | None:
        return self.config.max_length if self.pads else None

    @property
    def work(self) -> Path:
        return self.jobs / f"{self.job.name}.work"

    @property
    def finished(self) -> Path:
        return self.jobs / self.job.name


@dataclass(frozen=True)
class _Scale:
    """From what the model says to the task's numbers: `std` times it and `mean`."""

    mean: float = 0.0
    std: float = 1.0

    @staticmethod
    def of(task: Task, labels: np.ndarray) -> "_Scale":
        if not task.learns_standardised:
            return _Scale()
        mean, std = float(np.mean(labels)), float(np.std(labels))
        if std and abs(mean) > 1e5 * std:
            raise DataError(
                f"the labels are {mean:.10g} give or take {std:.4g}, which fp32 tells apart too coarsely; "
                f"subtract {mean:.10g} from them"
            )
        return _Scale(mean, std or 1.0)

    @torch.no_grad()
    def fold_into(self, head: torch.nn.Linear) -> None:
        head.weight *= self.std
        head.bias.mul_(self.std).add_(self.mean)


def cuda_is_lost() -> bool:
    """Whether this process was forked from one that had started CUDA, and so cannot use it."""
    return torch.cuda._is_in_bad_fork()


def run_in_process(spec: JobSpec, claim: Claim, device: str, num_threads: int) -> None:
    """What the queue starts: run the job and end the process with an exit code. Writes `failure.json`."""
    log = (spec.work / "log.txt").open("a", buffering=1, encoding="utf-8")
    os.dup2(log.fileno(), sys.stdout.fileno())
    os.dup2(log.fileno(), sys.stderr.fileno())
    stop = StopRequest()
    claim.take_over()
    keep_alive(claim)
    torch.set_num_threads(num_threads)
    try:
        code = 0 if run_job(spec, torch.device(device), lambda: bool(stop)) else EXIT_STOPPED
    except BaseException as error:
        traceback.print_exc()
        is_told = isinstance(error, UserError)  # in whole; of anything else the first line
        reason = " ".join(str(error).split()) if is_told else f"{type(error).__name__}: {error}"
        write_failure(spec.work, reason)
        code = EXIT_USER_ERROR if isinstance(error, UserError) else 1
    sys.exit(code)


def write_failure(work: Path, reason: str) -> None:
    """Note why the job ended, for every queue that looks."""
    lines = reason.strip().splitlines() or ["no reason given"]
    write_durably(work / "failure.json", json.dumps({"reason": lines[0]}).encode())


def run_job(spec: JobSpec, device: torch.device, asked_to_stop: Callable[[], bool] = lambda: False) -> bool:
    """Train and evaluate; go on where an earlier process stopped. False if asked to stop before the end."""
    started_s = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    job, task = spec.job, spec.task
    splits = {name: open_split(folder) for name, folder in spec.splits.items()}
    scale = _Scale.of(task, splits["train"].labels)
    model = load_classifier(spec.start, task, job.seed, device, spec.config.hidden_dropout)
    schedule, peak = spec.config.schedule, spec.config.tasks[job.task].peak_lr
    trainer = Trainer(
        model,
        spec.config.optimizer(job.task),
        [peak * schedule.lr_factor_at((step + 1) / job.steps) for step in range(job.steps)],
        bf16=spec.precision == "bf16",
        is_regression=task.is_regression,
        seed=job.seed,
        device=device,
    )
    root = spec.work / "checkpoints"
    checkpoint, complaints = disk.newest_verified(root)
    where = f"{device} of {socket.gethostname()}"
    print(*complaints, f"{job.name} on {where}, {job.steps} steps, {spec.precision}", sep="\n", flush=True)
    if checkpoint:
        trainer.restore(
            {kind: _tensors(checkpoint, kind) for kind in disk.KINDS}, checkpoint.state["progress"]["step"]
        )
        print(f"goes on from step {trainer.steps_done}", flush=True)

    board = SummaryWriter(spec.work / "tensorboard", purge_step=trainer.steps_done + 1)
    try:
        if not _train(spec, trainer, splits, scale, board, asked_to_stop):
            return False
        logits = {
            name: _answer(spec, trainer, split, scale) for name, split in splits.items() if name != "train"
        }
        values = score_logits(task, splits, logits)
        _show(board, values, trainer.steps_done)
    finally:
        board.close()
    answers = {f"{name}.logits": values for name, values in logits.items()}
    answers |= {f"{name}.labels": splits[name].labels for name in logits if len(splits[name].labels)}
    write_durably(spec.work / "answers.safetensors", safetensors.numpy.save(answers))
    if job.keep_model:
        shutil.rmtree(spec.work / "model", ignore_errors=True)
        model = trainer.finished_model()
        scale.fold_into(model.classifier)
        write_folder(plain_classifier(model), spec.tokenizer, spec.work / "model", spec.config.max_length)
    result = {
        "task": job.task,
        "seed": job.seed,
        "fingerprint": job.fingerprint,
        "starts_from": job.after or "pretrained",
        "steps": job.steps,
        "metrics": values,
        "seconds": round(time.perf_counter() - started_s, 2),  # of this process: all, unless it went on
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": spec.precision,
    }
    write_durably(spec.work / "result.json", json.dumps(result, indent=1).encode())
    sync_folder(spec.work)
    spec.work.rename(spec.finished)
    sync_folder(spec.jobs)
    shutil.rmtree(spec.finished / "checkpoints", ignore_errors=True)
    for claim in spec.finished.glob("claim-*"):
        claim.unlink(missing_ok=True)
    return True


def _train(
    spec: JobSpec,
    trainer: Trainer,
    splits: Mapping[str, EncodedSplit],
    scale: _Scale,
    board: SummaryWriter,
    asked_to_stop: Callable[[], bool],
) -> bool:
    """All steps that are left. The device is waited for at the end of an epoch and to save."""
    job, config, train = spec.job, spec.config, splits["train"]
    train = replace(train, labels=(np.asarray(train.labels) - scale.mean) / scale.std)
    row, lengths = config.tasks[job.task], train.lengths
    saved_s = time.monotonic()
    sort_window = config.sort_window if spec.pads else 1
    steps_an_epoch = job.steps // row.epochs
    for epoch in range(trainer.steps_done // steps_an_epoch, row.epochs):
        batches = epoch_batches(
            job.seed, epoch, lengths, row.batch_size, shuffle=config.shuffle, sort_window=sort_window
        )
        first = trainer.steps_done  # not the epoch's, where an earlier process made some of its steps
        end = (epoch + 1) * steps_an_epoch
        while trainer.steps_done < end:
            at = trainer.steps_done - epoch * steps_an_epoch
            chunk = batches[at : at + _CHUNK[trainer.losses.device.type]]
            shapes = [
                shape_of(lengths[rows], row.batch_size, padded_up_to=spec.padded_up_to) for rows in chunk
            ]
            trainer.run(pack(train, chunk, shapes, spec.task.is_regression), shapes)
            if trainer.steps_done == job.steps:
                break  # what is left, to evaluate, is shorter than a save
            stopping = asked_to_stop()
            if stopping or time.monotonic() - saved_s >= spec.save_every_s:
                _save(spec, trainer)
                saved_s = time.monotonic()
            if stopping:
                return False
        _log_losses(board, trainer, first)
        if epoch + 1 < row.epochs:
            logits = {
                name: _answer(spec, trainer, split, scale)
                for name, split in splits.items()
                if name != "train" and len(split.labels)
            }
            _show(board, score_logits(spec.task, splits, logits), trainer.steps_done)
    return True


def _save(spec: JobSpec, trainer: Trainer) -> None:
    step, root = trainer.steps_done, spec.work / "checkpoints"
    disk.write_step(root, step, trainer.state(), {"progress": {"step": step}, "kept": False})
    disk.prune(root, step, keep_last=1)


def _tensors(checkpoint: disk.Checkpoint, kind: str) -> dict[str, torch.Tensor]:
    with checkpoint.open(kind) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _answer(spec: JobSpec, trainer: Trainer, split: EncodedSplit, scale: _Scale) -> np.ndarray:
    """(rows, outputs) fp32: the model's answers, in the order of the rows."""
    lengths = split.lengths
    batches = evaluation_batches(lengths, _EVALUATION_TOKENS[trainer.losses.device.type])
    shapes = [shape_of(lengths[rows], len(rows), padded_up_to=spec.padded_up_to) for rows in batches]
    parts = [
        trainer.logits(pack(split, [rows], [shape], spec.task.is_regression), shape, len(rows))
        for rows, shape in zip(batches, shapes, strict=True)
    ]
    logits = np.empty((split.num_rows, spec.task.num_outputs), np.float32)
    logits[np.concatenate(batches)] = torch.cat(parts).cpu().numpy()
    return logits * np.float32(scale.std) + np.float32(scale.mean)


def score_logits(
    task: Task, splits: Mapping[str, EncodedSplit], logits: Mapping[str, np.ndarray]
) -> dict[str, dict[str, float | str]]:
    """Split to metric to its value, or to why it has none; of the splits that have labels."""
    return {
        name: {
            metric: METRICS[metric](predictions_of(task, values), np.asarray(splits[name].labels))
            for metric in task.metrics
        }
        for name, values in logits.items()
        if len(splits[name].labels)
    }


def _log_losses(board: SummaryWriter, trainer: Trainer, first: int) -> None:
    """The curve of the steps since `first`. Raises TrainingError where a loss is not finite."""
    losses = trainer.losses[first : trainer.steps_done].tolist()
    for start in range(0, len(losses), _LOSS_POINTS):
        points = losses[start : start + _LOSS_POINTS]
        board.add_scalar("train/loss", sum(points) / len(points), first + start + len(points))
    broken = [first + i for i, loss in enumerate(losses) if not math.isfinite(loss)]
    if broken:
        raise TrainingError(
            f"the loss of step {broken[0] + 1} is not finite; lower peak_lr or look at the data"
        )


def _show(board: SummaryWriter, values: Mapping[str, Mapping[str, Any]], step: int) -> None:
    for split, metrics in values.items():
        for name, value in metrics.items():
            if not isinstance(value, str):
                board.add_scalar(f"evaluation/{split}_{name}", value, step)
    print(f"step {step}: {json.dumps(values)}", flush=True)
