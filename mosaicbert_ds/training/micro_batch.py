"""Forward and backward of a micro batch, with gradients summed over micro batches in fp32.

At ZeRO stages 0 and 1 every rank holds the summed gradient of all parameters in fp32. `MicroBatch` stands
between DeepSpeed's engine and the model there, and adds to those sums itself: a weight's matrix product
writes into its sum (`ops/main_grad.py`), everything else is added after the backward pass. DeepSpeed alone
would round each gradient to bf16, keep it, cast it and add it, three passes over all parameters.

On a GPU the two passes are recorded as CUDA graphs, one pair for each shape of batch, and replayed: a layer
is some forty kernels, and launching them one by one is what bounds a small micro batch. The loader rounds
shapes up to a few sizes (`data/loader.py`). A shape runs once as it is before it is recorded, so that
everything which is compiled or loaded at its first call has been. Both runs give the same bits.

ZeRO stages 2 and 3 work on `.grad` inside the backward pass and see the model itself.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# More shapes than this run unrecorded: a graph takes some MB of the GPU's memory and about 0.5 s.
MAX_RECORDINGS = 64


class _Passes(NamedTuple):
    """A recorded micro batch: its input tensors, its results, and the two graphs that lie between."""

    inputs: dict[str, Tensor]
    sums: Any  # what the model returns
    d_loss_sum: Tensor
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class _BackwardLater(torch.autograd.Function):
    """Hands `loss_sum` on; its backward is `micro_batch.backward`. `anchor` makes autograd call it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss_sum: Tensor, micro_batch: "MicroBatch") -> Tensor:  # type: ignore[override]
        ctx.micro_batch = micro_batch
        return loss_sum.clone()

    @staticmethod
    def backward(ctx: Any, d_loss_sum: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.micro_batch.backward(d_loss_sum)
        return None, None, None


class MicroBatch(nn.Module):
    """`module` behind a forward whose backward adds to `main_grads`, the sums that `sum_into` names."""

    def __init__(self, module: nn.Module, record: bool) -> None:
        super().__init__()
        self.module = module
        self.record = record
        self._parameters_in_order = [p for p in module.parameters() if p.requires_grad]
        self._main_grads: list[Tensor] = []
        self._anchor = torch.zeros((), requires_grad=True)
        self._recorded: dict[tuple[Any, ...], _Passes | None] = {}  # None: ran once, is not recorded yet
        self._pool = torch.cuda.MemPool() if record else None
        self._pending: Any = None  # between forward and backward: _Passes, or the loss with its graph

    def sum_into(self, main_grads: list[Tensor]) -> None:
        """Add gradients to these fp32 tensors, one a parameter, of its shape."""
        self._main_grads = main_grads

    def forward(self, **inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.module(**inputs)
        key = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in inputs.values())
        if self.record and key not in self._recorded and len(self._recorded) < MAX_RECORDINGS:
            self._recorded[key] = None
            with torch.cuda.use_mem_pool(self._pool):
                sums = self._run(inputs)
        elif key in self._recorded:
            sums = self._replay(key, inputs)
        else:
            sums = self._run(inputs)
        return sums._replace(loss_sum=_BackwardLater.apply(self._anchor, sums.loss_sum.detach(), self))

    def backward(self, d_loss_sum: Tensor) -> None:
        pending, self._pending = self._pending, None
        if isinstance(pending, _Passes):
            pending.d_loss_sum.copy_(d_loss_sum)
            pending.backward.replay()
        elif self.record:
            with torch.cuda.use_mem_pool(self._pool):
                self._add_gradients(pending, d_loss_sum)
        else:
            self._add_gradients(pending, d_loss_sum)

    def _run(self, inputs: dict[str, Any]) -> Any:
        sums = self.module(**inputs)
        self._pending = sums.loss_sum
        return sums

    def _add_gradients(self, loss_sum: Tensor, d_loss_sum: Tensor) -> None:
        # On this thread: memory pools and recordings belong to the thread that opened them.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(
                loss_sum, self._parameters_in_order, d_loss_sum, allow_unused=True
            )
        for main_grad, gradient in zip(self._main_grads, gradients, strict=True):
            if gradient is not None:
                main_grad.add_(gradient)

    def _replay(self, key: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        passes = self._recorded[key]
        if passes is None:
            passes = self._recorded[key] = self._recording(inputs)
        for name, tensor in passes.inputs.items():
            tensor.copy_(inputs[name])
        passes.forward.replay()
        self._pending = passes
        return passes.sums

    def _recording(self, inputs: dict[str, Any]) -> _Passes:
        assert self._pool is not None
        tensors = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile.
        arguments: dict[str, Any] = {"pool": self._pool.id, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(forward, **arguments):
            sums = self.module(**{**inputs, **tensors})
        d_loss_sum = torch.zeros_like(sums.loss_sum)
        with torch.cuda.graph(backward, **arguments):
            self._add_gradients(sums.loss_sum, d_loss_sum)
        sums = sums._replace(loss_sum=sums.loss_sum.detach())  # lets go of the activations
        return _Passes(tensors, sums, d_loss_sum, forward, backward)
