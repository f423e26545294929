"""Pretrain a masked language model. What the `deepspeed` launcher runs on every rank.

    deepspeed mosaicbert_ds/pretrain.py --recipe mosaicbert-base --data DIR --out DIR [key=value ...]

The same command, given again, goes on from the run's newest checkpoint. A run begins from fresh weights, or
with --init from those of another model: text of a domain after general text.
"""

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

from mosaicbert_ds import dist
from mosaicbert_ds.config import RunConfig, describe, load_recipe, shipped_recipes
from mosaicbert_ds.data.loader import evaluation_batches, pretraining_batches
from mosaicbert_ds.data.shards import ShardSet
from mosaicbert_ds.data.tokenizer import LoadedTokenizer, load_tokenizer
from mosaicbert_ds.errors import ConfigError, UserError
from mosaicbert_ds.finetune.models import initial_weights
from mosaicbert_ds.model import build_pretraining_model, count_parameters
from mosaicbert_ds.ops import choose_kernels
from mosaicbert_ds.training import saving
from mosaicbert_ds.training.course import Course, Schedules
from mosaicbert_ds.training.ds_config import (
    check_optimizer,
    check_recomputation,
    read_ds_config,
    resolve_ds_config,
)
from mosaicbert_ds.training.engine import build_engine, init_distributed
from mosaicbert_ds.training.faults import EXIT_STOPPED, EXIT_USER_ERROR, StopRequest, show_stack_on_request
from mosaicbert_ds.training.loop import fit
from mosaicbert_ds.training.meter import Rates, peak_flops_per_s
from mosaicbert_ds.training.plan import plan_batches
from mosaicbert_ds.training.progress import Progress
from mosaicbert_ds.training.run_folder import lock_run_folder, record_start, versions
from mosaicbert_ds.training.telemetry import Telemetry
from mosaicbert_ds.typed_yaml import to_tree


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    recipe = load_recipe(args.recipe, args.overrides)
    world_size = dist.world_size() if args.world_size is None else args.world_size
    plan = plan_batches(recipe.batch, recipe.duration, world_size)
    recipe = recipe.with_accumulation(plan.gradient_accumulation_steps)
    ds_config = resolve_ds_config(read_ds_config(recipe.engine), recipe.engine, plan)
    check_optimizer(recipe.optimizer, ds_config)
    check_recomputation(recipe.model, recipe.engine, ds_config)
    if args.dry_run:
        if args.data is not None:
            _open_data(args.data, recipe)
        if dist.is_main():
            print(describe(recipe, plan, ds_config))
        return 0

    dist.beat()  # a start that hangs from here on is a rank without progress

    # -- everything that can be wrong is looked at before the process group and the first GPU second
    if args.data is None or args.out is None:
        raise ConfigError(
            "--data and --out are needed: the folder of `mosaicbert data prepare`, and one for the run"
        )
    shards, held_out, tokenizer = _open_data(args.data, recipe)
    kernels = choose_kernels(recipe.engine.kernels)
    facts = {
        "recipe": to_tree(recipe),
        "seed": recipe.seed,
        "data_fingerprint": shards.fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "versions": versions(),
        "world_size": plan.world_size,
    }
    checkpoint, first_weights, notes, lock = None, None, list[str](), None
    if dist.is_main():
        lock = lock_run_folder(args.out)  # first: a run that is ending may still save and prune
        try:
            checkpoint, notes = saving.choose_checkpoint(args.resume, args.out / "checkpoints")
            if checkpoint:
                notes += saving.check_fits(checkpoint, facts)
                if args.init:
                    notes.append(
                        f"--init {args.init} was for the beginning; the run goes on with its own weights"
                    )
            elif args.init:
                first_weights = initial_weights(args.init, recipe.model, tokenizer)
            record_start(args.out, recipe.to_yaml(), ds_config, tokenizer.folder)
        except UserError:
            lock.close()
            raise

    # -- the parts
    show_stack_on_request()
    init_distributed()
    stop = StopRequest()
    found = dist.on_main(lambda: Progress.of(checkpoint.state).to_dict() if checkpoint else None)
    progress = Progress(**found) if found else Progress()
    schedules = Schedules(
        optimizer=recipe.optimizer, schedule=recipe.schedule, mask_rate_at=recipe.masking.rate_at
    )
    course = Course(plan, schedules, progress)
    steps, for_loader = itertools.tee(course)  # the loader is ahead of the loop
    torch.manual_seed(recipe.seed)  # the same fresh weights on every rank
    model = build_pretraining_model(recipe.model, recipe.engine.compile)
    if found:
        saving.load_weights(model, checkpoint)
    elif args.init:
        saving.begin_with(model, first_weights, str(args.init))
    engine = build_engine(
        model,
        recipe.optimizer,
        ds_config,
        bf16=recipe.engine.precision == "bf16",
        # Activation checkpointing keeps the generator's state on the host, which a recording cannot.
        cuda_graphs=recipe.engine.cuda_graphs and not recipe.model.activation_checkpointing,
    )
    if found:
        saving.load_moments(engine, checkpoint)
    num_parameters = count_parameters(recipe.model)
    telemetry = None
    if dist.is_main():
        telemetry = Telemetry(args.out, plan, recipe.to_yaml(), progress)
        for line in notes:
            telemetry.say(line)
        where = f"going on from step {progress.step:,}"
        if plan.part_done(progress) >= 1:
            where = f"finished at step {progress.step:,}; give a longer duration to go on"
        telemetry.say(f"{num_parameters:,} parameters; {kernels} kernels; {plan}; {where}")
    saver = saving.Saver(args.out / "checkpoints", recipe.checkpoint, facts)
    batches = pretraining_batches(
        shards,
        tokenizer,
        recipe.data,
        for_loader,
        micro_batch_size=plan.micro_batch_size,
        seed=recipe.seed,
        rank=dist.rank(),
        world_size=plan.world_size,
    )

    # -- the run
    try:
        finished = fit(
            engine,
            progress=progress,
            plan=plan,
            course=course,
            steps=steps,
            batches=batches,
            evaluation=recipe.evaluation,
            evaluation_batches=lambda: evaluation_batches(
                held_out,
                tokenizer,
                micro_batch_size=plan.micro_batch_size,
                max_samples=recipe.evaluation.max_samples,
                rank=dist.rank(),
                world_size=plan.world_size,
            ),
            unigram_entropy=shards.unigram_entropy_nats,
            saver=saver,
            telemetry=telemetry,
            log_every_steps=recipe.telemetry.log_every_steps,
            rates=Rates(
                num_parameters=num_parameters,
                max_length=recipe.data.max_length,
                world_size=plan.world_size,
                peak_flops_per_s=peak_flops_per_s(),
                usd_per_gpu_hour=recipe.telemetry.usd_per_gpu_hour,
            ),
            stop=stop,
            seed=recipe.seed,
        )
    finally:
        batches.close()
        try:
            saver.wait()
        finally:
            if telemetry:
                telemetry.close()
            if lock:
                lock.close()
    if not finished:
        dist.barrier()  # launchers end all ranks when the first has left: not before the main one has written
    if not finished and dist.is_main():
        print(
            f"stopped on request at step {progress.step:,}; the same command goes on from there", flush=True
        )
    return 0 if finished else EXIT_STOPPED


