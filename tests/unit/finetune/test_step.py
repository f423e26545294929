"""The step computes what Hugging Face's own classes and PyTorch's AdamW compute, whatever its speed costs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from mosaicbert_ds import ops
from mosaicbert_ds.data.tokenizer import load_tokenizer
from mosaicbert_ds.errors import CheckpointError, ConfigError
from mosaicbert_ds.finetune.batches import epoch_batches, pack, shape_of
from mosaicbert_ds.finetune.dataset import EncodedSplit, encode_split, open_split
from mosaicbert_ds.finetune.models import check_fits, find_pretrained, load_classifier
from mosaicbert_ds.finetune.step import Trainer, loss_of
from mosaicbert_ds.finetune.tasks import GLUE
from mosaicbert_ds.ops import dispatch, reference
from mosaicbert_ds.training.engine import Bf16Compute
from mosaicbert_ds.training.optimizer import OptimizerConfig, build_optimizer

SAMPLES = Path(__file__).resolve().parents[3] / "mosaicbert_ds" / "samples"
OPTIMIZER = OptimizerConfig(peak_lr=1e-3, weight_decay=1e-4)
RATES = [1e-3 * factor for factor in (0.5, 1.0, 0.8, 0.6, 0.4, 0.2)]
BATCH = 7  # 6 batches of 40 rows, the last one short


@pytest.fixture(scope="module")
def split(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> EncodedSplit:
    path, cache = SAMPLES / "glue" / "RTE" / "train.tsv", tmp_path_factory.mktemp("cache")
    whole = open_split(encode_split(GLUE["rte"], path, True, load_tokenizer(models["tokenizer"]), 48, cache))
    return EncodedSplit(whole.tokens, whole.offsets[:41], whole.second[:40], whole.labels[:40], 0)


def batches_of(split: EncodedSplit) -> list[np.ndarray]:
    return epoch_batches(1, 0, split.lengths, BATCH, shuffle=True, sort_window=1)


def trainer_of(folder: Path, *, bf16: bool = False, device: str = "cpu", cls: type = Trainer) -> Trainer:
    model = load_classifier(folder, GLUE["rte"], seed=5)
    return cls(model, OPTIMIZER, RATES, bf16=bf16, is_regression=False, seed=5, device=torch.device(device))


def _drop(model: torch.nn.Module) -> None:
    """Switch on the dropout that the models of these tests are made without."""
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.2
        elif hasattr(part, "dropout_p"):
            part.dropout_p = 0.2


def run(trainer: Trainer, split: EncodedSplit, batches: list[np.ndarray], padded: bool) -> None:
    shapes = [shape_of(split.lengths[rows], BATCH, padded_up_to=64 if padded else None) for rows in batches]
    trainer.run(pack(split, batches, shapes, False), shapes)


def padded_batch(split: EncodedSplit, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """As a data collator of Hugging Face makes it."""
    parts = [torch.tensor(split.tokens[split.offsets[i] : split.offsets[i + 1]].astype(int)) for i in rows]
    types = [(torch.arange(len(p)) >= int(split.second[i])).long() for p, i in zip(parts, rows, strict=True)]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(parts, batch_first=True),
        "token_type_ids": pad(types, batch_first=True),
        "attention_mask": pad([torch.ones_like(p) for p in parts], batch_first=True),
        "labels": torch.tensor(split.labels[rows]).long(),
    }


@pytest.mark.parametrize("architecture", ["bert", "mosaicbert"])
def test_an_epoch_gives_the_weights_of_a_plain_padded_loop(
    architecture: str, models: dict[str, Path], split: EncodedSplit
) -> None:
    """For BERT the loop is Hugging Face's class, its own loss, and torch's AdamW, with nothing of ours."""
    batches = batches_of(split)
    trainer = trainer_of(models[architecture])
    start = load_classifier(models[architecture], GLUE["rte"], seed=5)
    for part in start.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    plain = start
    if architecture == "bert":
        plain = BertForSequenceClassification(start.config)
        plain.load_state_dict(start.state_dict())
        # The recipe's attention dropout is 0 in these models, as their hidden dropout is.
        assert plain.config.attention_probs_dropout_prob == plain.config.hidden_dropout_prob == 0.0
    optimizer = torch.optim.AdamW(
        plain.parameters(), betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=0.1
    )
    plain.train()
    losses = []
    for rows, rate in zip(batches, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = plain(**padded_batch(split, rows)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    run(trainer, split, batches, padded=architecture == "bert")
    np.testing.assert_allclose(trainer.losses.tolist(), losses, rtol=1e-5)
    expected = dict(plain.named_parameters())
    for name, weight in trainer.state()["weights"].items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=2e-5)


def test_a_model_of_one_token_type_reads_pairs(
    models: dict[str, Path], split: EncodedSplit, tmp_path: Path
) -> None:
    BertForMaskedLM(BertConfig.from_pretrained(models["bert"], type_vocab_size=1)).save_pretrained(tmp_path)
    plain = load_classifier(tmp_path, GLUE["rte"], seed=5).eval()
    batches = batches_of(split)[:1]
    batch = padded_batch(split, batches[0])
    assert batch["token_type_ids"].any()
    trainer = trainer_of(tmp_path)
    run(trainer, split, batches, padded=True)
    expected = plain(**batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])}).loss
    assert trainer.losses[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_bf16_weights_are_those_of_the_pretraining_engines_bf16(
    models: dict[str, Path], split: EncodedSplit
) -> None:
    batches = batches_of(split)[:2]
    trainer = trainer_of(models["mosaicbert"], bf16=True)
    plain = load_classifier(models["mosaicbert"], GLUE["rte"], seed=5).train()
    optimizer, compute = build_optimizer(plain.parameters(), OPTIMIZER), Bf16Compute(plain)
    for rows, rate in zip(batches, RATES, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        batch = padded_batch(split, rows)
        F.cross_entropy(compute(**batch).logits.float(), batch["labels"]).backward()
        optimizer.step()
    run(trainer, split, batches, padded=False)
    for name, weight in plain.named_parameters():
        found = trainer.state()["weights"][name]
        assert found.dtype == torch.float32
        # bf16 gradients of the two layouts differ by the order of sums: parts of a step, by way of Adam.
        assert (found - weight).abs().mean() < 0.1 * 2e-3, name


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_job_that_goes_on_ends_with_the_same_bits_with_dropout(
    kernels: str, models: dict[str, Path], split: EncodedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under either optimizer, Triton's in its interpreter."""
    if kernels == "triton":
        if torch.cuda.is_available():
            pytest.skip("where Triton compiles for a GPU it takes no tensors on the CPU")
        pytest.importorskip("triton")
        from mosaicbert_ds.ops import adamw_triton

        monkeypatch.setattr(ops, "adamw", adamw_triton.AdamW)
    batches = batches_of(split)

    def make() -> Trainer:
        trainer = trainer_of(models["mosaicbert"])
        _drop(trainer._model)
        return trainer

    whole, first, second = make(), make(), make()
    run(whole, split, batches, padded=False)
    run(first, split, batches[:3], padded=False)
    second.restore(first.state(), first.steps_done)
    run(second, split, batches[3:], padded=False)
    for kind, tensors in whole.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.state()[kind][name]), (kind, name)
    assert torch.equal(whole.losses[3:], second.losses[3:])
    assert not torch.equal(
        whole.state()["weights"]["classifier.weight"], first.state()["weights"]["classifier.weight"]
    )


