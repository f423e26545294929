"""Training one task: the step, top to bottom, and its capture in CUDA graphs.

On a GPU a step of these small batches is bound by its several hundred launches, not by arithmetic. So a
step does everything on the device, from static buffers: forward, backward, AdamW, the learning rate, the
record of its loss. The first batch of a shape runs as it is, which compiles and warms up all it needs; the
second captures the step in a graph; from then on it is one copy and one replay.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosaicbert_ds import ops
from mosaicbert_ds.finetune.batches import Inputs, Shape, buffer_size, views
from mosaicbert_ds.finetune.models import Classifier
from mosaicbert_ds.ops.reference import IGNORED_LABEL
from mosaicbert_ds.training.optimizer import OptimizerConfig
from mosaicbert_ds.training.progress import step_seed


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean loss over the sequences that have a label: cross entropy, or squared error of a regression.

    logits: (sequences, outputs); labels: (sequences,) int32 with IGNORED_LABEL, or float32 with NaN.
    """
    if labels.dtype == torch.float32:
        real = ~labels.isnan()
        errors = (logits.float().squeeze(-1) - labels).masked_fill(~real, 0.0)
        return errors.square().sum() / real.sum()
    return F.cross_entropy(logits.float(), labels.long(), ignore_index=IGNORED_LABEL)


class Trainer:
    """A model, its fp32 weights and its optimizer; `run` takes steps, `logits` evaluates.

    With `bf16` the model holds bf16 copies of the fp32 weights, and `ops.adamw` reads bf16 gradients and
    writes both: the arithmetic of `training.engine.Bf16Compute`, without its launch a parameter. `rates`: the
    learning rate of every step, (steps,).
    """

    def __init__(
        self,
        model: Any,  # a `models.Classifier`; transformers types neither its call nor its conversions
        optimizer: OptimizerConfig,
        rates: Sequence[float],
        *,
        bf16: bool,
        is_regression: bool,
        seed: int,
        device: torch.device,
    ) -> None:
        self._model = model.to(device)
        self._device, self._is_regression, self._seed = device, is_regression, seed
        self._knows_pairs = model.config.type_vocab_size > 1  # else both texts are of the only type
        self._names = [name for name, _ in model.named_parameters()]
        self._compute = list(model.parameters())
        masters = self._compute
        if bf16:
            masters = [weight.detach().clone() for weight in self._compute]
            self._model.bfloat16()
        hyper = (optimizer.betas, optimizer.eps, optimizer.adamw_weight_decay)
        self._optimizer = ops.adamw(self._compute, masters, rates, *hyper)
        self.losses = torch.zeros(len(rates), device=device)  # of each step; reading it waits for the device
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self.steps_done = 0
        self._buffers: dict[Shape, Tensor] = {}
        # Never dropped one by one: a graph's end may free library workspaces that its siblings still use
        # (pytorch/pytorch#193402).
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        if device.type == "cuda":
            self._generator = torch.cuda.default_generators[torch.cuda.current_device()]
            self._stream = torch.cuda.Stream()  # everything runs on it: a default stream cannot be captured
            self._stream.wait_stream(torch.cuda.current_stream())
            torch.cuda.set_stream(self._stream)
            self._pool = torch.cuda.graph_pool_handle()
        else:
            self._generator = torch.default_generator

    def _train_step(self, shape: Shape) -> None:
        """One step on the buffer of `shape`. Captured, it waits for nothing and owns no memory of its own."""
        inputs = views(self._buffers[shape], shape, self._is_regression)
        loss = loss_of(self._forward(inputs, shape), inputs.labels)
        # On this thread, whose capture it is, and not on autograd's own.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(loss, self._compute)
        self._optimizer.update(gradients, self._step)
        self.losses.index_copy_(0, self._step, loss.detach().view(1))
        self._step += 1

    def _forward(self, inputs: Inputs, shape: Shape) -> Tensor:
        return self._model(
            input_ids=inputs.input_ids,
            token_type_ids=inputs.token_type_ids if self._knows_pairs else None,
            cu_seqlens=inputs.cu_seqlens,
            max_seqlen=shape.longest,
        )

    def run(self, packed: Tensor, shapes: Sequence[Shape]) -> None:
        """A step on each of the buffers in `packed` (see `batches.pack`), which is on the CPU."""
        self._model.train()
        packed = self._to_device(packed)
        start = 0
        for shape in shapes:
            end = start + buffer_size(shape)
            # Seeded by the step and not by what came before: a job that goes on drops the same.
            self._generator.manual_seed(step_seed(self._seed, self.steps_done, rank=0))
            seen = shape in self._buffers
            if not seen:
                self._buffers[shape] = torch.empty(end - start, dtype=torch.int32, device=self._device)
            self._buffers[shape].copy_(packed[start:end])
            if self._device.type == "cpu" or not seen:
                self._train_step(shape)
            else:
                if shape not in self._graphs:
                    self._graphs[shape] = self._capture(shape)
                self._graphs[shape].replay()
            self.steps_done += 1
            start = end

    def _capture(self, shape: Shape) -> torch.cuda.CUDAGraph:
        """The step of `shape` as a graph. Capturing computes nothing."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._train_step(shape)
        self._optimizer.upload()
        return graph

    @torch.no_grad()
    def logits(self, packed: Tensor, shape: Shape, num_rows: int) -> Tensor:
        """(num_rows, outputs) fp32 on the device: the model's answers to one buffer, without dropout."""
        self._model.eval()
        inputs = views(self._to_device(packed), shape, self._is_regression)
        return self._forward(inputs, shape)[:num_rows].float()

    def _to_device(self, packed: Tensor) -> Tensor:
        return (
            packed.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else packed
        )

    # ---- what survives a restart

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Weights and moments by parameter name, fp32 on the CPU, as `training.checkpoint` keeps them."""
        return {
            kind: {n: v.detach().to("cpu", copy=True) for n, v in zip(self._names, values, strict=True)}
            for kind, values in self._columns().items()
        }

    @torch.no_grad()
    def restore(self, state: dict[str, dict[str, Tensor]], steps_done: int) -> None:
        """Go on from what `state` gave after `steps_done` steps. Before the first step only."""
        for kind, values in self._columns().items():
            for name, value in zip(self._names, values, strict=True):
                value.copy_(state[kind][name])
        for weight, master in zip(self._optimizer.weights, self._optimizer.masters, strict=True):
            weight.copy_(master)
        self.steps_done = steps_done
        self._step.fill_(steps_done)

    def _columns(self) -> dict[str, list[Tensor]]:
        """What `state` holds, where it lives."""
        optimizer = self._optimizer
        return {
            "weights": optimizer.masters, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq
        }  # fmt: skip

    def finished_model(self) -> Classifier:
        """The model with its fp32 weights, on the CPU. Ends the training."""
        self._graphs.clear()
        model = self._model.float().cpu()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), self._optimizer.masters, strict=True):
                parameter.copy_(master)
        return model
