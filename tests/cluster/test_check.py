"""`mosaicbert cluster check` finds each thing that would spoil a run, and says which host it is."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hosts import BIN, Hosts, run

from mosaicbert_ds.cluster.check import _slow_ways


def check(hosts: Hosts, corpus: Path, out: Path) -> "subprocess.CompletedProcess[str]":
    recipe = ["--recipe", "tiny", "--set", "data.max_length=32", "model.vocab_size=512"]
    command = ["cluster", "check", "--hostfile", hosts.hostfile(), "--data", corpus, "--out", out]
    return subprocess.run(
        hosts.on("node0", BIN / "mosaicbert", *command, *recipe), capture_output=True, text=True, timeout=300
    )


@pytest.mark.hosts
def test_good_hosts_are_ready_and_each_fault_is_a_reason_with_its_host(hosts: Hosts, corpus: Path) -> None:
    shards = hosts.out / "shards"
    for name in hosts.names:
        shutil.copytree(corpus, hosts.view(name) / "shards")
    good = check(hosts, shards, hosts.out / "run")
    assert good.returncode == 0, good.stdout + good.stderr
    assert good.stdout.splitlines()[-1] == "ready" and "all-reduce over" in good.stdout

    manifest = hosts.view("node1") / "shards" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    mount = ("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", hosts.out / "run")
    run(*hosts.on("node2", *mount))
    hosts.limit(10, [hosts.names[-1]])
    try:
        bad = check(hosts, shards, hosts.out / "run")
    finally:
        hosts.limit(0)
        run(*hosts.on("node2", "umount", hosts.out / "run"))
    assert bad.returncode == 1
    lines = bad.stdout.splitlines()
    assert any(line.startswith("node1: data: ") for line in lines), bad.stdout
    assert any(line.startswith("node2: --out") and "Read-only" in line for line in lines), bad.stdout
    assert any(line.startswith(f"{hosts.names[-1]}: slow to most hosts") for line in lines), bad.stdout
    assert not any(line.startswith("node0:") for line in lines), bad.stdout

    hosts.unplug("node1")
    try:
        cut = check(hosts, shards, hosts.out / "run")
    finally:
        hosts.plug_in("node1")
        for name in hosts.names:
            shutil.rmtree(hosts.view(name) / "shards")
            shutil.rmtree(hosts.view(name) / "run", ignore_errors=True)
    assert cut.returncode == 1 and "node1: no answer: ssh: connect to host node1" in cut.stdout, cut.stdout


def test_one_slow_host_is_one_reason_and_a_slow_pair_names_both() -> None:
    names = ["a", "b", "c", "d"]
    even = [[10e9] * 4 for _ in range(4)]
    assert _slow_ways(names, even) == []
    pair = [row[:] for row in even]
    pair[1][3] = 2e9
    assert _slow_ways(names, pair) == [("b", "slow to d: 2.000 GB/s of 10.000")]
    host = [[1e9 if 2 in (i, j) else 10e9 for j in range(4)] for i in range(4)]
    assert [name for name, _ in _slow_ways(names, host)] == ["c"]