def test_rows_that_only_fill_up_change_neither_loss_nor_gradient() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    labels = torch.tensor([2, -100, 0, -100, -100], dtype=torch.int32)
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([2, 0]))
    torch.testing.assert_close(loss_of(logits, labels), expected)
    values = torch.randn(4, 1, requires_grad=True)
    targets = torch.tensor([1.0, float("nan"), 2.5, float("nan")])
    loss = loss_of(values, targets)
    torch.testing.assert_close(loss, F.mse_loss(values[[0, 2], 0], targets[[0, 2]]))
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient[[1, 3]].eq(0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("architecture", ["bert", "mosaicbert"])
def test_a_classifier_takes_encoder_and_pooler_and_draws_its_head_from_the_seed(
    architecture: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from mosaicbert_ds.finetune.models import plain_classifier
    from mosaicbert_ds.model.export import write_folder

    trained = load_classifier(models[architecture], GLUE["mnli"], seed=1)
    write_folder(plain_classifier(trained), models["tokenizer"], tmp_path / "mnli")
    weights = dict(trained.named_parameters())
    one, again, other = (load_classifier(tmp_path / "mnli", GLUE["rte"], seed) for seed in (1, 1, 2))
    pooler = f"{architecture}.pooler".replace("mosaic", "") + ".dense.weight"
    assert pooler in weights
    for name, weight in one.named_parameters():
        if not name.startswith("classifier"):
            assert torch.equal(weight, weights[name]), name
    assert one.classifier.weight.shape == (2, 64)
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
def test_the_recipe_sets_the_dropout_of_a_model_that_was_pretrained_without(
    models: dict[str, Path], architecture: str
) -> None:
    ids = torch.arange(5, 25).view(1, 20)
    for rate in (None, 0.3):
        model = load_classifier(models[architecture], GLUE["rte"], seed=1, hidden_dropout=rate).train()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        once, again = (model(**inputs) for _ in range(2))
        assert torch.equal(once.logits, again.logits) == (rate is None)
        assert model.config.hidden_dropout_prob == (rate or 0.0)


def test_a_folder_that_is_no_whole_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no model; give a run"):
        find_pretrained(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model_type is 'roberta'; allowed are mosaicbert and bert"):
        find_pretrained(tmp_path, tmp_path)
    facts = json.loads((models["mosaicbert"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"norm": "batchnorm"}))
    with pytest.raises(CheckpointError, match="norm is 'batchnorm'; allowed are"):
        find_pretrained(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_classifier(tmp_path, GLUE["rte"], seed=1)
    facts = json.loads((models["bert"] / "config.json").read_text())
    for key, value in (
        ("is_decoder", True),
        ("position_embedding_type", "relative_key"),
        ("hidden_size", "x"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(facts | {key: value}))
        with pytest.raises(CheckpointError, match=rf"config\.json.*{key}"):
            find_pretrained(tmp_path, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(facts | {"intermediate_size": 64}))
    shutil.copy(models["bert"] / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"dense\.bias has shape \(128,\), not \(64,\)"):
        load_classifier(tmp_path, GLUE["rte"], seed=1)
    bert = find_pretrained(models["bert"], tmp_path)
    with pytest.raises(ConfigError, match="max_length 65 is over the 64 positions"):
        check_fits(bert, bert.tokenizer(tmp_path), 65)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["bert", "mosaicbert"])
@pytest.mark.parametrize("bf16", [True, False])
def test_captured_steps_compute_what_uncaptured_ones_do(
    architecture: str, bf16: bool, models: dict[str, Path], split: EncodedSplit
) -> None:
    """Dropout on, several shapes, each captured at its second batch; then restored into a fresh trainer."""

    class Uncaptured(Trainer):
        def _capture(self, shape):  # type: ignore[no-untyped-def]
            return SimpleNamespace(replay=lambda: self._train_step(shape))

    batches = batches_of(split)
    rates = [1e-4] * (4 * len(batches))
    found = []
    for cls in (Trainer, Uncaptured):
        model = load_classifier(models[architecture], GLUE["rte"], seed=5)
        _drop(model)
        trainer = cls(
            model, OPTIMIZER, rates, bf16=bf16, is_regression=False, seed=5, device=torch.device("cuda", 0)
        )
        for _ in range(4):
            run(trainer, split, batches, padded=architecture == "bert")
        if cls is Trainer:  # BERT pads all of these rows to one length
            assert len(trainer._graphs) == len(trainer._buffers) >= (1 if architecture == "bert" else 2)
        found.append(trainer)
    torch.testing.assert_close(found[0].losses, found[1].losses, rtol=2e-2 if bf16 else 1e-3, atol=1e-3)
    for name, weight in found[0].state()["weights"].items():
        torch.testing.assert_close(weight, found[1].state()["weights"][name], rtol=0, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["bert", "mosaicbert"])
def test_triton_and_torch_train_alike_in_bf16(
    architecture: str, models: dict[str, Path], split: EncodedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured, without dropout. Of BERT only the optimizer is Triton's."""
    batches = batches_of(split)
    rates = [1e-4] * (4 * len(batches))
    losses, changes = [], []
    for kernels in ("triton", "torch"):
        monkeypatch.setattr(dispatch, "_chosen", kernels)
        model = load_classifier(models[architecture], GLUE["rte"], seed=5)
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        start = [weight.detach().clone() for weight in model.parameters()]
        trainer = Trainer(
            model, OPTIMIZER, rates, bf16=True, is_regression=False, seed=5, device=torch.device("cuda", 0)
        )
        assert (type(trainer._optimizer) is reference.AdamW) == (kernels == "torch")
        for _ in range(4):
            run(trainer, split, batches, padded=architecture == "bert")
        moved = zip(trainer.state()["weights"].values(), start, strict=True)
        changes.append(torch.cat([(weight - before).flatten() for weight, before in moved]))
        losses.append(trainer.losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-2, atol=0)
    # Measured on a CPU: training in bf16 moves the weights by 4 % otherwise than training in fp32.
    assert (changes[0] - changes[1]).norm() <= 0.15 * changes[1].norm()
