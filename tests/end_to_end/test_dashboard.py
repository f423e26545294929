"""TensorBoard, opened in a real browser, shows the dashboard; and the run's numbers survive restarts."""

import contextlib
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mosaicbert_ds.errors import TrainingError
from mosaicbert_ds.training.course import Course, Schedules
from mosaicbert_ds.training.optimizer import OptimizerConfig, ScheduleConfig
from mosaicbert_ds.training.plan import BatchPlan
from mosaicbert_ds.training.progress import Progress
from mosaicbert_ds.training.telemetry import _DASHBOARD, Telemetry

PLAN = BatchPlan(
    global_batch_size=32, micro_batch_size=16, gradient_accumulation_steps=2, world_size=1, total_samples=3200
)
NO_BROWSER = "MOSAICBERT_TEST_WITHOUT_BROWSER"


def values_at(step: int) -> dict[str, float]:
    """What the loop writes: see `loop._flush`, `Window.speed`, `meter.memory`."""
    done = step / PLAN.total_steps
    values = {
        "train/loss": 3 + 5 * math.exp(-4 * done),
        "train/masked_accuracy": 0.4 * done,
        "train/grad_norm": 1 + 0.2 * math.sin(step),
        "schedule/learning_rate": 1e-3 * (1 - done),
        "schedule/mask_rate": 0.3 - 0.15 * done,
        "schedule/global_batch": 32.0,
    }
    if step % 10 == 0:
        values |= {
            "speed/samples_per_s": 1000.0 + step,
            "speed/tokens_per_s_real": 1e5 + step,
            "speed/tokens_per_s_padded": 1.2e5 + step,
            "speed/mfu_real": 0.3 + done / 100,
            "speed/mfu_padded": 0.35 + done / 100,
            "speed/step_time_s": 0.1,
            "speed/padding_share": 0.1 + done / 100,
            "speed/data_wait_share": 0.01 * done,
            "memory/host_peak_gib": 1.5 + done,
            "run/dollars": done,
            "run/hours": done / 2,
        }
    if step % 25 == 0:
        values |= {
            "evaluation/loss": 3.2 + 5 * math.exp(-4 * done),
            "evaluation/perplexity": 80 - 50 * done,
            "evaluation/masked_accuracy": 0.38 * done,
            "evaluation/unigram_entropy": 6.0,
        }
    return values


def write(run: Path, steps: range) -> None:
    """The numbers of `steps`, of a run that goes on where they begin."""
    size = PLAN.global_batch_size
    schedules = Schedules(
        optimizer=OptimizerConfig(), schedule=ScheduleConfig(), mask_rate_at=lambda done: 0.3
    )
    progress = Progress(step=steps[0] - 1, samples_seen=(steps[0] - 1) * size)
    telemetry = Telemetry(run, PLAN, "seed: 17\nmodel:\n  hidden_size: 128\n", progress)
    for step in itertools.islice(Course(PLAN, schedules, progress), len(steps)):
        telemetry.scalars(step, values_at(step.number))
    telemetry.close()


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    program = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    server = subprocess.Popen(
        [*program, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end_s = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags", timeout=5) as answer:
                    if b"train/loss" in answer.read():
                        break
            except OSError:
                pass
            assert server.poll() is None, "TensorBoard has ended"
            assert time.monotonic() < end_s, "TensorBoard does not answer"
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


# Title -> number of lines drawn. The page is made of nested web components, whose content only a walk
# through their shadows finds; a line is drawn where its path has a length.
CHARTS = """
(() => {
  const children = (node) => [...(node.shadowRoot ? node.shadowRoot.children : []), ...node.children];
  const below = (node) => children(node).flatMap((child) => [child, ...below(child)]);
  const cards = below(document).filter((node) => node.localName === "tf-custom-scalar-multi-line-chart-card");
  return Object.fromEntries(cards.map((card) => [
    below(card).find((node) => node.localName === "tf-card-heading").displayName,
    below(card).filter((node) => node.matches("path.line") && node.getTotalLength() > 50).length,
  ]));
})()
"""


@pytest.fixture
def chromium() -> str:
    program = find_chromium()
    if program is None:
        if os.environ.get(NO_BROWSER) == "1":
            pytest.skip(f"no Chromium, and {NO_BROWSER}=1 says that this is meant")
        pytest.fail(
            "this test needs Chromium: apt-get install --no-install-recommends chromium; "
            f"or set {NO_BROWSER}=1 to go without it"
        )
    return program


def test_tensorboard_shows_every_chart_of_the_dashboard(chromium: str, tmp_path: Path) -> None:
    write(tmp_path / "run", range(1, PLAN.total_steps + 1))
    expected = {title: len(tags) for charts in _DASHBOARD.values() for title, (_, tags) in charts.items()}
    with tensorboard(tmp_path / "run" / "tensorboard") as address, Browser(chromium, tmp_path / "p") as page:
        page.open(f"{address}/?darkMode=false#custom_scalars")
        page.wait_until(f"Object.values({CHARTS}).filter((lines) => lines).length >= {len(expected)}", 60)
        found = page.evaluate(CHARTS)
        page.screenshot(tmp_path / "dashboard.png")
    assert list(found) == list(expected), "the titles, in the order of the layout"
    # Each line is drawn smoothed, over a pale copy of itself as it is.
    assert {title: lines // 2 for title, lines in found.items()} == expected
    assert next(iter(found)).startswith("loss")


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")  # the buffer takes the line, the disk does not
    monkeypatch.setattr("mosaicbert_ds.training.telemetry._open_after", lambda *_: full.open("a"))
    with pytest.raises(TrainingError, match=r"run cannot be written: No space left on device; make room"):
        write(tmp_path / "run", range(1, 3))


def test_the_layout_shows_what_the_loop_writes() -> None:
    """Every tag of the layout is written, and each that is written stands in the layout or is named here."""
    patterns = [tag for charts in _DASHBOARD.values() for _, tags in charts.values() for tag in tags]
    written = set(values_at(PLAN.total_steps))
    for pattern in patterns:
        assert any(re.fullmatch(pattern, tag) for tag in written), pattern
    left_out = {tag for tag in written if not any(re.fullmatch(pattern, tag) for pattern in patterns)}
    assert left_out == {"speed/step_time_s", "run/hours"}


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("end", [b"", b'{"step": 71, "samples_', b"\0" * 100, b"\xff\xfe\x80 \n5\n[]\n{}\n"])
def test_a_resumed_run_goes_on_where_its_checkpoint_was(end: bytes, tmp_path: Path) -> None:
    """Killed at step 70, its last checkpoint at step 50: what it wrote since stands there once."""
    write(tmp_path, range(1, 71))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(end)
    write(tmp_path, range(51, 101))
    assert lines_of(tmp_path) == [
        {"step": step, "samples_seen": 32 * step, **values_at(step)} for step in range(1, 101)
    ]


@pytest.mark.parametrize("checkpoint", [0, 50])
def test_tensorboard_shows_a_resumed_run_as_one_curve(checkpoint: int, tmp_path: Path) -> None:
    """Also that of a run that was killed before its first checkpoint, and started afresh."""
    write(tmp_path, range(1, 71))
    time.sleep(1.1)  # a file of events is named by the second and read in the order of the names
    write(tmp_path, range(checkpoint + 1, 101))
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    points = board.Scalars("train/loss")
    assert [point.step for point in points] == [32 * step for step in range(1, 101)]
    assert [point.value for point in points] == pytest.approx(
        [values_at(s)["train/loss"] for s in range(1, 101)]
    )
