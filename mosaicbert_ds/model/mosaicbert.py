"""MosaicBERT as Hugging Face models, from the embedding to the heads.

Every model has two faces. The padded one is what users of `transformers` know: `input_ids (batch, length)`
and an `attention_mask`. The unpadded one trains: `input_ids (tokens,)`, all sequences one behind the other,
with `cu_seqlens (sequences + 1,)` int32 marking where each begins; rows behind `cu_seqlens[-1]` belong to
no sequence and only round up the shape. Inside there is one layout, the unpadded one: a padded batch is
reordered once at the door, its padding behind the last sequence. Position is what ALiBi sees, the distance
between two tokens of a sequence, so no length is the longest.

Parameters carry the names of the published checkpoints. Each is used inside the forward of the module that
owns it, or of one of `zero3_units`, because ZeRO-3 gathers a module's parameters when that module is called.

This file and `ops/reference.py` are also what an exported model consists of (`export.py`): they import
nothing but torch, transformers and the standard library, and of our own code only `ops`.
Source of the architecture: https://arxiv.org/abs/2312.17482.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple

from mosaicbert_ds import ops


class MosaicBertConfig(PretrainedConfig):
    """A model's facts under BERT's standard names. Reads the published config.json as well."""

    model_type = "mosaicbert"

    vocab_size: int = 30528
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    norm: str = "layernorm"
    norm_placement: str = "post"
    masked_only_layers: int = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def check(self) -> None:
        """A config.json may say anything, and transformers looks at none of these. Raises ValueError."""
        for key, allowed in (
            ("norm", ("layernorm", "rmsnorm")),
            ("norm_placement", ("post", "pre")),
            ("masked_only_layers", range(self.num_hidden_layers)),
        ):
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; allowed are {[*allowed]}")


class MaskedLMSums(NamedTuple):
    """What a pretraining step needs of a micro batch; the caller divides by the global number of targets."""

    loss_sum: Tensor  # fp32 scalar
    num_correct: Tensor  # int64 scalar


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (..., classes), labels (...), -100 = none -> fp32 mean over the labels; 0 if there are none."""
    loss_sum = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=ops.IGNORED_LABEL, reduction="sum"
    )
    return loss_sum / (labels != ops.IGNORED_LABEL).sum().clamp(min=1)


class Packing(NamedTuple):
    """A padded batch's place in the unpadded layout: its real tokens in order, the padding behind them."""

    order: Tensor  # (batch * length,) int64: row i of the unpadded layout is element order[i] of the batch
    cu_seqlens: Tensor  # (batch + 1,) int32
    real: Tensor  # (batch, length) bool

    def pack(self, padded: Tensor) -> Tensor:
        """(batch, length) -> (batch * length,)"""
        return padded.flatten()[self.order]

    def unpack(self, hidden: Tensor) -> Tensor:
        """(batch * length, hidden) -> (batch, length, hidden), zero where there is padding"""
        padded = torch.zeros_like(hidden).index_copy(0, self.order, hidden)
        return padded.view(*self.real.shape, -1).masked_fill(~self.real[..., None], 0.0)


def packing_of(attention_mask: Tensor) -> Packing:
    """The packing of an attention mask (batch, length), whichever side or holes its padding has.

    No row is dropped, so shapes are static and nothing waits for the device.
    """
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; give (batch, length), nonzero = token"
        )
    real = attention_mask != 0
    order = real.flatten().int().argsort(descending=True, stable=True)
    cu_seqlens = F.pad(real.sum(1).cumsum(0), (1, 0)).int()
    return Packing(order, cu_seqlens, real)


def refuse_wrapped(*linears: nn.Linear) -> None:
    """A layer's half reads the weights itself: an adapter or a quantized layer would be passed by."""
    for linear in linears:
        if type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"{type(linear).__name__} stands in for a linear layer whose weight is read, not called; "
                "adapters (LoRA) and quantized layers do not work here, finetune the whole model"
            )


class MosaicBertNorm(nn.LayerNorm):
    """LayerNorm, or by `config.norm` the RMSNorm, which has no bias."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm == "layernorm")

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class MosaicBertEmbeddingNorm(MosaicBertNorm):
    """dropout(norm(x + kind)): fused, because each input is read only once."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:  # type: ignore[override]
        dropout_p = self.dropout_p if self.training else 0.0
        return ops.add_layer_norm_dropout(x, kind, self.weight, self.bias, self.eps, dropout_p)


class MosaicBertWordEmbeddings(nn.Embedding):
    """(tokens,) -> (tokens, hidden)"""

    def forward(self, input_ids: Tensor) -> Tensor:
        return ops.embedding(input_ids, self.weight)


