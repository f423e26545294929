"""launch/minutes.sh: both models for each budget, scored and drawn by one command."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mosaicbert_ds import cli

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "mosaicbert_ds" / "samples"


def run(cwd: Path, *arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    programs = os.pathsep.join(filter(None, [path, str(Path(sys.executable).parent), os.environ["PATH"]]))
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "minutes.sh"), *arguments],
        cwd=cwd, env=os.environ | {"PATH": programs} | environment, text=True, capture_output=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpus", "visible", "used"),
    [
        (0, "", ["0", "0"]),
        (1, "", ["0", "0"]),
        (2, "", ["0", "1"]),
        (8, "3,6", ["3", "6"]),
        (8, "5", ["5", "5"]),
        (8, "GPU-1a,GPU-7c", ["1", "7"]),
    ],
)
def test_each_recipe_has_a_gpu_where_there_are_enough(
    gpus: int, visible: str, used: list[str], tmp_path: Path
) -> None:
    """With programs that only note how they were called; BERT's training fails at its second budget."""
    programs = {
        "nvidia-smi": f"""for ((i = 0; i < {gpus}; i++)); do
            case ,${{1#--id=}}, in ,--*) echo $i ;; *,$i,* | *,GPU-$i[a-f],*) echo $i ;; esac
        done""",
        "deepspeed": 'echo "train $2 $9 ${13} ${14}" >> "$(basename "$9")"; [ "$9 ${14##*=}" != "bert 5" ]',
        "mosaicbert": 'echo "$CUDA_VISIBLE_DEVICES $*" >> "$1"',
    }
    (tmp_path / "bin").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = str(tmp_path / "bin")
    environment = {"RECIPES": "my/mosaic.yaml bert", "CUDA_VISIBLE_DEVICES": visible}
    ended = run(tmp_path, "shards", "glue", "out", "2.5", "5", path=path, **environment)
    assert ended.returncode != 0, "the other model's runs go on, and the failure is told"
    assert not (tmp_path / "plot").exists()
    for recipe, gpu in zip(("my/mosaic.yaml", "bert"), used, strict=True):
        curve = Path(recipe).stem
        assert (tmp_path / Path(recipe).name).read_text().splitlines() == [
            f"train localhost:{gpu} {recipe} out/{curve}-{minutes}min duration.minutes={minutes}"
            for minutes in ("2.5", "5")
        ]
    scored = (tmp_path / "pareto").read_text().splitlines()
    end = "--recipe glue-short --jobs-per-gpu 4"
    runs = ["mosaic=out/mosaic-2.5min", "mosaic=out/mosaic-5min"]
    assert sorted(scored) == sorted(
        [
            f"{used[0]} pareto {runs[0]} --glue-dir glue --out out/mosaic {end}",
            f"{used[0]} pareto {runs[0]} {runs[1]} --glue-dir glue --out out/mosaic {end}",
            f"{used[1]} pareto bert=out/bert-2.5min --glue-dir glue --out out/bert {end}",
        ]
    )


def test_too_few_arguments_are_told(tmp_path: Path) -> None:
    ended = run(tmp_path, "shards", "glue", "out")
    assert ended.returncode == 2 and "3 arguments; give SHARDS, GLUE_DIR, OUT and" in ended.stderr


@pytest.mark.slow
def test_two_tiny_models_race_on_the_samples(tmp_path: Path) -> None:
    text = [str(SAMPLES / "pretrain" / name) for name in ("train.jsonl", "val.jsonl")]
    tokenizer, shards = str(tmp_path / "tokenizer"), str(tmp_path / "shards")
    assert cli.main(["tokenizer", "train", text[0], "--vocab-size", "2048", "--out", tokenizer]) == 0
    prepare = ["data", "prepare", text[0], "--held-out-sources", text[1], "--recipe", "tiny"]
    assert cli.main([*prepare, "--tokenizer", tokenizer, "--out", shards]) == 0
    for name in ("mosaicbert", "bert"):
        (tmp_path / f"tiny-{name}.yaml").write_text(
            f"extends: tiny\nmodel: {{architecture: {name}}}\nduration: {{samples: null, minutes: 1}}\n"
        )
    # The end is forecast: of a dozen steps, as many as a slow core makes in 0.05 minutes, it may miss two.
    command = [shards, str(SAMPLES / "glue"), "out", "0.1", "0.2"]
    more = {
        "RECIPES": "tiny-mosaicbert.yaml tiny-bert.yaml",
        "FINETUNE": "--tasks mnli rte --seeds 1 --set max_length=32 tasks.mnli.epochs=1",
    }
    for _ in range(2):  # the second finds all done
        ended = run(tmp_path, *command, **more)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    with (tmp_path / "out/pareto/pareto.csv").open() as file:
        points = list(csv.DictReader(file))
    assert [(point["curve"], point["run"]) for point in points] == [
        (f"tiny-{name}", f"tiny-{name}-{minutes}min")
        for name in ("bert", "mosaicbert")
        for minutes in ("0.1", "0.2")
    ]
    hours = [60 * float(point["hours"]) for point in points]
    assert all(0.9 * budget < spent < 3 * budget for budget, spent in zip([0.1, 0.2] * 2, hours, strict=True))
    assert (tmp_path / "out/loss.png").is_file() and (tmp_path / "out/pareto/pareto.svg").is_file()
