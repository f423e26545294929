"""The pretraining command as people run it: through the launcher, killed, stopped, mistyped."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launcher import SCRIPT, Launcher
from safetensors.torch import load_file

from mosaicbert_ds import cli, pretrain
from mosaicbert_ds.config import load_recipe
from mosaicbert_ds.errors import UserError
from mosaicbert_ds.model import build_pretraining_model, export_model
from mosaicbert_ds.training.faults import EXIT_STOPPED, EXIT_USER_ERROR

SMALL = [
    *("--recipe", "tiny"),
    *("data.max_length=32", "model.vocab_size=512", "model.hidden_size=32", "model.intermediate_size=64"),
    *("batch.global_batch_size=8", "batch.micro_batch_size=2", "evaluation.max_samples=32"),
    *("telemetry.log_every_steps=1", "checkpoint.every_samples=80", "evaluation.every_samples=160"),
]


def losses(run: Path, tag: str = "train/loss") -> dict[int, float]:
    """Loss by step; of a step that was trained twice, the later. A half line is not counted."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if tag in values:
            found[values["step"]] = values[tag]
    return found


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)  # between two looks at a file that another process writes


def test_a_run_killed_at_any_moment_goes_on_to_the_same_losses_bit_for_bit(
    corpus: Path, tmp_path: Path, launcher: Launcher
) -> None:
    command = (*SMALL, "duration.samples=480", "--data", str(corpus))  # 60 steps, a checkpoint every 10
    assert launcher.run(*command, "--out", str(tmp_path / "whole")) == 0, launcher.log.read_text()[-3000:]
    expected = losses(tmp_path / "whole")
    assert list(expected) == list(range(1, 61))

    killed = tmp_path / "killed"
    for step in (4, 23, 40):  # before any checkpoint, between two, while one is being written
        process = launcher.start(*command, "--out", str(killed))
        seen = killed / "metrics.jsonl"
        wait_for(lambda: seen.exists() and max(losses(killed), default=0) >= step, process, launcher.log)  # noqa: B023
        launcher.kill(process)
        survived = losses(killed)
        assert survived == {number: expected[number] for number in survived}
    assert launcher.run(*command, "--out", str(killed)) == 0, launcher.log.read_text()[-3000:]
    assert losses(killed) == expected
    held_out = losses(killed, "evaluation/loss")
    assert held_out == losses(tmp_path / "whole", "evaluation/loss") and list(held_out) == [20, 40, 60]
    first, last = (
        json.loads((run / "checkpoints" / "step-00000060" / "manifest.json").read_text())["files"]
        for run in (tmp_path / "whole", killed)
    )
    assert first["weights.safetensors"] == last["weights.safetensors"]


def test_a_run_may_begin_from_another_models_weights_and_goes_on_from_its_own(
    corpus: Path, tmp_path: Path, launcher: Launcher
) -> None:
    command = (*SMALL, "--data", str(corpus), "--out")
    config = load_recipe(SMALL[1], SMALL[2:]).model
    torch.manual_seed(1)  # not the run's
    weights = {name: weight.detach() for name, weight in build_pretraining_model(config).named_parameters()}
    export_model(weights, config, corpus / "tokenizer", tmp_path / "model")
    # Steps of no size, so that what comes out must be what went in, token types included.
    still = ("optimizer.peak_lr=1e-12", "optimizer.weight_decay=0", "duration.samples=16")
    begins = (*command, str(tmp_path / "second"), "--init", str(tmp_path / "model"), *still)
    assert launcher.run(*begins) == 0, launcher.log.read_text()[-3000:]
    assert cli.main(["export", str(tmp_path / "second"), str(tmp_path / "again")]) == 0
    given, found = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "again"))
    for name, weight in given.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6, msg=name)
    (tmp_path / "model").rename(tmp_path / "moved")
    assert launcher.run(*begins[:-1], "duration.samples=32") == 0, launcher.log.read_text()[-3000:]
    said = launcher.log.read_text()
    assert "going on from step 2" in said and f"--init {tmp_path / 'model'} was for the beginning" in said

    init = ("--init", str(tmp_path / "moved"))
    message = mistake(tmp_path, corpus, *init, "model.hidden_size=64")
    assert "has hidden_size 32, the recipe 64; change the recipe's model" in message
    tokenizer = tmp_path / "moved" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"the"', '"teh"'))
    assert "another vocabulary than the shards; prepare them with --tokenizer" in mistake(
        tmp_path, corpus, *init
    )


