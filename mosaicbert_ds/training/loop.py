"""The training loop. A step reads top to bottom in `train_step`; everything periodic stands in `fit`."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mosaicbert_ds import dist
from mosaicbert_ds.errors import TrainingError
from mosaicbert_ds.training import engine as ds
from mosaicbert_ds.training.course import Course, Step
from mosaicbert_ds.training.faults import StopRequest
from mosaicbert_ds.training.meter import Rates, Stopwatch, Window, memory
from mosaicbert_ds.training.plan import BatchPlan, Count
from mosaicbert_ds.training.progress import Progress, crosses, step_seed
from mosaicbert_ds.training.saving import Saver
from mosaicbert_ds.training.telemetry import Telemetry
from mosaicbert_ds.typed_yaml import recipe_part


@recipe_part
class EvaluationConfig:
    """Held-out loss every so many samples, on at most `max_samples` of the val split."""

    every_samples: Count = 14_336_000
    max_samples: Count = 20_000


def train_step(engine: Any, micro_batches: list[Any], lr: float, plan: BatchPlan, seed: int) -> torch.Tensor:
    """One optimizer step on a global batch, of which `micro_batches` is this rank's share.

    Returns (4,) fp32 on the device: this rank's summed loss and number of correct predictions, the
    global batch's number of masked tokens, the gradient norm. Never waits for the device.
    """
    torch.manual_seed(seed)
    ds.set_learning_rate(engine, lr)
    ds.set_accumulation(engine, len(micro_batches))
    num_masked = torch.full((), float(sum(batch.num_masked for batch in micro_batches)), device=dist.device())
    # The exact mean over the global batch: the engine divides by accumulation and averages over ranks.
    num_masked = dist.sum_over_ranks(num_masked).clamp(min=1)
    scale = len(micro_batches) * plan.world_size / num_masked
    loss_sum, num_correct = torch.zeros((2,), device=dist.device())
    for batch in micro_batches:
        sums = engine(**batch.model_inputs())
        engine.backward(sums.loss_sum * scale)
        engine.step()  # updates the weights after the last micro batch only
        dist.beat()
        loss_sum += sums.loss_sum.detach()
        num_correct += sums.num_correct
    grad_norm = torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32).to(dist.device())
    return torch.stack([loss_sum, num_correct, num_masked, grad_norm])


@torch.no_grad()
def evaluate(engine: Any, batches: Iterable[Any]) -> dict[str, float]:
    """Held-out loss (nats a masked token), perplexity and accuracy over all ranks' `batches`; nothing where
    no token is masked."""
    engine.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=dist.device())
    for batch in batches:
        dist.beat()
        sums = engine(**batch.to(dist.device()).model_inputs())
        totals += torch.stack(
            [sums.loss_sum.double(), sums.num_correct.double(), totals.new_tensor(batch.num_masked)]
        )
    engine.train()
    loss_sum, num_correct, num_masked = dist.sum_over_ranks(totals).tolist()
    if not num_masked:
        return {}
    loss = loss_sum / num_masked
    return {
        "evaluation/loss": loss,
        "evaluation/perplexity": math.exp(min(loss, 100.0)),
        "evaluation/masked_accuracy": num_correct / num_masked,
    }


def fit(
    engine: Any,
    *,
    progress: Progress,
    plan: BatchPlan,
    course: Course,
    steps: Iterator[Step],
    batches: Iterator[list[Any]],
    evaluation: EvaluationConfig,
    evaluation_batches: Callable[[], Iterable[Any]],
    unigram_entropy: float,
    saver: Saver,
    telemetry: Telemetry | None,
    log_every_steps: int,
    rates: Rates,
    stop: StopRequest,
    seed: int,
) -> bool:
    """Train from `progress` to the end of `course`, on `steps` of it and their `batches`. Returns False if
    it was asked to stop before.

    telemetry: on the main rank only. Raises TrainingError when the loss is no longer finite.
    """
    pending: list[tuple[Step, int, torch.Tensor]] = []  # of each step since the last flush
    window, clock, training = Window(), Stopwatch(progress.elapsed_s), Stopwatch(progress.training_s)
    start = dataclasses.replace(progress)
    is_first = True  # of this start: it compiles and waits for the loader's first batch, and is not timed

    for step in steps:
        # -- fetch
        waited_from_s = time.perf_counter()
        micro_batches = [batch.to(dist.device()) for batch in next(batches)]
        window.data_wait_s += time.perf_counter() - waited_from_s
        dist.beat()

        # -- forward, backward, step
        before, after = step.start, step.samples_seen
        stats = train_step(
            engine, micro_batches, step.learning_rate, plan, step_seed(seed, before, dist.rank())
        )
        progress.step, progress.samples_seen = step.number, after
        pending.append((step, sum(batch.num_tokens for batch in micro_batches), stats))
        window.steps += 1

        # -- once in a while
        is_last = step.done >= 1
        save_is_due = is_last or saver.is_due(before, after)
        evaluation_is_due = is_last or crosses(before, after, evaluation.every_samples)
        log_is_due = is_first or step.number % log_every_steps == 0 or course.wants_correction(step)
        if not (save_is_due or evaluation_is_due or log_is_due):
            continue
        timed_s = progress.training_s
        stopping = _flush(pending, window, training, progress, rates, telemetry, bool(stop))
        if is_first:
            training, progress.training_s, is_first = Stopwatch(timed_s), timed_s, False
        course.correct(step, progress.training_s)
        progress.scheduled_s = 60 * (plan.minutes or 0) * step.done
        with training.paused():
            if evaluation_is_due:
                values = evaluate(engine, evaluation_batches())
                if telemetry and not values:
                    telemetry.say("no held-out token was masked, so there is no loss; hold out more text")
                elif telemetry:
                    telemetry.scalars(step, values | {"evaluation/unigram_entropy": unigram_entropy})
                    telemetry.say(
                        f"evaluation at {after:,} samples: loss {values['evaluation/loss']:.4f} "
                        f"(unigram entropy {unigram_entropy:.4f}), "
                        f"accuracy {values['evaluation/masked_accuracy']:.3f}"
                    )
            progress.elapsed_s = clock.elapsed_s()
            progress.count_gpus(plan.world_size, start)
            if telemetry and (dollars := rates.dollars(progress.gpu_s)) is not None:
                telemetry.scalars(step, {"run/dollars": dollars, "run/hours": progress.elapsed_s / 3600})
            if save_is_due or stopping:
                if telemetry:
                    telemetry.flush()  # first: a run that goes on from this step does not write them again
                saver.save(engine, progress, before, last=is_last)
        if stopping and not is_last:
            return False
        window.restart()  # evaluation and the copy to the host are no part of the step's speed
    return True


def _flush(
    pending: list[tuple[Step, int, torch.Tensor]],
    window: Window,
    training: Stopwatch,
    progress: Progress,
    rates: Rates,
    telemetry: Telemetry | None,
    asked_to_stop: bool,
) -> bool:
    """Fetch the steps' numbers from the device, sum them over ranks, log them, empty `pending`.

    Returns whether any rank was asked to stop. The only place where training waits for the device, and
    where all ranks learn the time of the main rank's clock.
    """
    stats = torch.stack([stats for _, _, stats in pending]).double()  # (steps, 4)
    num_masked, grad_norms = stats[:, 2:].T.tolist()  # the device has done all of the steps now
    training_s = training.elapsed_s() if dist.is_main() else 0.0
    tokens = torch.tensor([tokens for _, tokens, _ in pending], device=stats.device)
    others = torch.tensor([training_s, asked_to_stop], dtype=torch.float64, device=stats.device)
    sums = dist.sum_over_ranks(torch.cat([stats[:, 0], stats[:, 1], tokens, others]))  # (3 x steps + 2,)
    loss_sums, num_correct, tokens_seen = sums[:-2].view(3, -1).tolist()
    progress.training_s, stopping = sums[-2:].tolist()
    for index, (step, _, _) in enumerate(pending):
        loss = loss_sums[index] / num_masked[index]
        if not math.isfinite(loss) or not math.isfinite(grad_norms[index]):
            raise TrainingError(
                f"step {step.number}: loss {loss}, gradient norm "
                f"{grad_norms[index]}; the run stops here and its last checkpoint is whole; "
                "lower optimizer.peak_lr or look at the data"
            )
        if telemetry:
            values = {
                "train/loss": loss,
                "train/masked_accuracy": num_correct[index] / num_masked[index],
                "train/grad_norm": grad_norms[index],
                "schedule/learning_rate": step.learning_rate,
                "schedule/mask_rate": step.mask_rate,
                "schedule/global_batch": step.size,
            }
            if index == len(pending) - 1:
                samples = sum(step.size for step, _, _ in pending)
                values |= window.speed(rates, samples, int(sum(tokens_seen))) | memory()
                telemetry.scalars(step, values)
                telemetry.show_progress(step, values)
            else:
                telemetry.scalars(step, values)
    progress.tokens_seen += int(sum(tokens_seen))
    pending.clear()
    return bool(stopping > 0)
