"""Where the network may differ from the published one: norms, their placement, NarrowBERT's upper layers.

Truth is the network written out in float64, sequence by sequence, from the weights alone.
"""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import (
    ModelConfig,
    MosaicBertForSequenceClassification,
    build_pretraining_model,
)
from mosaicbert_ds.model.build import to_hf_config
from mosaicbert_ds.ops import alibi_slopes, queries_at, rows_of_queries
from mosaicbert_ds.typed_yaml import from_tree

SHAPE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 48,
    "vocab_size": 128,
}
PUBLISHED = {"norm": "layernorm", "norm_placement": "post", "masked_only_layers": 0}
VARIANTS = [
    {"norm_placement": "pre"},
    {"norm": "rmsnorm"},
    {"masked_only_layers": 2},
    {"norm_placement": "pre", "norm": "rmsnorm", "masked_only_layers": 2},
]
LENGTHS = (11, 1, 7)
MASKED = [2, 5, 6, 10, 11, 14, 18]  # of each sequence some


def model_of(variant, **more):
    torch.manual_seed(0)
    model = build_pretraining_model(from_tree(ModelConfig, SHAPE | variant | more, "recipe"))
    with torch.no_grad():  # untrained weights are so small that a wrong path would hardly show
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch_of(rounded=False):
    """Unpadded; `rounded` up as the loader does: rows and sequences of nothing, masked positions at 0."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(128, (sum(LENGTHS),), generator=generator),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "max_seqlen": max(LENGTHS),
        "masked_positions": torch.tensor(MASKED),
        "labels": torch.randint(128, (len(MASKED),), generator=generator),
    }
    if rounded:
        batch["input_ids"] = F.pad(batch["input_ids"], (0, 5))
        batch["cu_seqlens"] = torch.cat([batch["cu_seqlens"], batch["cu_seqlens"][-1:]])
        batch["max_seqlen"] = 16
        batch["masked_positions"] = F.pad(batch["masked_positions"], (0, 3))
        batch["labels"] = F.pad(batch["labels"], (0, 3), value=-100)
    return batch


def padded_of(batch):
    rows = {
        name: torch.full((len(LENGTHS), max(LENGTHS)), fill)
        for name, fill in (("input_ids", 5), ("attention_mask", 0), ("labels", -100))
    }
    labels = torch.full((sum(LENGTHS),), -100).index_copy(0, batch["masked_positions"], batch["labels"])
    for row, (start, end) in enumerate(pairwise(batch["cu_seqlens"].tolist())):
        for name, values in (("input_ids", batch["input_ids"]), ("labels", labels)):
            rows[name][row, : end - start] = values[start:end]
        rows["attention_mask"][row, : end - start] = 1
    return rows


def written_out(model, input_ids, variant):
    """The hidden states (tokens, hidden) of one sequence, in float64."""
    w = {name: weight.double() for name, weight in model.state_dict().items()}
    variant = PUBLISHED | variant
    heads, is_pre = SHAPE["num_attention_heads"], variant["norm_placement"] == "pre"

    def norm(x, name):
        if variant["norm"] == "rmsnorm":
            return w[f"{name}.weight"] * x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def attend(x, name):
        read = x if memory is None else memory
        q, k, v = (
            y @ weight.T + bias
            for y, weight, bias in zip(
                (x, read, read),
                w[f"{name}.self.Wqkv.weight"].chunk(3),
                w[f"{name}.self.Wqkv.bias"].chunk(3),
                strict=True,
            )
        )
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k, v))
        place = torch.arange(len(x))
        bias = -alibi_slopes(heads).double()[:, None, None] * (place[:, None] - place).abs()
        context = (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v
        dense = f"{name}.output.dense"
        return context.transpose(0, 1).flatten(1) @ w[f"{dense}.weight"].T + w[f"{dense}.bias"]

    def feed_forward(x, name):
        gate, value = (x @ w[f"{name}.gated_layers.weight"].T).chunk(2, -1)
        return F.gelu(gate) * value @ w[f"{name}.wo.weight"].T + w[f"{name}.wo.bias"]

    embeddings = "bert.embeddings"
    words = w[f"{embeddings}.word_embeddings.weight"][input_ids]
    x = norm(words + w[f"{embeddings}.token_type_embeddings.weight"][0], f"{embeddings}.LayerNorm")
    before = None  # the norm before the next half, of pre-LN; the first half's is the embedding's
    memory = None  # what keys and values are made of, where that is not x itself
    for layer in range(SHAPE["num_hidden_layers"]):
        if layer == SHAPE["num_hidden_layers"] - variant["masked_only_layers"]:
            memory = norm(x, before) if is_pre else x
        halves = ((attend, "attention", "attention.output.LayerNorm"), (feed_forward, "mlp", "mlp.layernorm"))
        for half, name, behind in halves:
            root = f"bert.encoder.layer.{layer}"
            if is_pre:
                x = x + half(x if before is None else norm(x, before), f"{root}.{name}")
                before = f"{root}.{behind}"
            else:
                x = norm(x + half(x, f"{root}.{name}"), f"{root}.{behind}")
    return norm(x, before) if is_pre else x


@pytest.mark.parametrize("variant", [PUBLISHED, {"masked_only_layers": 1}, *VARIANTS], ids=str)
def test_the_network_is_the_one_written_out(variant):
    model, batch = model_of(variant).double().eval(), batch_of()
    arguments = {name: batch[name] for name in ("input_ids", "cu_seqlens", "max_seqlen")}
    everywhere = model.bert(**arguments).last_hidden_state
    expected = torch.cat([written_out(model, ids, variant) for ids in batch["input_ids"].split(LENGTHS)])
    close = {"rtol": 1e-6, "atol": 1e-6}  # the reference takes its softmax in fp32
    torch.testing.assert_close(everywhere, expected, **close)
    for positions in ([3, 0, 18, 7], MASKED, [4, 4, 0]):
        some = model.bert(**arguments, positions=torch.tensor(positions)).last_hidden_state
        torch.testing.assert_close(some, expected[positions], **close)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padded_unpadded_and_rounded_up_give_the_same_loss_and_gradients(variant):
    model, batch = model_of(variant).eval(), batch_of()
    out = model(**padded_of(batch))
    expected = gradients(model, out.loss)
    for unpadded in (batch, batch_of(rounded=True)):
        loss = model(**unpadded).loss_sum / len(MASKED)
        torch.testing.assert_close(loss, out.loss)
        found = gradients(model, loss)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("positions", [[5, 2, 2, 10, 2], [10], []], ids=str)
def test_each_tokens_gradient_is_that_of_its_query_and_else_zero(positions):
    """Rows are left over where a position comes twice; what is given back for them belongs to no token."""
    x, cu_seqlens = torch.randn(11, 3, requires_grad=True), torch.tensor([0, 4, 10], dtype=torch.int32)
    queries, row_of_position, row_of_token = queries_at(torch.tensor(positions).long(), cu_seqlens, len(x))
    rows = rows_of_queries(x, queries.rows, row_of_token)
    assert torch.equal(rows[row_of_position], x[positions])
    d_rows = torch.randn_like(rows)
    rows.backward(d_rows)
    expected = torch.zeros_like(x)
    for row, token in enumerate(sorted(set(positions))):
        expected[token] = d_rows[row]
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_activation_checkpointing_gives_the_same_gradients_bit_for_bit(variant):
    dropout = {"hidden_dropout": 0.3, "attention_dropout": 0.2}
    results = []
    for checkpointing in (False, True):
        model = model_of(variant, activation_checkpointing=checkpointing, **dropout)
        torch.manual_seed(1)
        results.append(gradients(model, model(**batch_of(rounded=True)).loss_sum))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_pretraining_step_compiles_without_a_graph_break(variant):
    model, batch = model_of(variant, hidden_dropout=0.0), batch_of(rounded=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch), model(**batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_step_never_waits_for_the_gpu_and_has_the_loss_of_the_cpu(variant):
    model, batch = model_of(variant, hidden_dropout=0.0), batch_of(rounded=True)
    expected = model(**batch).loss_sum.item()
    on_gpu = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    model.cuda()
    assert model(**on_gpu).loss_sum.item() == pytest.approx(expected, rel=1e-3)  # products in tf32 at worst
    model.bfloat16()
    model(**on_gpu).loss_sum.backward()  # the first step loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**on_gpu).loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_classifier_reads_first_tokens_through_both_faces(variant):
    config = to_hf_config(from_tree(ModelConfig, SHAPE | variant, "recipe"))
    config.num_labels = 3
    model, batch = MosaicBertForSequenceClassification(config).eval(), batch_of(rounded=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    unpadded = model(**{name: batch[name] for name in ("input_ids", "cu_seqlens", "max_seqlen")})
    rows = padded_of(batch_of())
    logits = model(rows["input_ids"], rows["attention_mask"]).logits
    torch.testing.assert_close(unpadded[: len(LENGTHS)], logits)
    assert unpadded.shape == (len(LENGTHS) + 1, 3), "of the sequence without tokens as well"


def test_hidden_states_of_pre_ln_are_the_residual_stream_and_its_norm_at_the_end():
    model, batch = model_of({"norm_placement": "pre"}).bert.eval(), padded_of(batch_of())
    del batch["labels"]
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 1 + SHAPE["num_hidden_layers"]
    torch.testing.assert_close(states[-1], model(**batch).last_hidden_state)
    norm = model.encoder.layer[2].mlp.layernorm
    real = batch["attention_mask"].bool()
    third = model_of({"norm_placement": "pre"}).bert.eval()
    third.encoder.layer = third.encoder.layer[:3]
    torch.testing.assert_close(norm(states[3])[real], third(**batch).last_hidden_state[real])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_hugging_faces_bert_refuses_what_it_cannot_be(variant):
    with pytest.raises(ConfigError, match="mosaicbert's alone; architecture bert has"):
        from_tree(ModelConfig, {"architecture": "bert"} | variant, "recipe")


def test_both_placements_have_the_same_parameters_by_the_same_names():
    shapes = [
        {name: parameter.shape for name, parameter in model_of(variant).named_parameters()}
        for variant in (PUBLISHED, {"norm_placement": "pre"})
    ]
    assert shapes[0] == shapes[1]


def test_rmsnorm_lacks_the_biases_of_the_norms_and_nothing_else():
    names = {name for name, _ in model_of(PUBLISHED).named_parameters()}
    lacking = names - {name for name, _ in model_of({"norm": "rmsnorm"}).named_parameters()}
    assert len(lacking) == 2 * SHAPE["num_hidden_layers"] + 2
    assert all(name.lower().endswith("layernorm.bias") for name in lacking)
