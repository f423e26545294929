"""Where a run's numbers go: TensorBoard, `metrics.jsonl`, and the terminal. Main rank only.

The x axis of TensorBoard is samples seen, so that runs of different batch sizes lie over each other.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from mosaicbert_ds.errors import TrainingError
from mosaicbert_ds.training.course import Step
from mosaicbert_ds.training.plan import BatchPlan, Count
from mosaicbert_ds.training.progress import Progress
from mosaicbert_ds.typed_yaml import recipe_part

# What the Custom Scalars page shows, in this order. (The Time Series page sorts tags by their first word
# and opens the first two groups: "evaluation" is one of them.)
_DASHBOARD = {
    "Learning": {
        "loss: training, evaluation, unigram entropy": [
            "Multiline",
            ["train/loss", "evaluation/loss", "evaluation/unigram_entropy"],
        ],
        "masked accuracy": ["Multiline", ["train/masked_accuracy", "evaluation/masked_accuracy"]],
        "evaluation perplexity": ["Multiline", ["evaluation/perplexity"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "Speed and cost": {
        "samples/s": ["Multiline", ["speed/samples_per_s"]],
        "tokens/s": ["Multiline", ["speed/tokens_per_s_real", "speed/tokens_per_s_padded"]],
        "MFU": ["Multiline", ["speed/mfu_real", "speed/mfu_padded"]],
        "dollars so far": ["Multiline", ["run/dollars"]],
        "waiting for data, share of time": ["Multiline", ["speed/data_wait_share"]],
    },
    "Schedule": {
        "learning rate": ["Multiline", ["schedule/learning_rate"]],
        "mask rate": ["Multiline", ["schedule/mask_rate"]],
        "global batch": ["Multiline", ["schedule/global_batch"]],
        "padding share": ["Multiline", ["speed/padding_share"]],
        "memory, GiB": ["Multiline", [r"memory/.*"]],
    },
}


@recipe_part
class TelemetryConfig:
    """`usd_per_gpu_hour`: price of one rank for one hour; null leaves dollars out."""

    log_every_steps: Count = 10
    usd_per_gpu_hour: Annotated[float, Field(ge=0)] | None = 2.50


class Telemetry:
    """Writes scalars and tells the person at the terminal. `progress`: where it goes on from."""

    def __init__(self, folder: Path, plan: BatchPlan, recipe_text: str, progress: Progress) -> None:
        self._total_steps, self._minutes = plan.total_steps, plan.minutes
        self._done_before = plan.part_done(progress)
        self._started_s = time.perf_counter()
        resumed_at = progress.samples_seen
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        earlier = None if resumed_at else _keep_aside(folder / "metrics.jsonl")
        self._lines = _open_after(folder / "metrics.jsonl", resumed_at)
        # purge_step hides what an interrupted run wrote beyond the step that this one goes on from.
        self._board = SummaryWriter(folder / "tensorboard", purge_step=resumed_at + 1)
        self._board.add_custom_scalars(_DASHBOARD)
        self._board.add_text(
            "recipe", "\n".join("    " + line for line in recipe_text.splitlines()), resumed_at
        )
        self._bar = tqdm(
            total=plan.total_steps,
            initial=progress.step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        board = f"tensorboard --logdir {folder / 'tensorboard'}"
        if earlier:
            self.say(f"an earlier start left no checkpoint; its metrics are in {earlier}")
        self.say(f"to watch: {board}, then open http://localhost:6006/#custom_scalars")

    def scalars(self, step: Step, values: dict[str, float]) -> None:
        """Write `values` at the end of `step`, to TensorBoard and metrics.jsonl."""
        place = {"step": step.number, "samples_seen": step.samples_seen}
        with self._written():
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step.samples_seen)
            self._lines.write(json.dumps(place | values) + "\n")

    def show_progress(self, step: Step, values: dict[str, float]) -> None:
        """One look at the run: the bar's end, or a plain line where there is no terminal."""
        facts = (
            f"loss {values['train/loss']:.4f}  accuracy {values['train/masked_accuracy']:.3f}  "
            f"lr {values['schedule/learning_rate']:.2e}  {values['speed/samples_per_s']:,.0f} samples/s"
        )
        if "speed/mfu_real" in values:
            facts += f"  MFU {values['speed/mfu_real']:.1%}"
        self._bar.set_postfix_str(facts, refresh=False)
        self._bar.update(step.number - self._bar.n)
        if self._bar.disable:
            of = f"/{self._total_steps:,}" if self._total_steps else f" ({step.done:.1%})"
            self.say(f"step {step.number:,}{of}  {facts}  ETA {_clock(self._remaining_s(step.done))}")
        self.flush()

    def say(self, line: str) -> None:
        """A line for people; the progress bar stays below it."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def flush(self) -> None:
        with self._written():
            self._lines.flush()
            self._board.flush()

    def close(self) -> None:
        self._bar.close()
        with self._written():
            self._lines.close()
            self._board.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._folder} cannot be written: {error.strerror or error}; make room, then start the "
                "same command again: it goes on from the newest whole step"
            ) from None

    def _remaining_s(self, done: float) -> float:
        if self._minutes is not None:
            return 60 * self._minutes * (1 - done)
        spent_s = time.perf_counter() - self._started_s
        return spent_s * (1 - done) / max(done - self._done_before, 1e-9)


def _keep_aside(path: Path) -> Path | None:
    """The metrics of a start that left no checkpoint, out of the way of one that begins again."""
    if not path.exists() or not path.stat().st_size:
        return None
    names = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(name for name in names if not name.exists()))


def _open_after(path: Path, samples_seen: int) -> Any:
    """Open metrics.jsonl for appending, without the lines past `samples_seen`: an interrupted run
    wrote them after its last checkpoint, and they will be written again."""
    if path.exists():
        # A power cut may leave anything at the end, also what is no text.
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = path.with_name(path.name + ".kept")
        kept.write_text(
            "".join(line + "\n" for line in lines if _is_before(line, samples_seen)), encoding="utf-8"
        )
        kept.replace(path)  # whole or not at all: the run may be killed here too
    return path.open("a", encoding="utf-8")


def _is_before(line: str, samples_seen: int) -> bool:
    try:
        return json.loads(line)["samples_seen"] <= samples_seen
    except (json.JSONDecodeError, KeyError, TypeError):  # the half line that a killed run wrote last
        return False


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
