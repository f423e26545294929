"""The recipe's numbers for data: how documents become samples and how many tokens are hidden."""

from typing import Annotated, Literal

from pydantic import Field

from mosaicbert_ds.typed_yaml import recipe_part

# Held-out loss is always taken at BERT's original rate, so that runs with different training rates
# can be compared with each other and with published curves.
EVALUATION_MASK_RATE = 0.15


@recipe_part
class DataConfig:
    """How text is cut into samples."""

    # Tokens of a sample at most, [CLS] and [SEP] included.
    max_length: Annotated[int, Field(ge=8, le=65_536)] = 128
    # "cut": a document is one sample, what is over the length is dropped. "chunk": a document
    # becomes as many consecutive samples as it needs.
    documents: Literal["cut", "chunk"] = "cut"
    # Global batches that the loader prepares ahead of the step.
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 4


@recipe_part
class MaskingConfig:
    """Share of the ordinary tokens that the model has to guess while it trains."""

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.30
    # If set, the rate falls (or rises) linearly from `rate` to this over the run.
    final_rate: Annotated[float, Field(gt=0, lt=1)] | None = None

    def rate_at(self, progress: float) -> float:
        """The mask rate when `progress` (0 to 1) of the run's samples have been seen."""
        if self.final_rate is None:
            return self.rate
        return self.rate + (self.final_rate - self.rate) * progress