def _open_data(folder: Path, recipe: RunConfig) -> tuple[ShardSet, ShardSet, LoadedTokenizer]:
    """Training shards, held-out shards and their tokenizer, which the recipe can take."""
    shards, held_out = ShardSet.open(folder, "train"), ShardSet.open(folder, "val")
    tokenizer = load_tokenizer(folder / "tokenizer")
    shards.check_tokenizer(tokenizer)
    shards.check_settings(recipe.data)
    recipe.check_vocabulary(tokenizer.vocab_size)
    return shards, held_out, tokenizer


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="deepspeed mosaicbert_ds/pretrain.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--recipe", required=True, metavar="NAME|FILE", help=f"{', '.join(shipped_recipes())}, or a YAML file"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="shards made by `mosaicbert data prepare`")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder; started again, the run goes on"
    )
    parser.add_argument(
        "--resume", default="auto", metavar="auto|never|STEP_DIR", help="where to start from (default: auto)"
    )
    parser.add_argument(
        "--init",
        type=Path,
        metavar="MODEL",
        help="begin from these weights: a Hugging Face folder, as of `mosaicbert export` or `import`",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what would be run, look at --data if it is given, and stop",
    )
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: plan for N ranks")
    parser.add_argument(
        "--local_rank", type=int, help=argparse.SUPPRESS
    )  # the launcher's; the environment says it too
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values, e.g. optimizer.peak_lr=1e-3"
    )
    args = parser.parse_intermixed_args(argv)
    if args.world_size is not None and not args.dry_run:
        parser.error("--world-size goes with --dry-run; a run's ranks are the launcher's")
    return args


if __name__ == "__main__":
    try:
        code = main()
        dist.leave()
    except UserError as error:
        # Most mistakes are every rank's; the main one tells, and its end stops the others. A rank that
        # alone sees something (its own disk) gets to say it after a moment.
        if not dist.is_main():
            time.sleep(5)
        print(
            f"error{'' if dist.is_main() else f' on rank {dist.rank()}'}: {error}",
            file=sys.stderr,
            flush=True,
        )
        code = EXIT_USER_ERROR
    sys.exit(code)
