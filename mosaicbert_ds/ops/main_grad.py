"""Gradients straight into fp32 sums.

A weight with an attribute `main_grad`, an fp32 tensor of its shape, gets its gradient added there and none
in `.grad`: of a matrix inside the product itself, unrounded, of vectors many at once. Whoever sets the
attribute owns the tensor and zeroes it between steps (`training/micro_batch.py`). Of one operation's weights
all have it or none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def main_grads_of(weights: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The weights' sums, None where they have none."""
    if not hasattr(weights[0], "main_grad"):
        return None
    return tuple(weight.main_grad for weight in weights)  # type: ignore[attr-defined]


def product(main_grad: Tensor | None, d_out: Tensor, x: Tensor) -> Tensor | None:
    """d_out^T x for d_out (rows, out), x (rows, in): returned, or added to `main_grad` (out, in) instead."""
    if main_grad is None:
        return d_out.mT @ x
    if d_out.dtype == torch.float32:
        main_grad.addmm_(d_out.mT, x)
    else:
        torch.addmm(main_grad, d_out.mT, x, out_dtype=torch.float32, out=main_grad)
    return None


def settle(
    gradients: Sequence[Tensor | None], main_grads: Sequence[Tensor] | None, weights: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What a backward returns: nothing after adding to the sums, or the gradients in the weights' dtype.

    A gradient of None is in its sum already.
    """
    if main_grads is None:
        return tuple(None if g is None else g.to(w.dtype) for g, w in zip(gradients, weights, strict=True))
    pairs = [(total, g) for total, g in zip(main_grads, gradients, strict=True) if g is not None]
    vectors = [(total, g) for total, g in pairs if g.dtype == torch.float32]  # one kernel for all of them
    torch._foreach_add_([total for total, _ in vectors], [g for _, g in vectors])
    for total, g in pairs:
        if g.dtype != torch.float32:
            total.add_(g)
    return (None,) * len(weights)