class MosaicBertEmbeddings(nn.Module):
    """Word + token type, LayerNorm, dropout. No position embedding: ALiBi carries the order."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.word_embeddings = MosaicBertWordEmbeddings(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = MosaicBertEmbeddingNorm(config)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """(tokens,) -> (tokens, hidden)"""
        if token_type_ids is None:
            token_type_ids = input_ids.new_zeros(1)  # one row, broadcast: the gradient is then a plain sum
        return self.LayerNorm(self.word_embeddings(input_ids), self.token_type_embeddings(token_type_ids))


class MosaicBertSelfAttention(nn.Module):
    """Holds the fused projection to queries, keys and values."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)


class MosaicBertAttentionOutput(nn.Module):
    """Holds the projection of the context and the LayerNorm behind it."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = MosaicBertNorm(config)


class MosaicBertAttention(nn.Module):
    """Self-attention with symmetric ALiBi, then dropout, residual and norm."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.self = MosaicBertSelfAttention(config)
        self.output = MosaicBertAttentionOutput(config)

    def forward(
        self,
        hidden: Tensor,
        stream: Tensor | None,
        slopes: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        memory: Tensor | None,
        queries: ops.Queries | None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden, stream (tokens, hidden) -> the same

        With `memory` (tokens, hidden), of which keys and values are: (queries, hidden) -> the same.
        """
        qkv, dense, norm = self.self.Wqkv, self.output.dense, self.output.LayerNorm
        refuse_wrapped(qkv, dense)
        return ops.attention_block(
            hidden,
            ops.AttentionWeights(qkv.weight, qkv.bias, dense.weight, dense.bias, norm.weight, norm.bias),
            slopes,
            cu_seqlens,
            max_seqlen,
            norm.eps,
            self.attention_dropout_p if self.training else 0.0,
            self.hidden_dropout_p if self.training else 0.0,
            stream,
            memory,
            queries,
        )


class MosaicBertGatedMLP(nn.Module):
    """GeGLU feed-forward, then residual and norm."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dropout_p = config.hidden_dropout_prob
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = MosaicBertNorm(config)

    def forward(self, hidden: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """hidden, stream (rows, hidden) -> the same"""
        wo, norm = self.wo, self.layernorm
        refuse_wrapped(self.gated_layers, wo)
        weights = ops.MLPWeights(self.gated_layers.weight, wo.weight, wo.bias, norm.weight, norm.bias)
        return ops.mlp_block(hidden, weights, norm.eps, self.dropout_p if self.training else 0.0, stream)


class MosaicBertLayer(nn.Module):
    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.attention = MosaicBertAttention(config)
        self.mlp = MosaicBertGatedMLP(config)

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        """As `MosaicBertAttention.forward`."""
        return self.mlp(*self.attention(*arguments))


class MosaicBertEncoder(nn.Module):
    """The layers. A norm stands behind each half of a layer, wherever it is placed.

    Post-LN, as published: x <- norm(x + f(x)). Pre-LN: x <- x + f(norm(x)), and a norm at the end. There
    the layers hand on the pair of the residual stream x and its norm, which the half before has made; so the
    norm behind a half is the one before the next half, and the last layer's is the norm at the end. The norm
    before the first half is the embedding's: its output starts the stream, and a second norm right behind it
    would change nothing but scales (as in ModernBERT, https://arxiv.org/abs/2412.13663). Parameters and their
    names are thus the same in both.

    The last `masked_only_layers` are NarrowBERT's with sparse queries (https://arxiv.org/abs/2301.04761):
    only the positions that are read go through them (in pretraining the masked ones, in classification the
    first tokens, as published), and their keys and values are made of what the first of them reads, all
    tokens as the last full layer left them. So a position's output does not depend on which others are read:
    where all are, as through the padded face, it is the same. With one such layer the network is the plain
    one, of which nothing is computed in vain, so the last layer is always one. With more it is another
    network, also where all positions are read, because the plain one's upper layers read keys and values
    that the layers before have renewed.
    """

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        config.check()
        self.is_pre = config.norm_placement == "pre"
        self.num_narrow_layers = max(config.masked_only_layers, 1)
        self.num_heads = config.num_attention_heads
        self.layer = nn.ModuleList(MosaicBertLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False  # also what transformers' gradient_checkpointing_enable() sets

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        positions: Tensor | None = None,
        every_layer: bool = False,
    ) -> tuple[Tensor, ...]:
        """(tokens, hidden) -> the last layer's output; with `every_layer` all outputs, the input first
        (in pre-LN the stream after each layer, and its norm after the last).

        `positions` are the rows that the caller reads: the narrow layers compute no others.
        """
        # Made anew in each call, not kept as a buffer: a model cast to bf16 would round the slopes.
        slopes = ops.alibi_slopes(self.num_heads, hidden.device)
        stream = hidden if self.is_pre else None
        outputs, memory, queries, row_of_position = [hidden], None, None, None
        # Where all is read, the last layer alone is faster as the full one that it also is.
        num_narrow = 0 if positions is None and self.num_narrow_layers == 1 else self.num_narrow_layers
        for number, layer in enumerate(self.layer):
            if number == len(self.layer) - num_narrow:
                memory = hidden
                if positions is None:  # all tokens ask
                    queries = ops.Queries(torch.arange(len(hidden), device=hidden.device), cu_seqlens)
                else:
                    queries, row_of_position, row_of_token = ops.queries_at(
                        positions, cu_seqlens, len(hidden)
                    )
                    hidden = ops.rows_of_queries(hidden, queries.rows, row_of_token)
                    if stream is not None:
                        stream = ops.rows_of_queries(stream, queries.rows, row_of_token)
            is_last = layer is self.layer[-1]
            arguments = (hidden, stream, slopes, cu_seqlens, max_seqlen, memory, queries)
            if self.gradient_checkpointing and self.training:
                hidden, stream = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                hidden, stream = layer(*arguments)
            if every_layer:
                outputs.append(hidden if is_last or stream is None else stream)
        if row_of_position is not None:
            hidden = hidden.index_select(0, row_of_position)
        return tuple(outputs) if every_layer else (hidden,)


class MosaicBertPooler(nn.Module):
    """Dense and tanh over the first token of each sequence."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_tokens: Tensor) -> Tensor:
        """(sequences, hidden) -> (sequences, hidden)"""
        return torch.tanh(self.dense(first_tokens))


class MosaicBertPredictionTransform(nn.Module):
    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = MosaicBertNorm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(hidden)))


class MosaicBertDecoder(nn.Linear):
    """Hidden states to scores over the vocabulary, or straight to the summed loss.

    The loss is taken in here so that the tied weight is used by a module that owns it.
    """

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None
    ) -> Tensor | MaskedLMSums:
        if labels is None:
            return super().forward(hidden)
        return MaskedLMSums(*ops.masked_lm_loss(hidden, self.weight, self.bias, labels))


class MosaicBertPredictionHead(nn.Module):
    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.transform = MosaicBertPredictionTransform(config)
        self.decoder = MosaicBertDecoder(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | MaskedLMSums:
        return self.decoder(self.transform(hidden), labels)


class MosaicBertMaskedLMHead(nn.Module):
    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__()
        self.predictions = MosaicBertPredictionHead(config)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | MaskedLMSums:
        """(..., hidden) -> logits (..., vocab), or with labels (masked,) the sums over (masked, hidden)"""
        return self.predictions(hidden, labels)


class MosaicBertPreTrainedModel(PreTrainedModel):
    config_class = MosaicBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # ZeRO-3 gathers each of these as a whole.
    zero3_units = (MosaicBertAttention, MosaicBertGatedMLP)
    # The unpadded call never waits for the device, so that its kernels can be recorded as a CUDA graph.
    is_recordable = True
    _input_embed_layer = "word_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Linear and embedding weights normal(0, initializer_range), biases 0, LayerNorm 1 and 0.

        transformers calls this for every module of a new model, and when loading for the modules whose
        weights are not in the checkpoint.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)


class MosaicBertModel(MosaicBertPreTrainedModel):
    """The encoder without a head. Only the classifier gives it a pooler, which pretraining never trains."""

    def __init__(self, config: MosaicBertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = MosaicBertEmbeddings(config)
        self.encoder = MosaicBertEncoder(config)
        if add_pooling_layer:
            self.pooler = MosaicBertPooler(config)
        self.post_init()

    # What is tied and resized. transformers 5 finds it by name; 4, which exported models load in too, asks.
    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        positions: Tensor | None = None,
    ) -> BaseModelOutput:
        """Padded: input_ids (batch, length) -> last_hidden_state (batch, length, hidden), zero at padding.

        Unpadded, chosen by `cu_seqlens` and `max_seqlen`: input_ids (tokens,) -> last_hidden_state
        (tokens, hidden), or (positions, hidden) for these rows alone.
        """
        if cu_seqlens is not None:
            hidden = self.embeddings(input_ids, token_type_ids)
            outputs = self.encoder(hidden, cu_seqlens, max_seqlen, positions)
            return BaseModelOutput(last_hidden_state=outputs[-1])

        packing = packing_of(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        if token_type_ids is not None:
            token_type_ids = packing.pack(token_type_ids.expand_as(input_ids))
        hidden = self.embeddings(packing.pack(input_ids), token_type_ids)  # (batch * length, hidden)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = self.encoder(
            hidden, packing.cu_seqlens, max_seqlen=input_ids.shape[1], every_layer=output_hidden_states
        )
        padded = tuple(packing.unpack(output) for output in outputs)  # each (batch, length, hidden)
        return BaseModelOutput(
            last_hidden_state=padded[-1], hidden_states=padded if output_hidden_states else None
        )


class MosaicBertForMaskedLM(MosaicBertPreTrainedModel):
    _tied_weights_keys = {  # noqa: RUF012
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"
    }

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.bert = MosaicBertModel(config)
        self.cls = MosaicBertMaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.cls.predictions.decoder = new_embeddings  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
    ) -> MaskedLMOutput | MaskedLMSums:
        """Padded: labels (batch, length), -100 = none -> logits (batch, length, vocab) and the mean loss.

        Unpadded, chosen by `cu_seqlens`: input_ids (tokens,), masked_positions (masked,), labels (masked,)
        -> MaskedLMSums. Only the masked positions ask in the last layer and pass the head.
        """
        if cu_seqlens is not None:
            hidden = self.bert(
                input_ids,
                token_type_ids=token_type_ids,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                positions=masked_positions,
            ).last_hidden_state  # (masked, hidden)
            return self.cls(hidden, labels)

        outputs = self.bert(input_ids, attention_mask, token_type_ids, output_hidden_states)
        logits = self.cls(outputs.last_hidden_state)
        loss = None if labels is None else mean_cross_entropy(logits, labels)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class MosaicBertForSequenceClassification(MosaicBertPreTrainedModel):
    """What a sequence is, from its first token: one of `num_labels`, with 1 a number instead (regression)."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.bert = MosaicBertModel(config, add_pooling_layer=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> SequenceClassifierOutput | Tensor:
        """Padded: labels (batch,) -> logits (batch, num_labels) and the mean loss. Where a sequence may have
        several, labels are 0 or 1 in floating point, (batch, num_labels).

        Unpadded, chosen by `cu_seqlens`: input_ids (tokens,) -> logits (sequences, num_labels) alone. The
        last layer computes only the first tokens. A sequence of no tokens gives logits of no meaning, so that
        `cu_seqlens` may be rounded up by repeating its end.
        """
        if cu_seqlens is not None:
            first = cu_seqlens[:-1].clamp(max=input_ids.shape[0] - 1)
            pooled = self.bert(
                input_ids,
                token_type_ids=token_type_ids,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
                positions=first,
            ).last_hidden_state  # (sequences, hidden)
            return self.classifier(self.dropout(self.bert.pooler(pooled)))

        outputs = self.bert(input_ids, attention_mask, token_type_ids, output_hidden_states)
        hidden = outputs.last_hidden_state  # (batch, length, hidden)
        if attention_mask is None:
            first_tokens = hidden[:, 0]
        else:  # argmax gives the first of equal values: with left padding that is not column 0
            first = (attention_mask != 0).int().argmax(1)
            first_tokens = hidden[torch.arange(hidden.shape[0], device=hidden.device), first]
        logits = self.classifier(self.dropout(self.bert.pooler(first_tokens)))
        loss = None if labels is None else self._loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As transformers has it: `problem_type` decides, and where it is not set the labels do."""
        if self.config.problem_type == "regression" or self.config.num_labels == 1:
            return F.mse_loss(logits.float().flatten(), labels.float().flatten())
        if self.config.problem_type == "multi_label_classification" or labels.is_floating_point():
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return F.cross_entropy(logits.float(), labels)


class MosaicBertForTokenClassification(MosaicBertPreTrainedModel):
    """One label a token, as for named entities."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.bert = MosaicBertModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> TokenClassifierOutput:
        """labels (batch, length), -100 = none -> logits (batch, length, num_labels) and the mean loss."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, output_hidden_states)
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else mean_cross_entropy(logits, labels)
        return TokenClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


class MosaicBertForQuestionAnswering(MosaicBertPreTrainedModel):
    """Where in the text the answer starts and ends: two scores a token."""

    def __init__(self, config: MosaicBertConfig) -> None:
        super().__init__(config)
        self.bert = MosaicBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """start_positions and end_positions (batch,), outside the row = cut off, no part of the loss ->
        start_logits and end_logits (batch, length) and the mean of both losses."""
        outputs = self.bert(input_ids, attention_mask, token_type_ids, output_hidden_states)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            length = input_ids.shape[1]
            starts, ends = (
                positions.masked_fill((positions < 0) | (positions >= length), ops.IGNORED_LABEL)
                for positions in (start_positions, end_positions)
            )
            loss = (mean_cross_entropy(start_logits, starts) + mean_cross_entropy(end_logits, ends)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, hidden_states=outputs.hidden_states
        )
