"""Muon against the singular value decomposition and against PyTorch's own Muon."""

import pytest
import torch
from torch import nn

from mosaicbert_ds.config import load_recipe
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import build_pretraining_model
from mosaicbert_ds.training.ds_config import check_optimizer, read_ds_config, resolve_ds_config
from mosaicbert_ds.training.muon import Muon, is_muons, orthogonal
from mosaicbert_ds.training.optimizer import (
    MuonConfig,
    OptimizerConfig,
    apply_updates,
    build_optimizer,
    muon_groups,
)
from mosaicbert_ds.training.plan import plan_batches


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 64, 16), (2, 16, 64), (1, 1, 5)])
def test_singular_values_become_one_and_directions_stay(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-6, 1.0, 1e6])[: shape[0], None, None]
    found = orthogonal(matrices)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.diagonal(u.mT @ found @ vh.mT, dim1=-2, dim2=-1)
    # Very small singular values need more than five steps: chance leaves one or two of a square matrix.
    assert ((values > 0.65) & (values < 1.25)).double().mean() > 0.85
    assert values.max() < 1.25
    torch.testing.assert_close(found, u @ torch.diag_embed(values) @ vh, atol=1e-4, rtol=0)


def test_a_matrix_of_zeros_gets_no_update() -> None:
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


def test_steps_are_those_of_torch_muon() -> None:
    """torch iterates in bf16, hence the tolerance; both start anew from the same weights at each step, so
    that differences do not grow."""
    torch.manual_seed(0)
    config = OptimizerConfig(name="muon", muon=MuonConfig(peak_lr=1e-2, momentum=0.9, weight_decay=1e-3))
    ours, theirs = (nn.Parameter(torch.randn(24, 16)) for _ in range(2))
    (group, _) = build_optimizer(
        muon_groups([ours], [nn.Parameter(torch.ones(1))], config), config
    ).param_groups
    group["lr"] = 5e-3
    gradient = torch.zeros(24, 16)
    muon = Muon(0.9, {ours: "layer.0.dense.weight"}, {ours: gradient})
    reference = torch.optim.Muon(
        [theirs], lr=5e-3, weight_decay=1e-3 / 1e-2, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        theirs.data.copy_(ours)
        before = ours.detach().clone()
        gradient.copy_(torch.randn(24, 16))
        theirs.grad, ours.grad = gradient.clone(), gradient
        reference.step()
        muon.gradients_to_updates()
        apply_updates(group)
        difference = (ours - theirs).norm() / (theirs - before).norm()
        assert difference < 0.02
        update = (ours - before).square().mean().sqrt() / 5e-3
        assert 0.15 < update < 0.25, "the root mean square of AdamW's"
        assert ours.grad is None


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(3 * 8, 8)
    parts = gradient.clone()
    weight = nn.Parameter(torch.zeros(3 * 8, 8))
    Muon(
        0.0, {weight: "encoder.layer.0.attention.self.Wqkv.weight"}, {weight: gradient}
    ).gradients_to_updates()
    for part, found in zip(parts.chunk(3), gradient.chunk(3), strict=True):
        torch.testing.assert_close(found, orthogonal(part[None])[0] * 0.2 * 8**0.5)


@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
def test_muon_gets_the_matrices_of_hidden_layers_and_nothing_else(architecture: str) -> None:
    recipe = load_recipe("tiny", [f"model.architecture={architecture}"])
    model = build_pretraining_model(recipe.model)
    names = {name for name, parameter in model.named_parameters() if is_muons(name, parameter)}
    kinds = {name.split(".", 4)[-1] for name in names}
    expected = {
        "mosaicbert": {"attention.self.Wqkv", "attention.output.dense", "mlp.gated_layers", "mlp.wo"},
        "bert": {
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            *("attention.output.dense", "intermediate.dense", "output.dense"),
        },
    }[architecture]
    assert kinds == {f"{kind}.weight" for kind in expected}
    assert len(names) == recipe.model.num_hidden_layers * len(expected)


@pytest.mark.parametrize(
    ("stage", "precision", "fits"),
    [
        *(("zero0", precision, True) for precision in ("fp32", "bf16")),
        *(("zero1", "bf16", True), ("zero1", "fp32", False)),
        *((stage, "bf16", False) for stage in ("zero2", "zero3", "offload")),
    ],
)
def test_muon_where_ranks_hold_parts_of_the_gradients_is_refused(
    stage: str, precision: str, fits: bool
) -> None:
    overrides = ["optimizer.name=muon", f"engine.deepspeed={stage}", f"engine.precision={precision}"]
    recipe = load_recipe("tiny", overrides)
    plan = plan_batches(recipe.batch, recipe.duration, 1)
    ds_config = resolve_ds_config(read_ds_config(recipe.engine), recipe.engine, plan)
    if fits:
        check_optimizer(recipe.optimizer, ds_config)
    else:
        with pytest.raises(
            ConfigError, match=r"Muon needs whole gradients .* use engine.deepspeed=zero0, or"
        ):
            check_optimizer(recipe.optimizer, ds_config)
