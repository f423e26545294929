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
from torch import Tensor, nn

from mosaicbert_ds.finetune.batches import Inputs, Shape, buffer_size, views
from mosaicbert_ds.finetune.models import Classifier
from mosaicbert_ds.ops.reference import IGNORED_LABEL
from mosaicbert_ds.training.optimizer import OptimizerConfig, build_optimizer
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

    With `bf16` the model holds bf16 copies of the fp32 weights, refreshed after each update by one fused
    copy, and gradients are cast once: the arithmetic of `training.engine.Bf16Compute`, without its
    launch a parameter. `rates`: the learning rate of every step, (steps,).
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
        self._names = [name for name, _ in model.named_parameters()]
        self._compute = list(model.parameters())
        self._masters = self._compute
        self._gradients: list[Tensor] = []  # fp32, of the masters; without bf16 they are used as they come
        if bf16:
            self._masters = [nn.Parameter(weight.detach().clone()) for weight in self._compute]
            self._gradients = [torch.zeros_like(master) for master in self._masters]
            for master, gradient in zip(self._masters, self._gradients, strict=True):
                master.grad = gradient
            self._model.bfloat16()
        self._optimizer = build_optimizer(self._masters, optimizer)
        self._lr = torch.zeros((), device=device)  # a tensor, so that a replay reads its present value
        self._optimizer.param_groups[0].update(lr=self._lr, capturable=device.type == "cuda")
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
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
        """One step on the buffer of `shape`. Never waits for the device and allocates nothing that stays."""
        inputs = views(self._buffers[shape], shape, self._is_regression)
        loss = loss_of(self._forward(inputs, shape), inputs.labels)
        # On this thread, whose capture it is, and not on autograd's own.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(loss, self._compute)
        if self._gradients:
            torch._foreach_copy_(self._gradients, gradients)
        else:
            for master, gradient in zip(self._masters, gradients, strict=True):
                master.grad = gradient
        self._lr.copy_(self._rates.index_select(0, self._step).squeeze())
        self._optimizer.step()
        if self._gradients:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self._compute), list[Tensor](self._masters))
        self.losses.index_copy_(0, self._step, loss.detach().view(1))
        self._step += 1

    def _forward(self, inputs: Inputs, shape: Shape) -> Tensor:
        return self._model(
            input_ids=inputs.input_ids,
            token_type_ids=inputs.token_type_ids,
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
        if not self._gradients:
            self._optimizer.zero_grad()  # gradients of the last capture go back to the pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            self._train_step(shape)
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
        moments = [self._optimizer.state[master] for master in self._masters]
        columns = {
            "weights": [master.detach() for master in self._masters],
            **{kind: [moment[kind] for moment in moments] for kind in ("exp_avg", "exp_avg_sq")},
        }
        return {
            kind: {n: v.to("cpu", copy=True) for n, v in zip(self._names, values, strict=True)}
            for kind, values in columns.items()
        }

    @torch.no_grad()
    def restore(self, state: dict[str, dict[str, Tensor]], steps_done: int) -> None:
        """Go on from what `state` gave after `steps_done` steps. Before the first step only."""
        for name, master, copy in zip(self._names, self._masters, self._compute, strict=True):
            master.copy_(state["weights"][name])
            copy.copy_(master)
            self._optimizer.state[master] = {
                "step": torch.tensor(float(steps_done), device=self._device),
                **{kind: state[kind][name].to(self._device) for kind in ("exp_avg", "exp_avg_sq")},
            }
        self.steps_done = steps_done
        self._step.fill_(steps_done)

    def finished_model(self) -> Classifier:
        """The model with its fp32 weights, on the CPU. Ends the training."""
        self._graphs.clear()
        model = self._model.float().cpu()
        with torch.no_grad():
            for parameter, master in zip(model.parameters(), self._masters, strict=True):
                parameter.copy_(master)
        return model
