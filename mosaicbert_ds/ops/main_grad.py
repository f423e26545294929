"""Weight gradients straight into fp32.

A weight with an attribute `main_grad`, an fp32 tensor of its shape, gets its gradient added there and none
in `.grad`. The sum over micro batches is then taken inside the matrix product, in fp32, and costs no pass of
its own. Whoever sets the attribute owns the tensor, and zeroes it between steps (`training/micro_batch.py`).
"""

import torch
from torch import Tensor


def weight_gradient(main_grad: Tensor | None, d_out: Tensor, x: Tensor) -> Tensor | None:
    """d_out^T x for d_out (rows, out), x (rows, in): returned, or added to `main_grad` (out, in) instead."""
    if main_grad is None:
        return d_out.mT @ x
    if d_out.dtype == torch.float32:
        main_grad.addmm_(d_out.mT, x)
    else:
        torch.addmm(main_grad, d_out.mT, x, out_dtype=torch.float32, out=main_grad)
    return None
