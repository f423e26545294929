"""The models behind one call, and their way in and out of Hugging Face folders."""

from mosaicbert_ds.model.build import build_pretraining_model, count_parameters
from mosaicbert_ds.model.config import ModelConfig
from mosaicbert_ds.model.export import export_model
from mosaicbert_ds.model.import_ import import_published
from mosaicbert_ds.model.mosaicbert import (
    MaskedLMSums,
    MosaicBertConfig,
    MosaicBertForMaskedLM,
    MosaicBertForQuestionAnswering,
    MosaicBertForSequenceClassification,
    MosaicBertForTokenClassification,
    MosaicBertModel,
)

__all__ = [
    "MaskedLMSums",
    "ModelConfig",
    "MosaicBertConfig",
    "MosaicBertForMaskedLM",
    "MosaicBertForQuestionAnswering",
    "MosaicBertForSequenceClassification",
    "MosaicBertForTokenClassification",
    "MosaicBertModel",
    "build_pretraining_model",
    "count_parameters",
    "export_model",
    "import_published",
]
