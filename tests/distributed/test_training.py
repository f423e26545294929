"""Promises of the engine, kept on real gloo ranks through the real DeepSpeed.

One test starts its ranks once and runs all its cases inside: starting costs more than training does.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run_on_ranks

STAGES = ("zero0", "zero1", "zero2", "zero3")
CASES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (*STAGES, "offload")]

RECIPE = """
model: {num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 32, intermediate_size: 48, vocab_size: 512}
data: {max_length: 32, documents: chunk}
batch: {global_batch_size: 8, micro_batch_size: 2}
duration: {samples: 64}
optimizer: {peak_lr: 5e-3}
evaluation: {every_samples: 32, max_samples: 32}
checkpoint: {every_samples: 32, keep_last: 9}
telemetry: {log_every_steps: 3, usd_per_gpu_hour: null}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def losses(run: Path) -> dict[int, float]:
    """Training loss by step, every digit."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def train(recipe: Path, data: Path, out: Path, *overrides: str) -> None:
    from mosaicbert_ds import pretrain

    assert pretrain.main(["--recipe", str(recipe), "--data", str(data), "--out", str(out), *overrides]) == 0


def manifest_files(step: Path) -> dict[str, Any]:
    return json.loads((step / "manifest.json").read_text())["files"]


def _train_and_resume(recipe: Path, data: Path, folder: Path) -> None:
    from mosaicbert_ds import dist

    for stage, precision in CASES:
        arguments = (f"engine.deepspeed={stage}", f"engine.precision={precision}")
        whole, resumed = folder / f"{stage}-{precision}", folder / f"{stage}-{precision}-resumed"
        train(recipe, data, whole, *arguments)
        if dist.is_main():
            shutil.copytree(
                whole / "checkpoints" / "step-00000004", resumed / "checkpoints" / "step-00000004"
            )
        dist.barrier()
        train(recipe, data, resumed, *arguments)


def test_resume_gives_the_same_losses_and_weights_bit_for_bit(
    recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    """ZeRO 0 to 3 and offload, fp32 and bf16, dropout on, accumulation 2, two ranks; and what the stages
    compute is one and the same training."""
    run_on_ranks(_train_and_resume, 2, recipe, corpus, tmp_path)
    for stage, precision in CASES:
        whole, resumed = tmp_path / f"{stage}-{precision}", tmp_path / f"{stage}-{precision}-resumed"
        expected = losses(whole)
        assert list(expected) == list(range(1, 9))
        assert losses(resumed) == {step: expected[step] for step in range(5, 9)}, (stage, precision)
        last = Path("checkpoints") / "step-00000008"
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            name = f"{kind}.safetensors"
            assert manifest_files(whole / last)[name] == manifest_files(resumed / last)[name], (
                stage,
                precision,
            )
        assert json.loads((whole / last / "state.json").read_text())["adam_steps"] == 8, (stage, precision)
    # The stages differ in the order of sums alone: 1e-5 is 100 roundings of fp32, 1e-3 a quarter of
    # bf16's own step.
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-3)):
        reference = losses(tmp_path / f"zero0-{precision}")
        for stage in (*STAGES[1:], "offload"):
            found = losses(tmp_path / f"{stage}-{precision}")
            worst = max(abs(found[step] - reference[step]) for step in reference)
            assert worst < tolerance, (stage, precision, worst)
    first, last_loss = losses(tmp_path / "zero1-bf16")[1], losses(tmp_path / "zero1-bf16")[8]
    assert last_loss < first, "eight steps at this rate must lower the loss"


def _reload(recipe: Path, step: Path) -> list[tuple[str, str]]:
    """Load `step` at every stage on this many ranks; name what differs from the files."""
    from mosaicbert_ds import dist
    from mosaicbert_ds.config import load_recipe
    from mosaicbert_ds.model import build_pretraining_model
    from mosaicbert_ds.training import engine as ds
    from mosaicbert_ds.training import saving
    from mosaicbert_ds.training.checkpoint import open_verified
    from mosaicbert_ds.training.ds_config import read_ds_config, resolve_ds_config
    from mosaicbert_ds.training.plan import plan_batches

    differing = []
    for stage, precision in CASES:
        config = load_recipe(str(recipe), [f"engine.deepspeed={stage}", f"engine.precision={precision}"])
        plan = plan_batches(config.batch, config.duration, dist.world_size())
        ds_config = resolve_ds_config(read_ds_config(config.engine), config.engine, plan)
        on_main = open_verified(step) if dist.is_main() else None
        model = build_pretraining_model(config.model)
        saving.load_weights(model, on_main)
        engine = ds.build_engine(model, config.optimizer, ds_config, bf16=precision == "bf16")
        saving.load_moments(engine, on_main)
        files = open_verified(step)
        for kind in ("weights", *ds.MOMENTS):
            with files.open(kind) as file:
                for name, parameter in ds.named_parameters(engine).items():
                    full = ds.gather(engine, parameter, kind)
                    if not np.array_equal(full.numpy(), file.get_tensor(name).numpy()):
                        differing.append((f"{stage}-{precision}", f"{kind} {name}"))
        if ds.adam_steps(engine) != files.state["adam_steps"]:
            differing.append((f"{stage}-{precision}", "adam_steps"))
    return differing


def _train(recipe: Path, data: Path, runs: list[tuple[Path, list[str]]]) -> None:
    for out, overrides in runs:
        train(recipe, data, out, *overrides)


def test_a_checkpoint_loads_at_any_stage_and_rank_count_bit_for_bit(
    recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    run_on_ranks(_train, 2, recipe, corpus, [(tmp_path / "run", ["engine.precision=bf16"])])
    step = tmp_path / "run" / "checkpoints" / "step-00000004"
    for world_size in (1, 4):
        for differing in run_on_ranks(_reload, world_size, recipe, step):
            assert differing == [], world_size


def test_the_loss_is_the_mean_over_the_global_batch_whatever_its_pieces(
    recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    """1, 2 and 4 ranks with other micro batches and accumulations are one training: dropout, which each
    rank draws for itself, is off."""
    fixed = ["engine.precision=fp32", "model.hidden_dropout=0.0"]
    for world_size, micro in ((1, 8), (2, 1), (4, 2)):
        run = (tmp_path / f"{world_size}", [*fixed, f"batch.micro_batch_size={micro}"])
        run_on_ranks(_train, world_size, recipe, corpus, [run])
    reference = losses(tmp_path / "1")
    for world_size in (2, 4):
        found = losses(tmp_path / f"{world_size}")
        worst = max(abs(found[step] - reference[step]) for step in reference)
        assert worst < 1e-5, (world_size, worst)  # order of fp32 sums; a mean of means is off by 1e-2
