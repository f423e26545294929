"""Forward and backward of a micro batch, with gradients summed over micro batches in fp32.

At ZeRO stages 0 and 1 every rank holds the summed gradient of all parameters in fp32. `MicroBatch` stands
between DeepSpeed's engine and the model there, and adds to those sums itself: the fused operations while they
run (`ops/main_grad.py`), everything else after the backward pass. DeepSpeed alone would zero, fill, cast and
add a second set of gradients, parameter by parameter.

On a GPU the two passes are recorded as CUDA graphs, one pair for each shape of batch, and replayed: a layer
is some forty kernels, and launching them one by one is what bounds a small micro batch. The loader rounds
shapes up to a few sizes (`data/loader.py`). The first micro batch of all runs as it is, so that kernels are
compiled before anything is recorded. Both ways give the same bits.

ZeRO stages 2 and 3 work on `.grad` inside the backward pass and see the model itself.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

# More shapes than this run unrecorded: a graph takes some MB of the GPU's memory and about 0.5 s.
MAX_RECORDINGS = 64


class _Unrecorded(NamedTuple):
    """A micro batch between its two passes: what the backward pass starts from, and ends at."""

    loss_sum: Tensor
    leaves: dict[str, Tensor]  # the parameters by name


class _Recorded(NamedTuple):
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
        self.sum_into({}, in_kernels=False)
        self._anchor = torch.zeros((), requires_grad=True)
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._warm = False
        self._pool = torch.cuda.graph_pool_handle() if record else None
        self._pending: _Recorded | _Unrecorded | None = None  # between forward and backward

    def sum_into(self, main_grads: dict[str, Tensor], in_kernels: bool) -> None:
        """Add gradients to these fp32 tensors, by the names in `module`, of the parameters' shapes.

        in_kernels: the model computes with the parameters themselves, so an operation may add to their sums.
        """
        self._main_grads, self._in_kernels = main_grads, in_kernels

    def forward(self, **inputs: Any) -> Any:
        if not (self.training and torch.is_grad_enabled()):
            return self.module(**inputs)
        key = tuple(tuple(v.shape) if isinstance(v, Tensor) else v for v in inputs.values())
        if self.record and self._warm and key not in self._recorded and len(self._recorded) < MAX_RECORDINGS:
            self._recorded[key] = self._recording(inputs)
        if key in self._recorded:
            sums = self._replay(self._recorded[key], inputs)
        else:
            sums, self._pending = self._run(inputs)
            self._warm = True
        return sums._replace(loss_sum=_BackwardLater.apply(self._anchor, sums.loss_sum.detach(), self))

    def backward(self, d_loss_sum: Tensor) -> None:
        pending, self._pending = self._pending, None
        if isinstance(pending, _Recorded):
            pending.d_loss_sum.copy_(d_loss_sum)
            pending.backward.replay()
        elif isinstance(pending, _Unrecorded):
            self._add_gradients(pending, d_loss_sum)

    def _run(self, inputs: dict[str, Any]) -> tuple[Any, _Unrecorded]:
        """The forward pass on leaves that alias the parameters.

        The parameters' own nodes in autograd's graph belong to the stream that saw them first, and carry
        DeepSpeed's hooks.
        """
        leaves = {name: p.detach().requires_grad_() for name, p in self.module.named_parameters()}
        if self._in_kernels:
            for name, leaf in leaves.items():
                leaf.main_grad = self._main_grads[name]  # type: ignore[attr-defined]
        sums = functional_call(self.module, leaves, kwargs=inputs)
        return sums, _Unrecorded(sums.loss_sum, leaves)

    def _add_gradients(self, pending: _Unrecorded, d_loss_sum: Tensor) -> None:
        # On this thread, which is the one that records.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(
                pending.loss_sum, list(pending.leaves.values()), d_loss_sum, allow_unused=True
            )
        for name, gradient in zip(pending.leaves, gradients, strict=True):
            if gradient is not None:
                self._main_grads[name].add_(gradient)

    def _replay(self, passes: _Recorded, inputs: dict[str, Any]) -> Any:
        for name, tensor in passes.inputs.items():
            tensor.copy_(inputs[name])
        passes.forward.replay()
        self._pending = passes
        return passes.sums

    def _recording(self, inputs: dict[str, Any]) -> _Recorded:
        tensors = {name: value.clone() for name, value in inputs.items() if isinstance(value, Tensor)}
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: the loader's thread may pin memory meanwhile.
        arguments: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(forward, **arguments):
            sums, pending = self._run({**inputs, **tensors})
        d_loss_sum = torch.zeros_like(sums.loss_sum)
        with torch.cuda.graph(backward, **arguments):
            self._add_gradients(pending, d_loss_sum)
        sums = sums._replace(loss_sum=sums.loss_sum.detach())
        return _Recorded(tensors, sums, d_loss_sum, forward, backward)
