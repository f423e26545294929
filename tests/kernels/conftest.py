"""What the kernels' tests share."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, so that an element which no kernel wrote shows."""

    def poison(new):
        def make(*args, **kwargs):
            tensor = new(*args, **kwargs)
            poison_it = tensor.is_floating_point() and not tensor.requires_grad
            return tensor.fill_(float("nan")) if poison_it else tensor

        return make

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
