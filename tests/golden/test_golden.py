"""Figures that the published implementation gave for small random models: ours must give the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

from mosaicbert_ds.model import (
    MosaicBertConfig,
    MosaicBertForMaskedLM,
    MosaicBertForSequenceClassification,
    import_published,
)

FOLDER = Path(__file__).parent
NAMES = ("mosaicbert_heads12", "mosaicbert_heads4_long")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of a few hundred terms in another order


class Golden:
    def __init__(self, name):
        self.tensors = load_file(FOLDER / f"{name}.safetensors")
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()["config"])
        self.lengths = facts.pop("lengths")
        del facts["padded_length"]
        self.facts = facts
        self.config = MosaicBertConfig(**facts)
        self.padded = {key: self.tensors[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
        real = self.tensors["attention_mask"].bool()
        labels = self.tensors["labels"][real]
        self.unpadded = {
            "input_ids": self.tensors["input_ids"][real],
            "token_type_ids": self.tensors["token_type_ids"][real],
            "cu_seqlens": torch.tensor([0, *self.lengths]).cumsum(0).int(),
            "max_seqlen": max(self.lengths),
        }
        self.masked = {
            "masked_positions": (labels != -100).nonzero()[:, 0],
            "labels": labels[labels != -100],
        }

    def part(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def masked_lm(self):
        model = MosaicBertForMaskedLM(self.config).eval()
        model.load_state_dict(self.part("w."))
        return model

    def classifier(self):
        model = MosaicBertForSequenceClassification(self.config).eval()
        encoder = {key: value for key, value in self.part("w.").items() if key.startswith("bert.")}
        model.load_state_dict({**encoder, **self.part("cls.w.")})
        return model

    def assert_gradients(self, model):
        expected = self.part("grad.")
        assert expected.keys() == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], **TOLERANCE, msg=name)


@pytest.fixture(params=NAMES)
def golden(request):
    return Golden(request.param)


def test_padded_face_gives_the_published_figures(golden):
    model = golden.masked_lm()
    out = model(**golden.padded, labels=golden.tensors["labels"], output_hidden_states=True)
    torch.testing.assert_close(out.logits, golden.tensors["logits"], **TOLERANCE)
    torch.testing.assert_close(out.hidden_states[-1], golden.tensors["hidden"], **TOLERANCE)
    torch.testing.assert_close(out.loss, golden.tensors["loss"][0], **TOLERANCE)
    out.loss.backward()
    golden.assert_gradients(model)


def test_unpadded_face_gives_the_published_figures(golden):
    model = golden.masked_lm()
    hidden = model.bert(**golden.unpadded).last_hidden_state
    real = golden.tensors["attention_mask"].bool()
    torch.testing.assert_close(hidden, golden.tensors["hidden"][real], **TOLERANCE)

    sums = model(**golden.unpadded, **golden.masked)
    loss = sums.loss_sum / len(golden.masked["labels"])
    torch.testing.assert_close(loss, golden.tensors["loss"][0], **TOLERANCE)
    published = golden.tensors["logits"][real][golden.masked["masked_positions"]]
    assert sums.num_correct == (published.argmax(-1) == golden.masked["labels"]).sum()
    loss.backward()
    golden.assert_gradients(model)


def test_classifier_gives_the_published_figures(golden):
    model = golden.classifier()
    torch.testing.assert_close(model(**golden.padded).logits, golden.tensors["cls.logits"], **TOLERANCE)
    torch.testing.assert_close(model(**golden.unpadded), golden.tensors["cls.logits"], **TOLERANCE)


def test_an_imported_checkpoint_gives_the_published_figures(golden, tmp_path):
    src = tmp_path / "published"
    src.mkdir()
    save_file({f"model.{key}": value for key, value in golden.part("w.").items()}, src / "model.safetensors")
    published = {**golden.facts, "model_type": "bert", "alibi_starting_size": 512, "hidden_act": "gelu"}
    (src / "config.json").write_text(json.dumps(published))
    import_published(src, tmp_path / "ours")
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours", trust_remote_code=True)
    out = model(**golden.padded, labels=golden.tensors["labels"])
    torch.testing.assert_close(out.logits, golden.tensors["logits"], **TOLERANCE)
    torch.testing.assert_close(out.loss, golden.tensors["loss"][0], **TOLERANCE)