def test_asked_to_stop_it_saves_and_says_so_and_the_same_command_goes_on(
    corpus: Path, tmp_path: Path, launcher: Launcher
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, SCRIPT, *SMALL, "duration.samples=80000", "checkpoint.every_samples=80000"]
    command += ["--data", str(corpus), "--out", str(run)]
    environment = os.environ | {"MASTER_PORT": str(launcher.port)}
    with launcher.log.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        seen = run / "metrics.jsonl"
        wait_for(lambda: seen.exists() and max(losses(run), default=0) >= 5, process, launcher.log)
        process.terminate()
        assert process.wait(60) == EXIT_STOPPED
    finally:
        process.kill()
    (saved,) = (run / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) >= 5
    assert "goes on from there" in launcher.log.read_text()


def mistake(tmp_path: Path, corpus: Path, *changes: str, data: Path | None = None, out: str = "run") -> str:
    """The sentence with which the command refuses, before any process group or GPU is touched."""
    arguments = [*SMALL, "duration.samples=80", *changes]
    with pytest.raises(UserError) as refusal:
        pretrain.main([*arguments, "--data", str(data or corpus), "--out", str(tmp_path / out)])
    return str(refusal.value)


def test_a_start_chooses_its_step_when_no_other_writes_any_more(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would go on from a step that is not the last, or that is removed meanwhile."""

    def choose(resume: str, root: Path) -> None:
        with (root.parent / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise UserError("looked")

    monkeypatch.setattr(pretrain.saving, "choose_checkpoint", choose)
    assert mistake(tmp_path, corpus) == "looked"


def test_a_newcomers_mistakes_are_one_sentence_each(corpus: Path, tmp_path: Path, launcher: Launcher) -> None:
    for more in ([], ["--dry-run"]):
        assert "nowhere" in mistake(tmp_path, corpus, *more, data=tmp_path / "nowhere")
    message = mistake(tmp_path, corpus, "batch.micro_batch_size=3")
    assert (
        "batch.global_batch_size 8 is not micro batch 3" in message
        and "use batch.micro_batch_size=2" in message
    )
    assert "did you mean 'optimizer.peak_lr'" in mistake(tmp_path, corpus, "optimizer.peak_rl=1e-3")
    assert "set data.max_length=32" in mistake(tmp_path, corpus, "data.max_length=64")
    assert "use model.vocab_size=512" in mistake(tmp_path, corpus, "model.vocab_size=64")

    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in mistake(tmp_path, corpus, out="file/run")

    foreign = shutil.copytree(corpus, tmp_path / "foreign")
    tokenizer = foreign / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("the", "hte", 1))
    assert "was tokenised with" in mistake(tmp_path, corpus, data=foreign)

    assert (
        launcher.run(*SMALL, "duration.samples=80", "--data", str(corpus), "--out", str(tmp_path / "run"))
        == 0
    )
    recorded = (tmp_path / "run" / "recipe.yaml").read_text()
    message = mistake(tmp_path, corpus, "model.hidden_size=64")
    assert "of another model" in message and "hidden_size 32 -> 64" in message
    assert (tmp_path / "run" / "recipe.yaml").read_text() == recorded, (
        "a refused start must not touch the run"
    )
    assert "give --resume auto" in mistake(tmp_path, corpus, "--resume", "never")

    # Through the launcher: exit code 2 and the sentence, without a traceback; and what only the main rank
    # sees wrong leaves nothing behind that the right command would wait for.
    command = (*SMALL, "duration.samples=160", "--data", str(corpus), "--out", str(tmp_path / "run"))
    for mistakes in (["--data", "nowhere"], ["model.hidden_size=64"]):
        launcher.log.write_bytes(b"")
        assert launcher.run(*command, *mistakes) == EXIT_USER_ERROR
        said = launcher.log.read_text()
        assert "error: " in said and "Traceback" not in said
    assert launcher.run(*command) == 0


def test_dry_run_says_everything_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--recipe", "mosaicbert-base", "--dry-run", "--world-size", "8"]) == 0
    said = capsys.readouterr().out
    for fact in (
        "parameters: 137,400,384",
        "AdamW-equivalent weight decay: 0.02",
        "global batch 4,096 = micro batch 128 x accumulation 4 x 8 rank(s); 70,000 steps",
        "286,720,000 samples  1.000e-05",
        '"grad_accum_dtype": "fp32"',
        "peak_lr: 0.0005",
    ):
        assert fact in said, fact
    assert said.count(" samples  ") == 10
