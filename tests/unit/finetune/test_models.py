"""Models of others to begin from."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import BertConfig, BertForPreTraining

from mosaicbert_ds.data.tokenizer import load_tokenizer
from mosaicbert_ds.finetune.models import initial_weights
from mosaicbert_ds.model import ModelConfig, build_pretraining_model
from mosaicbert_ds.model.build import load_weights
from mosaicbert_ds.model.export import read_tokenizer

SHAPE = ModelConfig(
    architecture="bert", num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48,
    vocab_size=576,
)  # fmt: skip


def test_pretraining_may_begin_from_a_published_bert_whose_vocabulary_is_no_multiple_of_64(
    corpus: Path, tmp_path: Path
) -> None:
    """It has a pooler and a next-sentence head too, which masked language modelling has no use for."""
    torch.manual_seed(0)
    published = BertForPreTraining(
        BertConfig(
            vocab_size=522, num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48
        )
    ).eval()
    published.save_pretrained(tmp_path)
    read_tokenizer(corpus / "tokenizer").save_pretrained(tmp_path)
    weights = initial_weights(tmp_path, SHAPE, load_tokenizer(corpus / "tokenizer"))
    model = build_pretraining_model(replace(SHAPE, hidden_dropout=0.0)).eval()
    load_weights(model, weights, "published")
    input_ids = torch.randint(5, 512, (2, 9))
    with torch.no_grad():
        expected = published(input_ids).prediction_logits
        found = model(input_ids).logits
    torch.testing.assert_close(found[..., :522], expected, rtol=0, atol=1e-5)
