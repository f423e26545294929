"""The model learns, and every ZeRO stage teaches it the same. Minutes on two cores, hence `slow`."""

import json
from pathlib import Path

import pytest
from launcher import Launcher

from mosaicbert_ds.data.prepare import prepare
from mosaicbert_ds.data.tokenizer import train_tokenizer

SAMPLES = Path(__file__).resolve().parents[2] / "mosaicbert_ds" / "samples" / "pretrain"
# A model that knows no more than how often each word occurs reaches the unigram entropy; half a nat
# below it, context has been used.
LEARNED_NATS = 0.5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_recipe_learns_from_context_and_alike_at_every_zero_stage(
    tmp_path: Path, launcher: Launcher
) -> None:
    from mosaicbert_ds.config import load_recipe

    train_tokenizer([str(SAMPLES / "train.jsonl")], tmp_path / "tokenizer", 2048)
    prepare(
        [SAMPLES / "train.jsonl"],
        tmp_path / "shards",
        tmp_path / "tokenizer",
        load_recipe("tiny").data,
        held_out_sources=[SAMPLES / "val.jsonl"],
    )
    early: dict[str, list[float]] = {}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        run = tmp_path / stage
        arguments = ("--recipe", "tiny", f"engine.deepspeed={stage}", "duration.samples=16000")
        code = launcher.run(*arguments, "--data", str(tmp_path / "shards"), "--out", str(run))
        assert code == 0, launcher.log.read_text()[-3000:]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        final = [line for line in lines if "evaluation/loss" in line][-1]
        assert final["evaluation/loss"] < final["evaluation/unigram_entropy"] - LEARNED_NATS, stage
        early[stage] = [line["train/loss"] for line in lines if "train/loss" in line][:20]
    for stage in ("zero1", "zero2", "zero3"):
        # fp32 and the order of sums; later, training itself makes such differences grow.
        worst = max(abs(a - b) for a, b in zip(early[stage], early["zero0"], strict=True))
        assert worst < 1e-5, (stage, worst)
