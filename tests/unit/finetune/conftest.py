"""A tiny model of each architecture as an exported folder, and one way to write a task's files."""

from pathlib import Path

import pytest
import torch

from mosaicbert_ds.data.tokenizer import train_tokenizer
from mosaicbert_ds.model import ModelConfig, build_pretraining_model, export_model

SAMPLES = Path(__file__).resolve().parents[3] / "mosaicbert_ds" / "samples"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    train_tokenizer([str(SAMPLES / "pretrain" / "val.jsonl")], folder / "tokenizer", 512)
    for architecture in ("mosaicbert", "bert"):
        config = ModelConfig(
            architecture=architecture,  # type: ignore[arg-type]
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_size=64,
            intermediate_size=128,
            vocab_size=512,
            hidden_dropout=0.0,
            max_position_embeddings=64,
        )
        torch.manual_seed(0)
        weights = {n: p.detach().clone() for n, p in build_pretraining_model(config).named_parameters()}
        export_model(weights, config, folder / "tokenizer", folder / architecture)
    return {name: folder / name for name in ("tokenizer", "mosaicbert", "bert")}
