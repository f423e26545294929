"""A run's folder has one writer."""

import fcntl
import os
import platform
from pathlib import Path

import pytest

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.training import run_folder


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
