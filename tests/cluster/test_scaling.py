"""The communication model of `mosaicbert estimate` against real steps on 1 to 8 hosts on slow cables."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import REPO, Hosts
from test_training_over_hosts import launch, read_metrics

from mosaicbert_ds.cluster.network import Link, Network, exposed_s, transfers_of_a_step
from mosaicbert_ds.config import load_recipe
from mosaicbert_ds.model import count_parameters

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
MBIT_PER_S = 20.0
# TCP carries 1,448 bytes in a frame of 1,514; a hop is what gloo on a busy core needs to pass a piece on.
CABLE = Link(bytes_per_s=MBIT_PER_S * 1e6 / 8 * 1448 / 1514, latency_s=1e-3)
CORES = 2  # that all hosts share here
BATCH = 8  # strong: of all hosts; weak: 6 a host
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts"), 8) as hosts:
        yield hosts


def measure(
    hosts: Hosts, corpus: Path, count: int, batch: int, stage: int, steps: int
) -> tuple[float, float]:
    """Seconds of a step, the median of many, and bytes that a host sends in one."""
    run = hosts.out / f"{count}-{batch}-{stage}-{steps}"
    values = {
        **{"data.max_length": 32, "model.vocab_size": 512, "batch.global_batch_size": batch},
        **{"batch.micro_batch_size": batch // count, "duration.samples": steps * batch},
        **{"evaluation.max_samples": 8, "checkpoint.every_samples": steps * batch},
        **{"evaluation.every_samples": steps * batch, "telemetry.log_every_steps": 1},
        "engine.deepspeed": f"zero{stage}",
    }
    arguments = ["--recipe", "tiny", "--data", corpus, "--out", run]
    script = [str(word) for word in (REPO / "mosaicbert_ds" / "pretrain.py", *arguments)]
    names = hosts.names[:count]
    running = launch(hosts, names, [*script, *(f"{key}={value}" for key, value in values.items())])
    seen = hosts.view("node0") / run.name
    sent = {}

    def reached(step: int) -> bool:
        assert running.process.poll() in (None, 0), running.said()[-3000:]
        return max(read_metrics(seen, "speed/step_time_s"), default=0) >= step

    for step in (3, steps - 2):
        running.wait_until(lambda step=step: reached(step), 400)
        done = max(read_metrics(seen, "speed/step_time_s"))
        sent[done] = hosts.sent_bytes(names[-1])
    assert running.process.wait(400) == 0, running.said()[-3000:]
    times = read_metrics(seen, "speed/step_time_s")
    (early, before), (late, after) = sent.items()
    return statistics.median(times[step] for step in range(3, steps)), (after - before) / (late - early)


def predict(count: int, stage: int, compute_s: float) -> tuple[float, float]:
    """Seconds of a step, and bytes that a host sends in one."""
    parameters = count_parameters(load_recipe("tiny", ["model.vocab_size=512"]).model)
    network = Network(nodes=count, gpus_per_node=1, inside=CABLE, between=CABLE, tree=False)
    transfers = transfers_of_a_step(parameters, stage, 1, bf16=False, bucket=200_000_000, overlap=False)
    passes = sum(
        (2 if one.collective == "all-reduce" else 1) * one.num_bytes * one.times for one in transfers
    )
    return compute_s + exposed_s(transfers, network, compute_s), passes * (count - 1) / count


def test_steps_on_slow_cables_take_as_long_as_predicted(eight: Hosts, corpus: Path) -> None:
    eight.limit(MBIT_PER_S)
    alone_s, _ = measure(eight, corpus, 1, BATCH, 1, steps=200)
    lines, errors = [], []
    for scaling in ("strong", "weak"):
        for count in (2, 4, 8):
            batch = BATCH if scaling == "strong" else 6 * count
            compute_s = alone_s * batch / BATCH / min(count, CORES)
            predicted_s, _ = predict(count, 1, compute_s)
            measured_s, sent = measure(eight, corpus, count, batch, 1, steps=12)
            error = predicted_s / measured_s - 1
            errors.append(abs(error))
            lines.append(
                f"| {scaling} | {count} | {batch} | {predicted_s:.3f} | {measured_s:.3f} | {error:+.1%} "
                f"| {sent / 1e6:.2f} |"
            )
            print(lines[-1], flush=True)
    print("\n| scaling | hosts | batch | predicted s | measured s | error | MB sent a host and step |")
    print("|---|---|---|---|---|---|---|\n" + "\n".join(lines))
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_hosts_send_the_predicted_bytes(stage: int, eight: Hosts, corpus: Path) -> None:
    eight.limit(0)
    _, sent = measure(eight, corpus, 2, BATCH, stage, steps=100)
    _, predicted = predict(2, stage, 0.0)
    print(f"stage {stage}: predicted {predicted / 1e6:.2f} MB, sent {sent / 1e6:.2f} MB")
    assert sent == pytest.approx(predicted, rel=TOLERANCE)
