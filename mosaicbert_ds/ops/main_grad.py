"""Gradients straight into fp32 sums.

A weight with an attribute `main_grad`, an fp32 tensor of its shape, gets its gradient added there and none
in `.grad`: of a matrix inside the product itself, unrounded, of vectors many at once. Whoever sets the
attribute owns the tensor and zeroes it between steps (`training/micro_batch.py`). Of one operation's weights
all have it or none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def main_grads_of(weights: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """The weights' sums, None where they have none. A weight of None, an RMSNorm's bias, has no sum."""
    if not hasattr(weights[0], "main_grad"):
        return None
    return tuple(None if weight is None else weight.main_grad for weight in weights)  # type: ignore[attr-defined]


def product(main_grad: Tensor | None, d_out: Tensor, x: Tensor) -> Tensor | None:
    """d_out^T x for d_out (rows, out), x (rows, in): returned, or added to `main_grad` (out, in) instead."""
    if main_grad is None:
        return d_out.mT @ x
    if d_out.dtype == torch.float32:
        main_grad.addmm_(d_out.mT, x)
    else:
        torch.addmm(main_grad, d_out.mT, x, out_dtype=torch.float32, out=main_grad)
    return None


def sums_dtype(main_grads: Sequence[Tensor | None] | None, weight: Tensor) -> torch.dtype:
    """Of a vector's gradient, as the kernel that adds it up may round it: `settle` casts it no more."""
    return weight.dtype if main_grads is None else torch.float32


def settle(
    gradients: Sequence[Tensor | None],
    main_grads: Sequence[Tensor | None] | None,
    weights: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """What a backward returns: nothing after adding to the sums, or the gradients in the weights' dtype.

    A gradient of None is in its sum already, or of no weight.
    """
    if main_grads is None:
        pairs = zip(gradients, weights, strict=True)
        return tuple(None if g is None or w is None else g.to(w.dtype) for g, w in pairs)
    sums = zip(main_grads, gradients, strict=True)
    added = [(total, g) for total, g in sums if total is not None and g is not None]
    vectors = [(total, g) for total, g in added if g.dtype == torch.float32]  # one kernel for all of them
    torch._foreach_add_([total for total, _ in vectors], [g for _, g in vectors])
    for total, g in added:
        if g.dtype != torch.float32:
            total.add_(g)
    return (None,) * len(weights)
