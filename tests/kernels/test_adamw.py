"""AdamW in one launch is torch.optim.AdamW, for tensors of any size and place, captured or not."""

import pytest
import torch

from mosaicbert_ds.ops import reference

pytest.importorskip("triton")

from mosaicbert_ds.ops import adamw_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Less than a block, some blocks exactly, blocks and a rest.
SHAPES = [(3,), (2, adamw_triton.BLOCK), (70, 31), (1,), (5, 1000)]
RATES = [1e-3, 2e-3, 5e-4, 1e-5]
SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.02}
EPSILON = 2**-23


def normal(*shape):
    return torch.randn(*shape, device=DEVICE)


def optimizer_of(kind, start, dtype=torch.float32):
    return kind([x.to(dtype, copy=True) for x in start], [x.clone() for x in start], RATES, **SETTINGS)


def gradients_at(dtype):
    """Of each step. The first is a view that no 16-byte load may read."""
    steps = [[(normal(*shape) * 0.01).to(dtype) for shape in SHAPES] for _ in RATES]
    for gradients in steps:
        shifted = torch.empty(1 + gradients[0].numel(), dtype=dtype, device=DEVICE)[1:]
        gradients[0] = shifted.copy_(gradients[0])
    return steps


def take_steps(optimizer, steps):
    for step, gradients in enumerate(steps):
        optimizer.update(gradients, torch.tensor([step], device=DEVICE))
    return optimizer


def test_steps_are_those_of_torch_in_double_precision():
    start, steps = [normal(*shape) for shape in SHAPES], gradients_at(torch.float32)
    exact = [torch.nn.Parameter(x.double()) for x in start]
    truth = torch.optim.AdamW(exact, **SETTINGS)
    for rate, gradients in zip(RATES, steps, strict=True):
        truth.param_groups[0]["lr"] = rate
        for weight, gradient in zip(exact, gradients, strict=True):
            weight.grad = gradient.double()
        truth.step()
    ours, plain = (
        take_steps(optimizer_of(kind, start), steps) for kind in (adamw_triton.AdamW, reference.AdamW)
    )
    for found, rounding in ((ours, 4), (plain, 30)):  # PyTorch rounds 0.98 before it is taken from 1
        for i, weight in enumerate(exact):
            assert torch.equal(found.weights[i], found.masters[i])
            for name, tensor in (("exp_avg", found.exp_avg[i]), ("exp_avg_sq", found.exp_avg_sq[i])):
                expected = truth.state[weight][name]
                assert (tensor - expected).norm() <= rounding * EPSILON * expected.norm(), name
            change, expected = (x.double() - start[i] for x in (found.masters[i], weight.detach()))
            # A weight is rounded in each of four steps, its changes are a thousandth of it.
            far = (change - expected).abs().max()
            assert far <= 4 * EPSILON * start[i].abs().max() + rounding * EPSILON * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_captured_on_a_gpu_steps_are_torchs_own_and_have_the_same_bits_as_uncaptured(dtype):
    """Of a real model's sizes too, its gradients in a graph's own memory."""
    shapes = [*SHAPES, (30528, 768), (2304, 768), (768,)]
    start = [normal(*shape) for shape in shapes]
    source = [normal(*shape).to(dtype) * 0.01 for shape in shapes]

    def gradients_at(step):
        return [gradient * (1 + step.to(dtype)) for gradient in source]

    uncaptured, theirs = (optimizer_of(kind, start, dtype) for kind in (adamw_triton.AdamW, reference.AdamW))
    for optimizer in (uncaptured, theirs):
        for number in range(len(RATES)):
            step = torch.tensor([number], device=DEVICE)
            optimizer.update(gradients_at(step), step)

    captured, step = optimizer_of(adamw_triton.AdamW, start, dtype), torch.zeros(1, device=DEVICE).long()
    captured.update(gradients_at(step), step)
    step += 1
    pool, graphs = torch.cuda.graph_pool_handle(), []
    for _ in range(2):  # of two shapes, which take turns in one pool
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            captured.update(gradients_at(step), step)
            step += 1
        captured.upload()
        graphs.append(graph)
    for turn in (0, 1, 0):
        graphs[turn].replay()
    assert step.item() == len(RATES)
    for name in ("weights", "masters", "exp_avg", "exp_avg_sq"):
        for a, b in zip(getattr(captured, name), getattr(uncaptured, name), strict=True):
            assert torch.equal(a, b), name
    for weight, master, expected in zip(captured.weights, captured.masters, theirs.masters, strict=True):
        assert torch.equal(weight, master.to(dtype))
        # In each of four steps both round twice at the size of the weight.
        assert ((master - expected).abs() <= 8 * EPSILON * (expected.abs() + 0.1)).all()
