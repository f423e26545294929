"""The `mosaicbert` command. Each subcommand calls one function elsewhere.

Rooms are imported when their command runs, so that `--help` answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mosaicbert_ds.errors import UserError

if TYPE_CHECKING:
    from mosaicbert_ds.bench.report import Report
    from mosaicbert_ds.finetune.suite import Request

_EXIT_USER_ERROR = 2
_HOW_TO_PRETRAIN = """\
To pretrain, start the script below with DeepSpeed's launcher:
  deepspeed mosaicbert_ds/pretrain.py --recipe mosaicbert-base --data SHARDS --out RUN
and see its --help.
"""
_MODEL = "a run, a step, or a Hugging Face folder"
_JSON = "print the same as JSON"
_SOURCES = "files or folders of .txt, .jsonl or .parquet (.gz .zst .xz .bz2 too), or hf:PATH[:CONFIG]:SPLIT"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    # Of transformers, which draws one for every folder that it reads or writes.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    args.arguments = sys.argv[1:] if argv is None else argv
    try:
        return args.run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_USER_ERROR


def _train_tokenizer(args: argparse.Namespace) -> None:
    from mosaicbert_ds.data.tokenizer import train_tokenizer

    print(
        train_tokenizer(
            args.sources,
            args.out,
            args.vocab_size,
            lowercase=not args.cased,
            text_field=args.text_field,
            on_error=args.on_error,
        )
    )


def _prepare_data(args: argparse.Namespace) -> None:
    from mosaicbert_ds.config import load_recipe
    from mosaicbert_ds.data.prepare import prepare

    recipe = load_recipe(args.recipe, args.set)
    print(
        prepare(
            args.sources,
            args.out,
            args.tokenizer,
            recipe.data,
            workers=args.workers,
            held_out_fraction=args.held_out_fraction,
            held_out_sources=args.held_out_sources,
            text_field=args.text_field,
            on_error=args.on_error,
        )
    )


def _verify_data(args: argparse.Namespace) -> None:
    from mosaicbert_ds.data.shards import verify

    print(verify(args.folder))


def _export(args: argparse.Namespace) -> None:
    from mosaicbert_ds.finetune.models import export_checkpoint
    from mosaicbert_ds.training.checkpoint import find_checkpoint

    checkpoint = find_checkpoint(args.source)
    export_checkpoint(checkpoint, args.out)
    print(f"{checkpoint.path} exported to {args.out}")


def _import(args: argparse.Namespace) -> None:
    from mosaicbert_ds.model.import_ import import_published

    import_published(args.source, args.out, args.trust_pickle, args.tokenizer)
    print(f"{args.source} imported to {args.out}")


def _plot(args: argparse.Namespace) -> None:
    from mosaicbert_ds.training.plot import plot_loss

    plot_loss(args.runs, args.out)
    print(f"loss curve in {args.out}")


def _bench_throughput(args: argparse.Namespace) -> None:
    from mosaicbert_ds.bench.contenders import CONTENDERS
    from mosaicbert_ds.bench.throughput import bench_throughput
    from mosaicbert_ds.bench.training_run import Text
    from mosaicbert_ds.config import load_recipe

    overrides = {"data.max_length": args.length, "batch.global_batch_size": args.global_batch}
    given = [f"{key}={value}" for key, value in overrides.items() if value is not None]
    recipe = load_recipe(args.recipe, [*args.set, *given])
    text = Text(folder=args.data, full_rows=args.full_rows)
    _print_report(
        args,
        bench_throughput(recipe, text, args.models or list(CONTENDERS), args.micro_batches, args.repeats),
    )


def _bench_limit(args: argparse.Namespace) -> None:
    from mosaicbert_ds.bench.limit import bench_limit
    from mosaicbert_ds.config import load_recipe

    _print_report(args, bench_limit(load_recipe(args.recipe, args.set), args.tokens))


def _bench_kernels(args: argparse.Namespace) -> None:
    from mosaicbert_ds.bench.kernels import bench_kernels

    _print_report(args, bench_kernels())


def _bench_step(args: argparse.Namespace) -> None:
    from mosaicbert_ds.bench.step import bench_step
    from mosaicbert_ds.config import load_recipe

    _print_report(args, bench_step(load_recipe(args.recipe, args.set), args.top))


def _print_report(args: argparse.Namespace, report: "Report") -> None:
    print(report.to_json() if args.json else report)


def _finetune_glue(args: argparse.Namespace) -> None:
    from mosaicbert_ds.finetune.suite import finetune_glue

    if not _on_other_hosts(args):
        finetune_glue(args.model, _request(args), args.glue_dir, args.tasks, args.from_pretrained)


def _finetune_task(args: argparse.Namespace) -> None:
    from mosaicbert_ds.finetune.suite import finetune_task

    if not _on_other_hosts(args):
        finetune_task(
            args.model,
            _request(args),
            {name: path for name in ("train", "dev", "test") if (path := getattr(args, name))},
            text_columns=args.text,
            label_column=args.label,
            regression=args.kind == "regression",
            metrics=args.metrics,
        )


def _pareto(args: argparse.Namespace) -> None:
    from mosaicbert_ds.finetune.pareto import pareto_command

    if not _on_other_hosts(args):
        pareto_command(_request(args), args.runs, args.glue_dir, args.tasks, args.from_pretrained)


def _evaluate(args: argparse.Namespace) -> None:
    from mosaicbert_ds.finetune.lengths import evaluate_lengths, table

    losses = evaluate_lengths(
        args.model, args.sources, args.lengths, args.out, args.text_field, args.max_tokens
    )
    print(table(losses), end="")


def _estimate(args: argparse.Namespace) -> None:
    from mosaicbert_ds.cluster import estimate
    from mosaicbert_ds.config import load_recipe
    from mosaicbert_ds.errors import ConfigError

    recipe = load_recipe(args.recipe, args.set)
    price = recipe.telemetry.usd_per_gpu_hour if args.price is None else args.price
    if price is None:
        raise ConfigError("neither --price nor telemetry.usd_per_gpu_hour is given; give dollars a GPU-hour")
    gpu, compute = estimate.GPUS[args.gpu], None
    source = gpu.source
    if args.bench:
        compute, source = estimate.read_bench(args.bench, recipe), str(args.bench)
    elif args.samples_per_s:
        size = recipe.batch.micro_batch_size
        compute = estimate.Compute(samples_per_s=args.samples_per_s, micro_batch_size=size)
        source = f"{args.samples_per_s:g} samples/s a GPU, as given"
    between = estimate.INTERCONNECTS[args.interconnect]
    estimates = [
        estimate.estimate_run(recipe, gpu, between, nodes, price, compute, args.fill) for nodes in args.nodes
    ]
    title = f"Predicted: {args.recipe} on {args.gpu}, {args.interconnect}, ${price:g} a GPU-hour"
    if args.plot:
        estimate.plot(estimates, args.plot, title)
    if args.json:
        facts = {"recipe": args.recipe, "gpu": args.gpu, "interconnect": args.interconnect}
        print(estimate.as_json(estimates, **facts, usd_per_gpu_hour=price, compute_figure_from=source))
    else:
        print(f"{title}; computing speed from {source}\n\n{estimate.as_table(estimates)}")


def _launch(args: argparse.Namespace) -> int:
    from mosaicbert_ds.cluster.launch import Job, launch, named_variables

    job = Job(
        command=[args.script, *args.arguments_of_script],
        environment=named_variables(args.env),
        port=args.port,
        interface=args.interface,
        hang_limit_s=args.hang_limit,
    )
    return launch(job, args.hostfile, args.restarts, args.min_hosts)


def _check_cluster(args: argparse.Namespace) -> int:
    from mosaicbert_ds.cluster.check import Wanted, check_cluster
    from mosaicbert_ds.cluster.launch import find_hosts

    wanted = Wanted(recipe=args.recipe, overrides=args.set, data=args.data, out=args.out)
    text, ready = check_cluster(find_hosts(args.hostfile), wanted, args.port, args.interface)
    print(text)
    return 0 if ready else 1


def _request(args: argparse.Namespace) -> "Request":
    from mosaicbert_ds.finetune.suite import Devices, Request

    return Request(
        out=args.out,
        recipe=args.recipe,
        overrides=args.set,
        seeds=args.seeds,
        devices=Devices(gpus=args.gpus, jobs_per_gpu=args.jobs_per_gpu, jobs=args.jobs),
    )


def _on_other_hosts(args: argparse.Namespace) -> bool:
    """With --hostfile: run this command on its hosts instead of here."""
    if args.hostfile is None:
        return False
    from mosaicbert_ds.finetune.hosts import run_on_hosts

    run_on_hosts(args.hostfile, args.arguments)
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mosaicbert",
        description="MosaicBERT: text in, a pretrained model out.",
        epilog=_HOW_TO_PRETRAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    tokenizer = commands.add_parser("tokenizer", help="train a WordPiece tokenizer on your text")
    actions = tokenizer.add_subparsers(title="actions", required=True, metavar="ACTION")
    command = _command(actions, "train", _train_tokenizer, "train a WordPiece tokenizer on your text")
    _add_sources(command)
    command.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder for the tokenizer"
    )
    command.add_argument(
        "--vocab-size", type=int, default=30528, metavar="N", help="a multiple of 64 (default: %(default)s)"
    )
    command.add_argument(
        "--cased", action="store_true", help="keep case and accents; default is to fold them"
    )

    data = commands.add_parser("data", help="turn text into shards, and check them")
    actions = data.add_subparsers(title="actions", required=True, metavar="ACTION")
    command = _command(actions, "prepare", _prepare_data, "tokenise text into shards; run again, it goes on")
    _add_sources(command)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    command.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="folder with tokenizer.json"
    )
    _add_recipe(
        command, "whose data section says how to cut documents", "data.max_length=512 data.documents=chunk"
    )
    command.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    command.add_argument(
        "--held-out-fraction",
        type=float,
        default=0.005,
        metavar="F",
        help="share of documents for evaluation, chosen by hash (default: %(default)s)",
    )
    command.add_argument(
        "--held-out-sources",
        nargs="+",
        default=(),
        metavar="SOURCE",
        help="evaluate on these documents instead",
    )
    command = _command(actions, "verify", _verify_data, "check every shard against its sha256")
    command.add_argument("folder", type=Path, metavar="DIR", help="folder of `mosaicbert data prepare`")

    command = _command(commands, "export", _export, "write a run's model as a Hugging Face folder")
    command.add_argument(
        "source", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints/step-N"
    )
    command.add_argument("out", type=Path, metavar="OUT", help="new folder for the model")

    command = _command(commands, "import", _import, "read a published MosaicBERT as a Hugging Face folder")
    command.add_argument("source", type=Path, metavar="SRC", help="folder with config.json and the weights")
    command.add_argument("out", type=Path, metavar="OUT", help="new folder for the model")
    command.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read pytorch_model.bin; only for a file whose author you trust",
    )
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="that it was trained with, if SRC holds none"
    )

    command = _command(commands, "plot", _plot, "draw the loss curve of one or several runs")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="runs' folders")
    command.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf"
    )

    bench = commands.add_parser("bench", help="measure the trainer on this machine")
    _add_benchmarks(bench.add_subparsers(title="benchmarks", required=True, metavar="BENCHMARK"))

    finetune = commands.add_parser("finetune", help="score a model on GLUE, or train it for your task")
    actions = finetune.add_subparsers(title="actions", required=True, metavar="ACTION")
    command = _command(
        actions,
        "glue",
        _finetune_glue,
        "finetune on the GLUE tasks and print the table; run again, it goes on",
    )
    _add_glue(command)
    _add_finetuning(command, "glue")
    command = _command(
        actions,
        "task",
        _finetune_task,
        "finetune on your own files and keep the models; run again, it goes on",
    )
    for name, text in (
        ("train", "to learn from"),
        ("dev", "to score on"),
        ("test", "with labels too, whose score counts instead"),
    ):
        command.add_argument(
            f"--{name}",
            type=Path,
            required=name != "test",
            metavar="FILE",
            help=f"rows {text}: .csv, .tsv (without quoting) or .jsonl",
        )
    command.add_argument(
        "--text", nargs="+", required=True, metavar="COLUMN", help="the text's column, or the two of a pair"
    )
    command.add_argument("--label", default="label", metavar="COLUMN", help="(default: %(default)s)")
    command.add_argument(
        "--kind",
        choices=("classification", "regression"),
        default="classification",
        help="what the label is: a class or a number (default: %(default)s)",
    )
    command.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="accuracy f1 macro_f1 matthews; or pearson spearman"
    )
    _add_finetuning(command, "task")

    command = _command(
        commands, "pareto", _pareto, "score a run's checkpoints on GLUE, and plot scores against costs"
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="[CURVE=]RUN",
        help="a run's folder; runs of one CURVE make one line. Or an --out of before, for the runs in it",
    )
    _add_glue(command, required=False)
    _add_finetuning(command, "glue", with_model=False)

    command = _command(commands, "evaluate", _evaluate, "masked-LM loss by length of text and by position")
    command.add_argument("model", type=Path, metavar="MODEL", help=_MODEL)
    command.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCES)
    command.add_argument(
        "--text-field", default="text", metavar="NAME", help="of .jsonl and .parquet (default: %(default)s)"
    )
    command.add_argument(
        "--lengths",
        type=_sizes,
        default=[128, 256, 512, 1024, 2048],
        metavar="N,N,...",
        help="tokens; each divides the longest (default: 128,256,512,1024,2048)",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="for table and plot")
    command.add_argument(
        "--max-tokens",
        type=_positive,
        default=2_000_000,
        metavar="N",
        help="of the text (default: %(default)s)",
    )

    command = _command(
        commands, "launch", _launch, "run a script on all GPUs of all hosts, watched; what `deepspeed` does"
    )
    _add_launch(command)

    cluster = commands.add_parser("cluster", help="look at the hosts before a run")
    actions = cluster.add_subparsers(title="actions", required=True, metavar="ACTION")
    command = _command(
        actions,
        "check",
        _check_cluster,
        "hosts, versions, GPUs, data, space, clocks, network: a table",
    )
    _add_hosts(command)
    _add_recipe(command, "to be run", "batch.micro_batch_size=512")
    command.add_argument("--data", metavar="DIR", help="shards that every host must read alike")
    command.add_argument("--out", metavar="DIR", help="folder that every host must be able to write")

    command = _command(
        commands, "estimate", _estimate, "what a run will take on clusters: speed, memory, hours, dollars"
    )
    _add_recipe(command, "to be run", "batch.micro_batch_size=512 engine.deepspeed=zero2")
    _add_estimate(command)
    return parser


def _add_launch(command: argparse.ArgumentParser) -> None:
    _add_hosts(command)
    command.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="a variable that the ranks get; no others travel",
    )
    command.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again after a failure, up to N times (default: %(default)s)",
    )
    command.add_argument(
        "--min-hosts",
        type=_positive,
        metavar="N",
        help="go on without hosts that do not answer, down to N (default: all are needed)",
    )
    command.add_argument(
        "--hang-limit",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds without progress after which a rank counts as hanging (default: %(default)s)",
    )
    command.add_argument("script", metavar="SCRIPT", help="such as mosaicbert_ds/pretrain.py")
    command.add_argument("arguments_of_script", nargs=argparse.REMAINDER, metavar="...", help="its arguments")


def _add_hosts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="lines HOST slots=N (default: the Slurm job's nodes)"
    )
    command.add_argument(
        "--port", type=_positive, default=29500, metavar="N", help="of the first host (default: %(default)s)"
    )
    command.add_argument(
        "--interface", metavar="NAME", help="between hosts (default: the one on the way to each other)"
    )


def _add_estimate(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--gpu", choices=("a100-40", "a100-80", "h100", "h200"), default="h200", help="(default: %(default)s)"
    )
    command.add_argument(
        "--nodes",
        type=_sizes,
        default=[1, 8, 16, 32, 64],
        metavar="N,N",
        help="of 8 GPUs (default: 1,8,16,32,64)",
    )
    command.add_argument(
        "--interconnect",
        choices=("ethernet-25", "ethernet-100", "efa-400", "efa-3200", "hdr-8", "ndr-8"),
        default="ndr-8",
        help="between nodes; Gbit/s, or InfiniBand with a card a GPU (default: %(default)s)",
    )
    command.add_argument(
        "--price", type=float, metavar="P", help="dollars a GPU-hour (default: the recipe's)"
    )
    figure = command.add_mutually_exclusive_group()
    figure.add_argument(
        "--bench", type=Path, metavar="FILE", help="speed from `mosaicbert bench throughput --json`"
    )
    figure.add_argument(
        "--samples-per-s", type=float, metavar="X", help="speed of one GPU at the recipe's micro batch"
    )
    command.add_argument(
        "--fill", type=_share, default=0.88, metavar="F", help="real share of tokens (default: %(default)s)"
    )
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw it: .png, .svg or .pdf")
    command.add_argument("--json", action="store_true", help=_JSON)


def _add_benchmarks(benchmarks: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train, engine = "to train", "engine.deepspeed=zero2 batch.micro_batch_size=512"
    command = _command(
        benchmarks, "throughput", _bench_throughput, "optimizer steps of this model and its peers, in one run"
    )
    _add_recipe(command, train, engine)
    command.add_argument(
        "--models", type=_names, metavar="A,B", help="contenders (default: all; a wrong name lists them)"
    )
    command.add_argument(
        "--micro-batches",
        type=_sizes,
        default=[128, 256, 512],
        metavar="N,N",
        help="sizes that each contender tries, in samples (default: 128,256,512)",
    )
    command.add_argument(
        "--global-batch", type=_positive, metavar="N", help="samples (default: the recipe's)"
    )
    command.add_argument("--length", type=_positive, metavar="N", help="of a row, instead of the recipe's")
    rows = command.add_mutually_exclusive_group()
    rows.add_argument(
        "--full-rows", action="store_true", help="all random rows full (default: three of four, as in C4)"
    )
    rows.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="shards of `mosaicbert data prepare` instead of random rows; times the loader too",
    )
    command.add_argument(
        "--repeats", type=_positive, default=10, metavar="N", help="steps timed (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help=_JSON)

    command = _command(
        benchmarks, "limit", _bench_limit, "the model's matrix products alone, and the speed they would allow"
    )
    _add_recipe(command, "whose products", "masking.rate=0.15")
    command.add_argument(
        "--tokens", type=_positive, default=65536, metavar="N", help="of a micro batch (default: %(default)s)"
    )
    command.add_argument("--json", action="store_true", help=_JSON)

    command = _command(benchmarks, "kernels", _bench_kernels, "each operation against PyTorch and its floor")
    command.add_argument("--json", action="store_true", help=_JSON)

    command = _command(benchmarks, "step", _bench_step, "where a step spends the GPU's time")
    _add_recipe(command, train, engine)
    command.add_argument(
        "--top",
        type=_positive,
        default=10,
        metavar="N",
        help="longest kernels to list (default: %(default)s)",
    )
    command.add_argument("--json", action="store_true", help=_JSON)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is given; allowed are whole numbers from 1 on")
    return int(text)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share; give more than 0 and at most 1")
    return value


def _names(text: str) -> list[str]:
    return text.split(",")


def _sizes(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _add_glue(command: argparse.ArgumentParser, required: bool = True) -> None:
    command.add_argument(
        "--glue-dir",
        required=required,
        metavar="DIR",
        help="folder of the official files (CoLA/train.tsv, ...), or hf:nyu-mll/glue"
        + ("" if required else "; for RUNs that have no score yet"),
    )
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="mnli qnli qqp sst2 cola rte mrpc stsb")
    command.add_argument(
        "--from-pretrained",
        action="store_true",
        help="every task starts from the pretrained model, none from the finished mnli",
    )


def _add_finetuning(command: argparse.ArgumentParser, recipe: str, with_model: bool = True) -> None:
    if with_model:
        command.add_argument("--model", type=Path, required=True, metavar="DIR", help=_MODEL)
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for results; hosts that share it share the work",
    )
    command.add_argument(
        "--recipe", default=recipe, metavar="NAME|FILE", help="numbers of each task (default: %(default)s)"
    )
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"recipe values, e.g. tasks.{'rte' if recipe == 'glue' else 'task'}.epochs=5 max_length=128",
    )
    command.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of each task's own")
    _add_devices(command)
    command.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="run on these hosts by ssh; lines HOST slots=N"
    )


def _add_devices(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpus", type=int, metavar="N", help="of this host (default: all)")
    command.add_argument(
        "--jobs-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="side by side on a GPU (default: %(default)s)",
    )
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="side by side without a GPU (default: %(default)s)"
    )


def _command(
    group: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    text: str,
) -> argparse.ArgumentParser:
    # No abbreviations: commands that run again on hosts look for their options by name.
    command = group.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.set_defaults(run=run)
    return command


def _add_recipe(command: argparse.ArgumentParser, use: str, example: str) -> None:
    command.add_argument(
        "--recipe", default="mosaicbert-base", metavar="NAME|FILE", help=f"{use} (default: %(default)s)"
    )
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=f"recipe values, e.g. {example}",
    )


def _add_sources(command: argparse.ArgumentParser) -> None:
    command.add_argument("sources", nargs="+", metavar="SOURCE", help=_SOURCES)
    command.add_argument(
        "--text-field", default="text", metavar="NAME", help="of .jsonl and .parquet (default: %(default)s)"
    )
    command.add_argument(
        "--on-error",
        choices=("refuse", "skip"),
        default="refuse",
        help="at an empty, damaged or non-UTF-8 file: stop, or count it and go on (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
