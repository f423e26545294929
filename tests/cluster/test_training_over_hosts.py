"""The tiny recipe over several hosts: by the plain `deepspeed --hostfile`, and by `mosaicbert launch` while
hosts come and go."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hosts import BIN, REPO, Hosts
from test_launch import Running

from mosaicbert_ds.training.faults import EXIT_STOPPED

pytestmark = pytest.mark.hosts
SCRIPT = REPO / "mosaicbert_ds" / "pretrain.py"
STEPS = 16
LOSS_TOLERANCE = 2e-5  # other numbers of ranks sum in another order


def command(hosts: Hosts, corpus: Path, run: Path, *more: str) -> list[str]:
    """No dropout, which depends on the ranks; a batch that N, N - 1 and N // 2 hosts can share."""
    batch = hosts.count * (hosts.count - 1)
    values = {
        **{"data.max_length": 32, "model.vocab_size": 512, "model.hidden_size": 32},
        **{"model.intermediate_size": 64, "model.hidden_dropout": 0.0, "batch.global_batch_size": batch},
        **{"batch.micro_batch_size": 1, "duration.samples": STEPS * batch, "evaluation.max_samples": 32},
        **{"evaluation.every_samples": STEPS * batch, "checkpoint.every_samples": 4 * batch},
        "telemetry.log_every_steps": 1,
    }
    arguments = ["--recipe", "tiny", "--data", str(corpus), "--out", str(run)]
    return [str(SCRIPT), *arguments, *(f"{key}={value}" for key, value in values.items()), *more]


def losses(run: Path) -> dict[int, float]:
    return read_metrics(run, "train/loss")


def read_metrics(run: Path, tag: str) -> dict[int, float]:
    """A number by step; of a step that was trained twice, the later. A half line is not counted."""
    found = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.endswith("}") and tag in (values := json.loads(line)):
            found[values["step"]] = values[tag]
    return found


def on_disk(hosts: Hosts) -> Path:
    """A run's folder that lies on the disk of the main rank's host alone."""
    return hosts.out / f"run-{time.monotonic_ns()}"


def seen(hosts: Hosts, run: Path) -> Path:
    return hosts.view("node0") / run.name


@pytest.fixture(scope="module")
def alone(hosts: Hosts, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing happens to."""
    run = tmp_path_factory.mktemp("alone") / "run"
    environment = os.environ | {"MASTER_PORT": "29878"}
    subprocess.run(
        [str(BIN / "python"), *command(hosts, corpus, run)], check=True, env=environment, timeout=300
    )
    return run


@pytest.fixture(scope="module")
def expected(alone: Path) -> dict[int, float]:
    """That run's losses."""
    found = losses(alone)
    assert list(found) == list(range(1, STEPS + 1)) and found[STEPS] < found[1] - 0.1
    return found


def assert_same(found: dict[int, float], expected: dict[int, float]) -> None:
    assert list(found) == list(expected)
    worst = max(abs(found[step] - expected[step]) for step in expected)
    assert worst < LOSS_TOLERANCE, f"losses differ by {worst}: other samples, or another order"


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_the_plain_deepspeed_command_trains_over_the_hostfile(
    stage: str, hosts: Hosts, corpus: Path, expected: dict[int, float], tmp_path: Path
) -> None:
    """With pdsh, a rank a host. What pdsh hands to the far side it reads from .deepspeed_env."""
    variables = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"],
        "GLOO_SOCKET_IFNAME": "eth0",
        "PATH": f"{BIN}:/usr/bin:/bin",
    }
    (tmp_path / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
    run = on_disk(hosts)
    launcher = [BIN / "deepspeed", "--hostfile", hosts.hostfile(), "--master_port", 29500]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            hosts.on("node0", *launcher, *command(hosts, corpus, run, f"engine.deepspeed={stage}")),
            stdout=log,
            stderr=log,
            cwd=tmp_path,
            env=os.environ | {"PWD": str(tmp_path)},
        )
        try:
            assert process.wait(hosts.limit_s) == 0, (tmp_path / "log").read_text()[-4000:]
        finally:
            hosts.clear()
    assert_same(losses(seen(hosts, run)), expected)
    written = [name for name in hosts.names if (hosts.view(name) / run.name).exists()]
    assert written == ["node0"], "only the main rank writes"


def launch(hosts: Hosts, names: list[str], script: list[str], *options: object) -> Running:
    variables = [f"--env={name}" for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")]
    return Running(hosts, "--hostfile", hosts.hostfile(names), *variables, *options, *script)


def wait_for_step(running: Running, hosts: Hosts, run: Path, step: int) -> None:
    running.wait_until(lambda: max(losses(seen(hosts, run)), default=0) >= step, hosts.limit_s)


def test_a_run_that_loses_a_rank_and_then_a_host_goes_on_by_itself_with_the_same_samples(
    hosts: Hosts, corpus: Path, expected: dict[int, float]
) -> None:
    run = on_disk(hosts)
    options = ("--restarts", 2, "--min-hosts", hosts.count - 1)
    running = launch(hosts, hosts.names, command(hosts, corpus, run), *options)
    away = hosts.names[-1]
    try:
        wait_for_step(running, hosts, run, 6)
        hosts.kill("node1", f"{SCRIPT} --local_rank=0")
        wait_for_step(running, hosts, run, 10)
        hosts.unplug(away)
        assert running.process.wait(hosts.limit_s) == 0, running.said()[-4000:]
    finally:
        hosts.plug_in(away)
    assert "rank 1 on node1 was killed (SIGKILL)" in running.said()
    assert f"{away} (rank {hosts.count - 1}) is cut off or down" in running.said()
    assert f"going on with the {hosts.count - 1} other hosts" in running.said()
    assert_same(losses(seen(hosts, run)), expected)


def test_a_run_is_stopped_and_goes_on_on_other_numbers_of_hosts_with_the_same_samples(
    hosts: Hosts, corpus: Path, expected: dict[int, float]
) -> None:
    run = on_disk(hosts)
    script = command(hosts, corpus, run)
    for names, until in ((hosts.names[: hosts.count // 2], 5), (hosts.names, 10), (hosts.names[:-1], None)):
        running = launch(hosts, names, script)
        if until is None:
            assert running.process.wait(hosts.limit_s) == 0, running.said()[-4000:]
            break
        wait_for_step(running, hosts, run, until)
        hosts.kill("node0", "mosaicbert launch", signal.SIGTERM)
        assert running.process.wait(hosts.limit_s) == EXIT_STOPPED, running.said()[-4000:]
    assert_same(losses(seen(hosts, run)), expected)
    assert {name: left for name in hosts.names if (left := hosts.leftovers(name))} == {}
