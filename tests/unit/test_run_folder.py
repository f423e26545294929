"""A run's folder has one writer, and loses nothing that was written."""

import fcntl
import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training import loop, run_folder, telemetry
from mosaicbert_ds.training.progress import Progress


@pytest.mark.parametrize(
    ("other_process", "host", "refused"),
    [
        (1, platform.node(), True),
        (1, "a host that was lost, whose lock a shared disk still keeps", False),
        (0, platform.node(), False),
    ],
    ids=["another here", "one on a lost host", "this one"],
)
def test_a_second_start_on_a_host_is_refused_while_the_first_is_there(
    other_process: int, host: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_GONE_S", 0.1)
    holder = f"process {os.getpid() + other_process} of {host}"
    run, tokenizer = tmp_path / "run", tmp_path / "tokenizer"
    run.mkdir()
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "tokenizer.json").chmod(0o444)  # of shards that nobody may change
    with (run / ".lock").open("w") as first:
        first.write(holder)
        first.flush()
        fcntl.flock(first, fcntl.LOCK_EX)
        if refused:
            with pytest.raises(ConfigError, match=f"run is being written by {holder}; stop"):
                run_folder.lock_run_folder(run)
            assert [path.name for path in run.iterdir()] == [".lock"], "nothing was written"
        else:
            run_folder.lock_run_folder(run).close()
    with run_folder.lock_run_folder(run):  # the first has ended
        run_folder.record_start(run, "recipe", {}, tokenizer)
        assert (run / ".lock").read_text() == f"process {os.getpid()} of {platform.node()}"
        assert (run / "recipe.yaml").read_text() == "recipe"
        assert (run / "tokenizer" / "tokenizer.json").stat().st_mode & 0o200, "the next start writes it again"


def test_metrics_of_starts_that_left_no_checkpoint_are_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(f"start {number}")
        assert telemetry._keep_aside(tmp_path / "metrics.jsonl") == tmp_path / f"metrics-{number}.jsonl"
    assert telemetry._keep_aside(tmp_path / "metrics.jsonl") is None
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["start 1", "start 2"]


def test_held_out_text_of_which_nothing_is_masked_has_no_loss() -> None:
    assert loop.evaluate(torch.nn.Identity(), []) == {}


def test_gpu_time_is_counted_with_the_ranks_that_there_were() -> None:
    before = {"progress": {"elapsed_s": 10.0, "training_s": 6.0}, "world_size": 8}  # not yet counted
    progress = Progress.of(before)
    start = replace(progress)
    progress.elapsed_s, progress.training_s = 13.0, 8.0
    progress.count_gpus(2, start)
    progress = Progress.of({"progress": progress.to_dict(), "world_size": 2})
    assert (progress.gpu_s, progress.training_gpu_s) == (80 + 2 * 3, 48 + 2 * 2)
