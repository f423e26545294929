"""MosaicBERT's two faces, and what its forward promises whatever the weights are."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, BertForTokenClassification

from mosaicbert_ds.errors import CheckpointError, ConfigError
from mosaicbert_ds.model import (
    MaskedLMSums,
    ModelConfig,
    MosaicBertForMaskedLM,
    MosaicBertForQuestionAnswering,
    MosaicBertForSequenceClassification,
    MosaicBertForTokenClassification,
    MosaicBertModel,
    build_pretraining_model,
    count_parameters,
)
from mosaicbert_ds.model.build import load_weights, to_hf_config
from mosaicbert_ds.typed_yaml import from_tree

TINY = ModelConfig(
    num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=48, vocab_size=128
)
LARGE = ModelConfig(num_hidden_layers=24, num_attention_heads=16, hidden_size=1024, intermediate_size=4096)
LENGTHS = (11, 1, 7)


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = build_pretraining_model(replace(TINY, **changes))
    with torch.no_grad():  # untrained weights are so small that a wrong path would hardly show
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny_classifier(num_labels=3, problem_type=None):
    torch.manual_seed(0)
    config = to_hf_config(TINY)
    config.num_labels, config.problem_type = num_labels, problem_type
    return MosaicBertForSequenceClassification(config).eval()


def unpadded_batch(trailing=0, seed=0):
    """Sequences of LENGTHS, every third token masked, and `trailing` rows that belong to no sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    input_ids = torch.randint(128, (tokens + trailing,), generator=generator)
    masked_positions = torch.arange(0, tokens, 3)
    return {
        "input_ids": input_ids,
        "token_type_ids": torch.randint(2, input_ids.shape, generator=generator),
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "max_seqlen": max(LENGTHS),
        "masked_positions": masked_positions,
        "labels": torch.randint(128, masked_positions.shape, generator=generator),
    }


def padded(values, side="right", fill=0):
    """(tokens,) of sequences of LENGTHS -> (sequences, longest)"""
    rows = torch.full((len(LENGTHS), max(LENGTHS)), fill)
    for row, part in zip(rows, values[: sum(LENGTHS)].split(LENGTHS), strict=True):
        row[: len(part)] = part
        if side == "left":
            row.copy_(row.roll(max(LENGTHS) - len(part)))
    return rows


def padded_batch(batch, side="right"):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["masked_positions"]] = batch["labels"]
    return {
        "input_ids": padded(batch["input_ids"], side, fill=5),
        "attention_mask": padded(torch.ones_like(batch["input_ids"]), side),
        "token_type_ids": padded(batch["token_type_ids"], side),
        "labels": padded(labels, side, fill=-100),
    }


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_parameter_counts_are_the_published_ones():
    assert count_parameters(ModelConfig()) == 137_400_384
    assert count_parameters(LARGE) == 435_221_312
    assert count_parameters(replace(ModelConfig(), architecture="bert")) == 109_518_912
    assert count_parameters(replace(LARGE, architecture="bert")) == 335_180_608


def test_fresh_weights_follow_the_seed_and_the_published_distribution():
    torch.manual_seed(3)
    model = build_pretraining_model(ModelConfig(num_hidden_layers=1, vocab_size=1024))
    torch.manual_seed(3)
    again = build_pretraining_model(ModelConfig(num_hidden_layers=1, vocab_size=1024))
    for (name, parameter), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other)
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name.lower():
            assert (parameter == 1).all(), name
        else:
            assert parameter.mean().abs().item() < 0.002, name
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    embeddings = model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.weight is embeddings
    assert embeddings[0].any()  # no row is set aside for padding


