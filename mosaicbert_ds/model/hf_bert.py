"""The baseline: Hugging Face's BERT behind the unpadded pretraining call of MosaicBERT.

Everything that makes BERT slow is left as it is: learned positions, a padded batch, padding computed in
every layer. Only the head is spared, it sees the masked positions alone, as MosaicBERT's does.
"""

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM
from transformers.modeling_outputs import MaskedLMOutput

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model.mosaicbert import MaskedLMSums, MosaicBertDecoder
from mosaicbert_ds.ops.reference import slot_of_token, token_of_slot


class HFBertForMaskedLM(BertForMaskedLM):
    """`BertForMaskedLM` with a second, unpadded face; parameters and padded face are its own."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls.predictions.decoder = MosaicBertDecoder(config.hidden_size, config.vocab_size)
        self.tie_weights()

    def compile_encoder(self) -> None:
        """Compile the layers, for training: an evaluation is over before it has paid for its compilation."""
        plain, compiled = self.bert.forward, torch.compile(self.bert.forward, dynamic=False)
        self.bert.forward = lambda *args, **kwargs: (compiled if self.training else plain)(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: object,
    ) -> MaskedLMOutput | MaskedLMSums:
        """Unpadded: input_ids (tokens,), masked_positions and labels (masked,) -> MaskedLMSums.

        Raises ConfigError when max_seqlen exceeds the position embedding.
        """
        if cu_seqlens is None:
            return super().forward(input_ids, attention_mask, token_type_ids, labels=labels, **kwargs)

        assert max_seqlen is not None
        if max_seqlen > self.config.max_position_embeddings:
            raise ConfigError(
                f"max_seqlen {max_seqlen} exceeds the baseline's max_position_embeddings "
                f"{self.config.max_position_embeddings}; cut the samples shorter or raise "
                "model.max_position_embeddings"
            )
        token, filled = token_of_slot(cu_seqlens, max_seqlen)  # (sequences, max_seqlen)
        hidden = self.bert(
            input_ids[token],
            # Ready-made in four dimensions: of a two-dimensional mask transformers asks, waiting for the
            # device, whether it hides anything. An empty sequence sees all its slots, or it would give NaN.
            attention_mask=(filled | ~filled[:, :1])[:, None, None, :],
            token_type_ids=None if token_type_ids is None else token_type_ids[token],
        ).last_hidden_state  # (sequences, max_seqlen, hidden)
        slot, _ = slot_of_token(cu_seqlens, max_seqlen, input_ids.shape[0])
        masked = hidden.flatten(0, 1).index_select(0, slot[masked_positions])  # (masked, hidden)
        return self.cls.predictions.decoder(self.cls.predictions.transform(masked), labels)
