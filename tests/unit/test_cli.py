"""The commands explain themselves, and a person's mistake is one line and exit code 2."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mosaicbert_ds import cli, pretrain
from mosaicbert_ds.config import shipped_recipes
from mosaicbert_ds.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def _commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _commands(command, (*path, name))


COMMANDS = list(_commands(cli._parser()))


def test_the_commands_are_those_of_the_readme() -> None:
    leaves = {" ".join(path) for path, parser in COMMANDS if parser.get_default("run")}
    assert leaves >= {"tokenizer train", "data prepare", "data verify", "export", "import"}


@pytest.mark.parametrize(
    ("path", "parser"), COMMANDS, ids=[" ".join(path) or "mosaicbert" for path, _ in COMMANDS]
)
def test_help_names_and_explains_every_argument(
    path: tuple[str, ...], parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*path, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert all(name in text for name in action.choices)
            assert len(action._choices_actions) == len(action.choices), "each with a line of its own"
            continue
        names = action.option_strings or [str(action.metavar)]
        assert all(name in text for name in names)
        assert action.help, f"{names} says nothing"
    assert max(map(len, text.splitlines())) <= 100


def test_the_help_of_the_training_script_names_recipes_and_arguments(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in ("--recipe", "--data", "--out", "--resume", "--dry-run", "key=value", *shipped_recipes()):
        assert word in text


MISTAKES = [
    (["export", "nowhere", "out"], "error: nowhere holds no checkpoint; give a run's folder"),
    (["data", "verify", "nowhere"], "error: "),
    (
        ["data", "prepare", "nowhere.txt", "--tokenizer", "t", "--out", "o", "--recipe", "tinny"],
        "recipe 'tinny'",
    ),
    (
        ["data", "prepare", "x.txt", "--tokenizer", "t", "--out", "o", "--set", "data.max_lenght=5"],
        "did you mean 'data.max_length'?",
    ),
    (["tokenizer", "train", "nowhere.txt", "--out", "o"], "nowhere.txt"),
    (["import", "nowhere", "out"], "nowhere"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES, ids=[" ".join(mistake[0]) for mistake in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
    assert said in err


def test_a_mistake_reaches_the_shell_without_a_traceback(tmp_path: Path) -> None:
    """Through the installed command, and through the training script as the launcher starts it."""
    done = _run([str(Path(sys.executable).with_name("mosaicbert")), "data", "verify", str(tmp_path)])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    script = [sys.executable, "mosaicbert_ds/pretrain.py", "--recipe", "tiny", "optimizer.peak_lrr=1"]
    done = _run([*script, "--dry-run"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "unknown key 'optimizer.peak_lrr'; did you mean 'optimizer.peak_lr'?" in done.stderr


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is meant for the person is made a sentence."""
    for error in (KeyError("x"), AssertionError(), UserError("x")):

        def run(arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cli, "_verify_data", run)
        if isinstance(error, UserError):
            assert cli.main(["data", "verify", "x"]) == 2
        else:
            with pytest.raises(type(error)):
                cli.main(["data", "verify", "x"])


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"}
    )


def test_plot_draws_the_curves_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = {"evaluation/loss": 6.5, "evaluation/unigram_entropy": 7.3}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        lines = [{"samples_seen": n, "train/loss": 10 - n / 10} | evaluation for n in range(10)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = tmp_path / "loss.svg"
    assert cli.main(["plot", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(picture)]) == 0
    assert "<svg" in picture.read_text(encoding="utf-8") and picture.stat().st_size > 10_000
    assert cli.main(["plot", str(tmp_path / "third"), "--out", str(picture)]) == 2
    assert "third/metrics.jsonl does not exist" in capsys.readouterr().err