def test_config_refuses_what_cannot_be_built():
    for tree, message in [
        ({"hidden_size": 770}, "hidden_size 770 is not a multiple of num_attention_heads 12"),
        ({"vocab_size": 30522}, "vocab_size 30522 is not a multiple of 64; use 30528"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0"),
        ({"architecture": "roberta"}, "architecture is"),
        ({"masked_only_layers": 12}, "masked_only_layers 12 leaves none of the 12 layers to all tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            from_tree(ModelConfig, tree, "recipe.yaml")


# Not BERT with padding on the left: its learned positions count from column 0.
@pytest.mark.parametrize(
    ("architecture", "side"), [("mosaicbert", "right"), ("mosaicbert", "left"), ("bert", "right")]
)
def test_padded_and_unpadded_faces_give_the_same_loss_and_gradients(architecture, side):
    model = tiny_model(architecture=architecture).eval()
    batch = unpadded_batch()
    sums = model(**batch)
    assert isinstance(sums, MaskedLMSums)
    out = model(**padded_batch(batch, side))
    torch.testing.assert_close(sums.loss_sum / len(batch["labels"]), out.loss)

    logits = out.logits[padded_batch(batch, side)["labels"] != -100]  # same order as masked_positions
    assert sums.num_correct == (logits.argmax(-1) == batch["labels"]).sum()
    expected = gradients(model, out.loss)
    found = gradients(model, sums.loss_sum / len(batch["labels"]))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
def test_rows_that_round_up_the_shape_change_neither_loss_nor_gradient(architecture):
    model = tiny_model(architecture=architecture).eval()
    batch = unpadded_batch()
    rounded = unpadded_batch(trailing=9)
    rounded["input_ids"][:19], rounded["token_type_ids"][:19] = batch["input_ids"], batch["token_type_ids"]
    rounded["cu_seqlens"] = torch.cat([batch["cu_seqlens"], torch.tensor([19, 19]).int()])
    rounded["max_seqlen"] = 16
    rounded["masked_positions"] = torch.cat([batch["masked_positions"], torch.tensor([0, 27])])
    rounded["labels"] = torch.cat([batch["labels"], torch.tensor([-100, -100])])

    torch.testing.assert_close(model(**rounded), model(**batch))
    expected = gradients(model, model(**batch).loss_sum)
    found = gradients(model, model(**rounded).loss_sum)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_hidden_states_are_zero_at_padding_and_hold_every_layer():
    model = tiny_model().bert.eval()
    batch = padded_batch(unpadded_batch(), "left")
    del batch["labels"]
    out = model(**batch, output_hidden_states=True)
    assert len(out.hidden_states) == 1 + TINY.num_hidden_layers
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    for state in out.hidden_states:
        assert not state[batch["attention_mask"] == 0].any()
    (alone,) = model(**batch, return_dict=False)
    assert torch.equal(alone, out.last_hidden_state)


def test_a_sequence_is_not_influenced_by_its_neighbours_in_the_batch():
    model = tiny_model().bert.eval()
    batch = unpadded_batch()
    together = model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"], max_seqlen=11).last_hidden_state
    for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
        alone = model(batch["input_ids"][None, start:end]).last_hidden_state[0]
        torch.testing.assert_close(together[start:end], alone)


def test_computing_the_last_layer_for_masked_positions_alone_equals_computing_it_for_all():
    model = tiny_model().eval()
    batch = unpadded_batch()
    positions = batch["masked_positions"]
    arguments = {key: batch[key] for key in ("input_ids", "cu_seqlens", "max_seqlen")}
    everywhere = model.bert(**arguments).last_hidden_state
    torch.testing.assert_close(
        model.bert(**arguments, positions=positions).last_hidden_state, everywhere[positions]
    )
    rows = []
    model.bert.encoder.layer[-1].mlp.register_forward_hook(lambda _m, _i, out: rows.append(len(out[0])))
    model(**batch)
    assert rows == [len(positions)]


def test_any_length_runs_whatever_the_model_was_trained_with():
    model = tiny_model().bert.eval()
    input_ids = torch.randint(128, (1, 1200))
    out = model(input_ids).last_hidden_state
    assert out.isfinite().all()
    # ALiBi fades with distance: far from the cut, the first half alone looks the same
    torch.testing.assert_close(
        model(input_ids[:, :600]).last_hidden_state[:, 0], out[:, 0], rtol=0, atol=0.05
    )


@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
def test_activation_checkpointing_gives_the_same_gradients_bit_for_bit(architecture):
    batch = unpadded_batch()
    results = []
    for checkpointing in (False, True):
        model = tiny_model(
            architecture=architecture,
            activation_checkpointing=checkpointing,
            hidden_dropout=0.3,
            attention_dropout=0.2,
        )
        calls = []
        attention = model.bert.encoder.layer[0].attention
        attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        results.append(gradients(model, model(**batch).loss_sum))
        assert len(calls) == 1 + checkpointing, "a checkpointed layer runs twice"
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.slow  # the compiler takes half a minute on a CPU
def test_a_compiled_bert_gives_the_plain_ones_gradients():
    batch, results = unpadded_batch(), []
    for compiled in (False, True):
        torch.manual_seed(0)
        config = replace(TINY, architecture="bert", hidden_dropout=0.0, attention_dropout=0.0)
        model = build_pretraining_model(config, compiled)
        results.append(gradients(model, model(**batch).loss_sum))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_transformers_own_switch_turns_checkpointing_on_and_off():
    model = tiny_model()
    model.gradient_checkpointing_enable()
    assert model.bert.encoder.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.bert.encoder.gradient_checkpointing


def test_dropout_acts_in_training_only():
    model, batch = tiny_model(), unpadded_batch()
    assert model(**batch).loss_sum != model(**batch).loss_sum
    model.eval()
    assert model(**batch).loss_sum == model(**batch).loss_sum


def test_token_zero_can_be_a_target():
    model = tiny_model().eval()
    batch = unpadded_batch()
    batch["labels"].zero_()
    assert model(**batch).loss_sum > 0
    out = model(**padded_batch(batch))
    torch.testing.assert_close(out.loss, model(**batch).loss_sum / len(batch["labels"]))


def test_a_batch_without_labels_has_loss_zero_and_no_nan():
    model = tiny_model().eval()
    batch = padded_batch(unpadded_batch())
    batch["labels"].fill_(-100)
    out = model(**batch)
    assert out.loss == 0
    assert not any(grad.isnan().any() for grad in gradients(model, out.loss).values())


def test_a_row_of_nothing_but_padding_does_no_harm():
    model = tiny_model().eval()
    batch = padded_batch(unpadded_batch())
    expected = model(**batch).logits
    batch["attention_mask"][1] = 0
    logits = model(**batch).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[0], expected[0])


def test_an_attention_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 5, 5\); give \(batch, length\)"):
        tiny_model()(torch.ones(2, 5).long(), torch.ones(2, 1, 5, 5))


def test_a_bf16_model_stays_near_the_fp32_one():
    model, batch = tiny_model().eval(), unpadded_batch()
    exact = model(**batch).loss_sum
    rounded = copy.deepcopy(model).bfloat16()
    sums = rounded(**batch)
    assert sums.loss_sum.dtype == torch.float32
    assert sums.loss_sum.item() == pytest.approx(exact.item(), rel=0.02)
    gradients(rounded, sums.loss_sum)
    assert rounded.bert.encoder.layer[0].mlp.layernorm.weight.grad.dtype == torch.bfloat16


# fullgraph: a place that reads a value from the device, or branches on one, would be an error
@pytest.mark.parametrize(
    ("architecture", "checkpointing"), [("mosaicbert", False), ("mosaicbert", True), ("bert", False)]
)
def test_the_pretraining_step_compiles_without_a_graph_break(architecture, checkpointing):
    model = tiny_model(architecture=architecture, activation_checkpointing=checkpointing, hidden_dropout=0.0)
    batch = unpadded_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch), model(**batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_never_waits_for_the_gpu(architecture, checkpointing):
    model = tiny_model(architecture=architecture, activation_checkpointing=checkpointing)
    model.cuda().bfloat16()
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in unpadded_batch(trailing=5).items()
    }
    model(**batch).loss_sum.backward()  # the first step loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss_sum.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_classifier_reads_the_first_token_of_each_sequence():
    model = tiny_classifier()
    batch = unpadded_batch(trailing=4)
    unpadded = model(
        batch["input_ids"],
        token_type_ids=batch["token_type_ids"],
        cu_seqlens=torch.cat([batch["cu_seqlens"], batch["cu_seqlens"][-1:]]),  # one empty sequence
        max_seqlen=11,
    )
    assert unpadded.shape == (4, 3)
    for side in ("right", "left"):
        rows = padded_batch(batch, side)
        del rows["labels"]
        torch.testing.assert_close(model(**rows).logits, unpadded[:3])


