"""A micro batch replayed from CUDA graphs does what it does unrecorded, bit for bit, dropout included."""

import pytest
import torch

from mosaicbert_ds.model.mosaicbert import MosaicBertConfig, MosaicBertForMaskedLM
from mosaicbert_ds.training.micro_batch import MicroBatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def batch(tokens, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([0, 7, 60, tokens - 80])
    return {
        "input_ids": torch.randint(5, 512, (tokens,), generator=generator).cuda(),
        "cu_seqlens": lengths.cumsum(0).int().cuda(),
        "max_seqlen": 128,
        "masked_positions": torch.randperm(tokens - 80, generator=generator)[:masked].cuda(),
        "labels": torch.randint(5, 512, (masked,), generator=generator).cuda(),
    }


# All that differs from the published network at once, and three layers, of which two read a memory.
VARIANT = {"norm_placement": "pre", "norm": "rmsnorm", "num_hidden_layers": 3, "masked_only_layers": 2}


def train(record, in_kernels, variant):
    """Losses of eight micro batches in three shapes, and the gradients that they summed up."""
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    config = MosaicBertConfig(**shape, **({"num_hidden_layers": 2} | variant))
    model = MosaicBertForMaskedLM(config).cuda().bfloat16().train()
    micro_batch = MicroBatch(model, record)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    micro_batch.sum_into(sums, in_kernels)
    losses = []
    for step in range(8):
        torch.manual_seed(step)
        shape = [(136, 24), (200, 24), (136, 40)][step % 3]
        result = micro_batch(**batch(*shape, seed=step))
        (result.loss_sum * (0.1 + step)).backward()
        losses.append(result.loss_sum.item())
    assert len(micro_batch._recorded) == (3 if record else 0)
    assert all(p.grad is None for p in model.parameters())
    return losses, sums


@pytest.mark.parametrize("variant", [{}, VARIANT], ids=["published", "variant"])
@pytest.mark.parametrize("in_kernels", [True, False])
def test_a_recorded_micro_batch_gives_the_same_bits(in_kernels, variant):
    losses, sums = train(False, in_kernels, variant)
    again, recorded = train(True, in_kernels, variant)
    assert losses == again
    assert all(total.any() for name, total in sums.items() if "token_type" not in name)
    for name, total in sums.items():
        assert torch.equal(total, recorded[name]), name


@pytest.mark.parametrize("variant", [{}, VARIANT], ids=["published", "variant"])
def test_sums_of_kernels_and_of_autograd_agree(variant):
    """In the kernels gradients are added unrounded: they may differ by the rounding of each to bf16."""
    _, in_kernels = train(False, True, variant)
    _, by_autograd = train(False, False, variant)
    for name, total in by_autograd.items():
        assert (in_kernels[name] - total).norm() <= 2**-8 * total.norm(), name
