"""Of all that want a job one gets it, and the job of a dead owner is taken over once."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mosaicbert_ds.finetune import claim as module
from mosaicbert_ds.finetune.claim import Watch


def _dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def _set_owner(work: Path, number: int, **facts) -> None:
    path = work / f"claim-{number}"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_one_of_many_gets_a_free_job_and_one_the_job_of_a_dead_owner(tmp_path: Path) -> None:
    work = tmp_path / "job.work"
    for number in range(5):
        with ThreadPoolExecutor(16) as pool:
            claims = [c for c in pool.map(lambda _: Watch().try_claim(work), range(64)) if c]
        assert [claim.path.name for claim in claims] == [f"claim-{number}"]
        assert claims[0].is_held()
        _set_owner(work, number, pid=_dead())


def test_a_living_owner_keeps_its_job_and_a_released_one_is_free(tmp_path: Path) -> None:
    first = Watch().try_claim(tmp_path)
    assert first is not None and Watch().try_claim(tmp_path) is None
    first.release()
    second = Watch().try_claim(tmp_path)
    assert second is not None and second.is_held() and not first.is_held()


def test_an_owner_elsewhere_is_gone_when_it_has_not_beaten_for_long_by_the_watchers_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, watch, clock = Watch().try_claim(tmp_path), Watch(), [1000.0]
    assert claim is not None
    _set_owner(tmp_path, 0, place="another host", pid=_dead())  # its number means nothing here
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    os.utime(claim.path, (1, 1))  # its host's clock is decades behind
    for _ in range(10):
        clock[0] += module.STALE_S - 1
        assert watch.try_claim(tmp_path) is None
        claim.beat()  # some time after each look
    assert watch.try_claim(tmp_path) is None
    clock[0] += module.STALE_S + 1
    assert watch.try_claim(tmp_path) is not None
    assert not claim.is_held(), "it finds out when it wakes up"


def test_a_child_that_took_over_outlives_its_queue(tmp_path: Path) -> None:
    claim = Watch().try_claim(tmp_path)
    assert claim is not None
    _set_owner(tmp_path, 0, pid=_dead())
    claim.take_over()
    assert Watch().try_claim(tmp_path) is None