def test_the_classifier_runs_its_last_layer_for_first_tokens_alone():
    model, batch = tiny_classifier(), unpadded_batch()
    rows = []
    model.bert.encoder.layer[-1].mlp.register_forward_hook(lambda _m, _i, out: rows.append(len(out[0])))
    model(batch["input_ids"], cu_seqlens=batch["cu_seqlens"], max_seqlen=11)
    assert rows == [len(LENGTHS)]


def test_the_classifier_takes_its_loss_from_the_problem_type():
    input_ids = torch.randint(128, (4, 6))
    labels = torch.tensor([0, 2, 1, 2])
    out = tiny_classifier()(input_ids, labels=labels)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    scores = torch.tensor([0.5, 4.8, 2.0, 0.0])
    out = tiny_classifier(num_labels=1)(input_ids, labels=scores)
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - scores) ** 2).mean())
    several = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    for problem_type, given in (("multi_label_classification", several.long()), (None, several)):
        out = tiny_classifier(problem_type=problem_type)(input_ids, labels=given)
        likelihood = torch.where(several == 1, out.logits, -out.logits).sigmoid().log()
        torch.testing.assert_close(out.loss, -likelihood.mean())


@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [
        (
            MosaicBertForTokenClassification,
            BertForTokenClassification,
            {"labels": torch.tensor([[0, 2, 4, -100], [1, -100, -100, -100]])},
        ),
        (
            MosaicBertForQuestionAnswering,
            BertForQuestionAnswering,
            # The second row's answer was cut off.
            {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 7])},
        ),
    ],
    ids=["tokens", "answers"],
)
def test_heads_over_tokens_are_hugging_faces(ours, theirs, labels):
    torch.manual_seed(0)
    config = to_hf_config(TINY)
    config.num_labels = 2 if "start_positions" in labels else 5
    model = ours(config).eval()
    bert = theirs(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=config.num_labels)
    )
    head = "qa_outputs" if "start_positions" in labels else "classifier"
    bert.set_submodule(head, model.get_submodule(head))
    bert.bert.forward = lambda input_ids, attention_mask, **_: model.bert(input_ids, attention_mask)
    batch = {
        "input_ids": torch.randint(128, (2, 4)),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        **labels,
    }
    expected, found = bert.eval()(**batch), model(**batch)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert found.loss > 0


