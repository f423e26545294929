"""Masked-LM loss: sum over rows of log(sum_j exp(z_j)) - z_label, j over the vocabulary.

    z = hidden weight^T + bias
    d z_j = softmax(z)_j - [j = label], zero in rows without a label

The logits exist once, in the model's dtype, from this forward pass to the backward pass that follows it: the
kernel reads a row, takes its loss and its largest entry, and writes the row's gradient over it, while the
row is still in the L2 cache. Memory traffic an element in bf16 beside the three matrix products: 2 bytes in,
2 out (plain PyTorch in fp32: about 40), and 2 in for the bias gradient. The incoming gradient is one number;
it scales the products, not the logits. Without gradients the logits are only read.
Source of the in-place idea: Liger Kernel, https://arxiv.org/abs/2410.10989.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mosaicbert_ds.ops.reference import IGNORED_LABEL

BLOCK, WARPS = 4096, 4  # a program owns one row and walks over it in blocks
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _masked_lm_loss(
    logits, labels, losses, correct, vocab,
    IGNORED: tl.constexpr, WRITE_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    base = logits + row.to(tl.int64) * vocab
    column = tl.arange(0, BLOCK)
    if label != IGNORED:
        # Read here: the barriers of the reductions below lie between it and the writes over the row.
        z_label = tl.load(base + label).to(tl.float32)
        # Each lane keeps the largest entry of its own columns and the sum of exponentials relative to it,
        # in base 2. The start is finite, because -inf - -inf is NaN.
        top = tl.full([BLOCK], -1e30, tl.float32)
        top_column = tl.zeros([BLOCK], tl.int32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            inside = start + column < vocab
            z = tl.load(base + start + column, inside, other=float("-inf")).to(tl.float32) * LOG2_E
            top_column = tl.where(z > top, start + column, top_column)
            new_top = tl.maximum(top, z)
            total = total * tl.exp2(top - new_top) + tl.exp2(z - new_top)
            top = new_top
        row_top = tl.max(top, axis=0)
        log_sum = row_top + tl.log2(tl.sum(total * tl.exp2(top - row_top), axis=0))
        # Of equal entries the first counts, as in torch.argmax.
        winner = tl.min(tl.where(top == row_top, top_column, vocab), axis=0)
        tl.store(losses + row, log_sum / LOG2_E - z_label)
        tl.store(correct + row, (winner == label).to(tl.int64))
        if WRITE_GRADIENT:
            for start in range(0, vocab, BLOCK):
                inside = start + column < vocab
                z = tl.load(base + start + column, inside, other=0.0).to(tl.float32)
                gradient = tl.exp2(z * LOG2_E - log_sum)
                gradient = tl.where(start + column == label, gradient - 1.0, gradient)
                tl.store(base + start + column, gradient.to(logits.dtype.element_ty), inside)
    else:
        tl.store(losses + row, 0.0)
        tl.store(correct + row, tl.zeros([], tl.int64))
        if WRITE_GRADIENT:
            for start in range(0, vocab, BLOCK):
                zero = tl.zeros([BLOCK], logits.dtype.element_ty)
                tl.store(base + start + column, zero, start + column < vocab)


@torch.library.custom_op("mosaicbert_ds::masked_lm_loss", mutates_args=())
def _loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss_sum, num_correct and the gradient of the logits (masked, vocab), empty unless it is needed."""
    logits = F.linear(hidden, weight, bias)  # (masked, vocab)
    num_rows, vocab = logits.shape
    losses = torch.empty(num_rows, device=hidden.device, dtype=torch.float32)
    correct = torch.empty(num_rows, device=hidden.device, dtype=torch.int64)
    if num_rows:
        _masked_lm_loss[(num_rows,)](
            logits, labels.contiguous(), losses, correct, vocab,
            IGNORED_LABEL, needs_gradient, BLOCK, num_warps=WARPS,
        )  # fmt: skip
    d_logits = logits if needs_gradient else logits.new_empty(0)
    return losses.sum(), correct.sum(), d_logits


@torch.library.custom_op("mosaicbert_ds::masked_lm_loss_backward", mutates_args=())
def _loss_backward(
    hidden: Tensor, weight: Tensor, d_logits: Tensor, d_loss_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The products in fp32, so that each gradient is rounded once, after its scale; d_bias in fp32."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)

    scale = d_loss_sum.float()
    d_hidden = product(d_logits, weight).mul_(scale).to(hidden.dtype)
    d_weight = product(d_logits.mT, hidden).mul_(scale).to(weight.dtype)
    return d_hidden, d_weight, d_logits.sum(0, dtype=torch.float32) * scale


@_loss_backward.register_fake
def _(hidden, weight, d_logits, d_loss_sum):
    d_bias = weight.new_empty(weight.shape[0], dtype=torch.float32)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), d_bias


@_loss.register_fake
def _(hidden, weight, bias, labels, needs_gradient):
    d_logits = hidden.new_empty((hidden.shape[0], weight.shape[0]) if needs_gradient else (0,))
    loss_sum = hidden.new_empty((), dtype=torch.float32)
    return loss_sum, hidden.new_empty((), dtype=torch.int64), d_logits


def _save(ctx, inputs, output):
    hidden, weight, bias, _, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, output[2])


def _backward(ctx, d_loss_sum, d_num_correct, _):
    hidden, weight, d_logits = ctx.saved_tensors
    if d_loss_sum is None:
        return None, None, None, None, None
    d_hidden, d_weight, d_bias = _loss_backward(hidden, weight, d_logits, d_loss_sum)
    return d_hidden, d_weight, d_bias.to(ctx.bias_dtype), None, None


_loss.register_autograd(_backward, setup_context=_save)


def masked_lm_loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy summed over the masked tokens and the number of correct ones, as `reference` defines."""
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, weight, bias))
    loss_sum, num_correct, _ = _loss(hidden, weight, bias, labels, needs_gradient)
    return loss_sum, num_correct
