"""One name chooses the arithmetic, and on a machine without a GPU every tensor takes PyTorch's."""

import subprocess
import sys

import pytest
import torch

from mosaicbert_ds import ops
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.ops import dispatch, reference


@pytest.fixture(autouse=True)
def _no_choice_yet(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", None)
    monkeypatch.setattr(dispatch, "_asked", "auto")


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="kernels is 'cuda'; give one of auto, triton, torch"):
        ops.choose_kernels("cuda")


@pytest.mark.parametrize(
    ("capability", "obstacle"),
    [(None, "there is no CUDA GPU"), ((7, 5), "older than compute capability 8.0")],
)
def test_triton_where_it_cannot_run_is_an_error_and_auto_is_torch(monkeypatch, capability, obstacle):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Old")
    with pytest.raises(ConfigError, match=obstacle):
        ops.choose_kernels("triton")
    assert ops.choose_kernels("auto") == "torch"


def test_with_a_gpu_and_triton_auto_is_triton_and_torch_stays_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "_obstacle", lambda: None)
    assert [ops.choose_kernels(name) for name in dispatch.BACKENDS] == ["triton", "triton", "torch"]


def test_tensors_on_the_cpu_take_torch_whatever_was_chosen(monkeypatch):
    monkeypatch.setattr(dispatch, "_obstacle", lambda: None)
    ops.choose_kernels("triton")
    hidden = torch.randn(3, 8)
    weights = ops.MLPWeights(torch.randn(12, 8), torch.randn(8, 6), *torch.randn(3, 8))
    found, expected = (module.mlp_block(hidden, weights, 1e-12, 0.0)[0] for module in (ops, reference))
    assert torch.equal(found, expected)


def test_importing_the_operations_imports_no_triton():
    code = (
        "import mosaicbert_ds.ops, sys; "
        "print([m for m in sys.modules if m.startswith('mosaicbert_ds') and m.endswith('_triton')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"