def test_what_is_no_norm_no_placement_or_no_plain_linear_layer_is_refused():
    for wrong in ({"norm": "LayerNorm"}, {"norm_placement": "pre-LN"}, {"masked_only_layers": 3}):
        config = to_hf_config(TINY)
        config.update(wrong)
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* allowed are"):
            MosaicBertForMaskedLM(config)

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    for place in ("attention.self.Wqkv", "mlp.wo"):
        model = tiny_classifier()
        layer = model.bert.encoder.layer[0]
        linear = layer.get_submodule(place)
        layer.set_submodule(place, Adapter(linear.in_features, linear.out_features))
        with pytest.raises(
            TypeError, match=r"Adapter stands in for a linear layer .* finetune the whole model"
        ):
            model(torch.zeros(1, 4, dtype=torch.long))


def test_finetuning_starts_from_the_pretrained_encoder_and_a_fresh_head(tmp_path):
    pretrained = tiny_model()
    pretrained.save_pretrained(tmp_path)
    torch.manual_seed(5)
    model = MosaicBertForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    bare = MosaicBertModel.from_pretrained(tmp_path)
    own = dict(model.bert.named_parameters())
    for name, parameter in pretrained.bert.named_parameters():
        assert torch.equal(own[name], parameter), name
        assert torch.equal(dict(bare.named_parameters())[name], parameter), name
    assert own["pooler.dense.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert model.classifier.weight.shape == (2, 32)
    assert isinstance(MosaicBertForMaskedLM.from_pretrained(tmp_path), MosaicBertForMaskedLM)


def test_the_baseline_refuses_more_tokens_than_it_has_positions():
    model = tiny_model(architecture="bert", max_position_embeddings=8)
    with pytest.raises(ConfigError, match="max_seqlen 11 exceeds the baseline's max_position_embeddings 8"):
        model(**unpadded_batch())


def test_weights_that_do_not_fit_are_all_listed():
    model = tiny_model()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    load_weights(model, weights, "step-1")
    del weights["bert.encoder.layer.1.mlp.wo.bias"]
    weights["bert.encoder.layer.9.mlp.wo.bias"] = torch.zeros(32)
    weights["cls.predictions.decoder.bias"] = torch.zeros(64)
    weights["cls.predictions.decoder.weight"] = torch.zeros(128, 32)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, weights, "step-1")
    assert str(error.value).splitlines() == [
        "step-1 does not fit the model:",
        "  missing bert.encoder.layer.1.mlp.wo.bias",
        "  unexpected bert.encoder.layer.9.mlp.wo.bias",
        "  cls.predictions.decoder.bias has shape (64,), not (128,)",
        "  cls.predictions.decoder.weight differs from bert.embeddings.word_embeddings.weight, "
        "which it is tied to",
    ]
