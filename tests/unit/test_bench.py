"""The benchmarks measure what they say: the same rows for all, all products, every kernel, one report."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaicbert_ds import cli
from mosaicbert_ds.bench.contenders import CONTENDERS, PaddedPeer, in_one_shape, padded
from mosaicbert_ds.bench.limit import FILL, products_of
from mosaicbert_ds.bench.machine import Machine
from mosaicbert_ds.bench.report import Report, column
from mosaicbert_ds.bench.step import IDLE, OF_OUR_FILES, OTHER, our_kernels, part_of, sort_kernels, split
from mosaicbert_ds.bench.throughput import attention_as_tokens
from mosaicbert_ds.bench.workload import lengths_like_c4, random_text
from mosaicbert_ds.cluster.estimate import matrix_flops
from mosaicbert_ds.config import RunConfig, load_recipe
from mosaicbert_ds.data.loader import Batch, GlobalBatch, pretraining_batches
from mosaicbert_ds.model import ModelConfig, build_pretraining_model, count_parameters

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SMALL = ["batch.global_batch_size=8", "model.num_hidden_layers=1"]


@pytest.fixture
def port(free_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """For the processes of a benchmark; what DeepSpeed leaves in shared memory is removed."""
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    yield free_port
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{free_port}_*"):
        buffer.unlink(missing_ok=True)


# -- throughput


def test_throughput_on_shards_compares_models_and_loader_in_one_run(
    corpus: Path, port: int, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, "data.max_length=32", "model.vocab_size=512"]
    command = ["bench", "throughput", "--recipe", "tiny", "--set", *settings, "--data", str(corpus)]
    command += ["--models", "ours,hf-bert", "--micro-batches", "4", "--repeats", "3", "--json"]
    assert cli.main(command) == 0
    report = json.loads(capfd.readouterr().out)  # DeepSpeed speaks too, but elsewhere

    ours, loaded, peer = report["rows"]
    assert [row["batches"] for row in report["rows"]] == ["repeated", "loader", "repeated"]
    assert [row["note"] for row in (ours, peer)] == ["best", "best"]
    for row in report["rows"]:
        assert 0 < row["samples_per_s_min"] <= row["samples_per_s"] <= row["samples_per_s_max"]
        assert 3 < row["tokens_per_s"] / row["samples_per_s"] < 33, "real tokens of a row of 32 at most"
        assert row["ours_over_this"] == pytest.approx(ours["samples_per_s"] / row["samples_per_s"])
    assert loaded["loader_efficiency"] > 0.2
    assert ours["mfu"] is ours["mfu_with_attention"] is None, "no peak is known of a CPU"
    model = load_recipe("tiny", settings).model
    assert ours["parameters_m"] == count_parameters(model) / 1e6
    assert report["machine"]["versions"].keys() >= {"torch", "deepspeed", "transformers"}


def _steps(recipe: RunConfig, lengths: list[int]) -> list[list[Batch]]:
    """Global batches of random text as the loader makes them, all of one epoch."""
    size, micro = recipe.batch.global_batch_size, recipe.batch.micro_batch_size
    batches = pretraining_batches(
        *random_text(lengths, recipe.model.vocab_size, recipe.data),
        recipe.data,
        [
            GlobalBatch(start=start, size=size, mask_rate=recipe.masking.rate)
            for start in range(0, len(lengths), size)
        ],
        seed=0,
        micro_batch_size=micro,
        rank=0,
        world_size=1,
    )
    return list(batches)


def test_random_text_has_the_length_mix_of_c4_and_no_two_batches_alike() -> None:
    recipe = load_recipe("mosaicbert-base", ["batch.global_batch_size=2048", "batch.micro_batch_size=512"])
    lengths = lengths_like_c4(4096)
    assert sum(length == 128 for length in lengths) / 4096 == pytest.approx(0.75, abs=0.02)
    assert min(lengths) >= 16
    assert sum(lengths) / (4096 * 128) == pytest.approx(FILL, abs=0.015)
    batches = [batch for step in _steps(recipe, lengths) for batch in step]
    assert len({int(batch.cu_seqlens[batch.num_samples]) for batch in batches}) == 8
    assert sum(batch.num_tokens for batch in batches) == sum(lengths)
    masked = sum(batch.num_masked for batch in batches) / sum(lengths)
    assert masked == pytest.approx(0.3 * 112 / 114, abs=0.005), "never the first and the last token of a row"


def test_peers_get_the_same_rows_and_targets() -> None:
    """One set of weights gives one loss, whichever way the batch is laid out."""
    recipe = load_recipe("tiny", [*SMALL, "batch.micro_batch_size=4", "data.max_length=24"])
    recipe = CONTENDERS["hf-bert"].recipe_from(recipe)
    spared = build_pretraining_model(recipe.model).eval()
    untouched = CONTENDERS["hf-bert"].build(recipe).eval()
    assert isinstance(untouched, PaddedPeer)
    untouched.model.load_state_dict(spared.state_dict())
    steps = _steps(recipe, [24, 3, 9, 24, 24, 11, 24, 24] * 2)
    of_padded, of_one_shape = padded(steps, 24), in_one_shape(steps, 24)
    shapes = set()
    for step, padded_step, shaped_step in zip(steps, of_padded, of_one_shape, strict=True):
        for batch, padded_batch, shaped_batch in zip(step, padded_step, shaped_step, strict=True):
            shapes.add((shaped_batch.inputs["input_ids"].shape, shaped_batch.inputs["labels"].shape))
            expected = spared(**batch.model_inputs()).loss_sum.item()
            assert spared(**shaped_batch.model_inputs()).loss_sum.item() == pytest.approx(expected, rel=1e-5)
            assert untouched(**padded_batch.model_inputs()).loss_sum.item() == pytest.approx(
                expected, rel=1e-5
            )
            for peer in (padded_batch, shaped_batch):
                assert (peer.num_tokens, peer.num_masked) == (batch.num_tokens, batch.num_masked)
    assert len(shapes) == 1


def test_attention_counts_two_products_of_every_pair_of_a_row_three_times() -> None:
    """At length 2,048 in MosaicBERT-Base they are a fourth of the rest, at 128 a sixtieth."""
    model = load_recipe("mosaicbert-base").model
    parameters = count_parameters(model)
    rows = torch.tensor([0, 3, 3, 7])
    flops = 6 * parameters * attention_as_tokens(rows, model, parameters)
    assert flops == pytest.approx(3 * 2 * 2 * (3 * 3 + 4 * 4) * model.hidden_size * model.num_hidden_layers)
    for length, share in ((128, 1 / 58), (2048, 1 / 3.6)):
        rows = torch.arange(0, 10 * length + 1, length)
        more = attention_as_tokens(rows, model, parameters) / (10 * length)
        assert more == pytest.approx(share, rel=0.02)


@pytest.mark.slow
def test_modernbert_takes_our_rows() -> None:
    recipe = load_recipe("tiny", ["batch.global_batch_size=4", "batch.micro_batch_size=4"])
    [[batch]] = padded(_steps(recipe, [64, 10, 3, 17]), 64)
    model = CONTENDERS["modernbert"].build(recipe)
    with torch.no_grad():
        loss = model(**batch.model_inputs()).loss_sum.item() / batch.num_masked
    assert loss == pytest.approx(torch.tensor(2048.0).log().item(), rel=0.1), "it knows nothing yet"


# -- limit


def test_products_are_six_operations_a_weight_and_token() -> None:
    """Of every matrix but the token types', which no product uses, if all tokens are targets."""
    for name, narrow in (("mosaicbert-base", 0), ("mosaicbert-large", 9), ("tiny", 1)):
        model = load_recipe(name, [f"model.masked_only_layers={narrow}"]).model
        with torch.device("meta"):
            parameters = dict(build_pretraining_model(model).named_parameters())
        matrices = sum(p.numel() for p in parameters.values() if p.dim() == 2)
        matrices -= model.type_vocab_size * model.hidden_size
        assert sum(product.flops for product in products_of(model, 1000, 1000)) == 6 * 1000 * matrices
        if name != "tiny":  # what MFU counts differs by the vectors alone
            assert matrices / count_parameters(model) > 0.999


def test_the_head_and_the_last_layer_but_for_keys_and_values_see_the_targets_alone() -> None:
    model = ModelConfig()
    spared = sum(p.flops for p in products_of(model, 1000, 1000)) - sum(
        p.flops for p in products_of(model, 1000, 300)
    )
    hidden, wide = model.hidden_size, model.intermediate_size
    weights = 2 * hidden * hidden + 3 * hidden * wide + hidden * hidden + model.vocab_size * hidden
    assert spared == 6 * 700 * weights


@pytest.mark.parametrize("narrow", [0, 1, 5])
def test_the_products_are_those_that_the_cluster_estimate_counts(narrow: int) -> None:
    model = ModelConfig(masked_only_layers=narrow)
    products = sum(product.flops for product in products_of(model, 1000, 300))
    narrow = max(narrow, 1)  # the last layer always is
    queries = 1000 * (model.num_hidden_layers - narrow) + 300 * narrow
    scores_and_values = 3 * 2 * queries * 2 * 1000 * model.hidden_size  # no product of `limit`
    assert matrix_flops(model, 1000, 1.0, 0.3) == pytest.approx(products + scores_and_values)


# -- step


def test_every_kernel_of_ours_belongs_to_one_part() -> None:
    """The profiler tells function names alone, so no two files may use the same."""
    ours = our_kernels()
    assert set(ours.values()) >= set(OF_OUR_FILES.values())
    assert [name for name, part in ours.items() if " or " in part] == []


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn_align8>(P)",
         "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(Params)", "matrix products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata<4>,"
         " FusedAdamMathFunctor<float, 4, (ADAM_MODE)1>, float>(int)", "optimizer"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float, float>>>(R)", "optimizer"),
        ("void at::native::reduce_kernel<128, 4, ReduceOp<c10::BFloat16, func_wrapper_t<sum_functor>>>(R)",
         "column sums, bias gradients"),
        ("void at::native::vectorized_elementwise_kernel<4, bfloat16_copy_kernel_cuda(TensorIterator&)>(int)",
         "gradient accumulation, casts, copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)",
         "gradient accumulation, casts, copies"),
        ("Memcpy DtoD (Device -> Device)", "gradient accumulation, casts, copies"),
        ("void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float>(long)",
         "embedding, rows picked"),
        ("void at::native::indexSelectLargeIndex<c10::BFloat16, long>(TensorInfo)", "embedding, rows picked"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, LogSoftMaxForwardEpilogue>(f)",
         "loss"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, false, false>(f)",
         "attention"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>(long)",
         "dropout + residual + LayerNorm"),
        ("triton_red_fused__to_copy_native_layer_norm_native_layer_norm_backward_3",
         "dropout + residual + LayerNorm"),
        ("void at::native::tanh_kernel_cuda(int)", OTHER),
    ],
)  # fmt: skip
def test_kernels_of_others_are_told_by_their_names(kernel: str, part: str) -> None:
    assert part_of(kernel, our_kernels()) == part


def test_the_split_of_a_step_adds_up_to_its_time() -> None:
    ours = next(name for name, part in our_kernels().items() if part == "attention")
    kernels = sort_kernels([("gemm", 3.0), (ours, 2.0), ("gemm", 5.0), ("mystery", 1.0)], micro_batches=2)
    assert [(k.name, k.count, k.ms) for k in kernels] == [
        ("gemm", 2, 4.0),
        (ours, 1, 1.0),
        ("mystery", 1, 0.5),
    ]
    parts = {part.part: part for part in split(kernels, total_ms=8.0)}
    assert list(parts) == ["matrix products", "attention", OTHER, IDLE]
    assert parts[IDLE].ms == 2.5
    assert sum(part.share for part in parts.values()) == pytest.approx(1.0)
    assert parts["matrix products"].share == 0.5


# -- reports


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str = column("name")
    ms: float | None = column("ms", ".2f")
    never: float | None = column("never", ".1f")


def test_table_and_json_hold_the_same_figures() -> None:
    machine = Machine(
        device="NVIDIA X",
        driver="1.2",
        versions={"torch": "2.13"},
        commit="abc",
        copy_bytes_per_s=4.25e12,
        matmul_flops_per_s=772e12,
    )
    report = Report(machine, [_Row("a b", 1234.567, None), _Row("c", None, None)], notes=["Said."])
    head, table, note = str(report).split("\n\n")
    assert all(
        word in head for word in ("NVIDIA X", "driver 1.2", "torch 2.13", "abc", "4.25 TB/s", "772 TF")
    )
    assert note == "Said."
    titles, *lines = (re.split(r"\s{2,}", line) for line in table.splitlines())
    assert titles == ["name", "ms"], "a column without a value is left out"
    rows: list[dict[str, Any]] = json.loads(report.to_json())["rows"]
    for line, row in zip(lines, rows, strict=True):
        assert line == [row["name"], "-" if row["ms"] is None else f"{row['ms']:.2f}"]


# -- mistakes


MISTAKES = [
    (["throughput", "--models", "ours,gpt"], "--models says 'gpt'; allowed are ours, ours-torch, hf-bert"),
    (["throughput", "--micro-batches", "100"], "batch.global_batch_size 4096 is not micro batch 100"),
    (["throughput", "--length", "1024", "--models", "bert"], "over the 512 positions"),
    (["throughput", "--recipe", "tinny"], "recipe 'tinny' is unknown"),
]
NEEDS_GPU = [
    ([name], f"bench {name} measures a GPU and there is none here") for name in ("limit", "kernels", "step")
]


@pytest.mark.parametrize(
    ("arguments", "said"), [*MISTAKES, *([] if torch.cuda.is_available() else NEEDS_GPU)]
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("error: ") and said in err


def test_what_a_measurement_finds_wrong_reaches_the_user(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measurements are processes of their own."""
    command = ["bench", "throughput", "--recipe", "tiny", "--micro-batches", "16", "--models", "ours"]
    assert cli.main([*command, "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/manifest.json does not exist")


# -- on a GPU


@pytest.mark.gpu
@needs_gpu
def test_step_names_nearly_all_that_a_gpu_does(
    port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    command = [
        "bench",
        "step",
        "--set",
        "batch.global_batch_size=512",
        "batch.micro_batch_size=128",
        "--json",
    ]
    assert cli.main(command) == 0
    report = json.loads(capfd.readouterr().out)
    share = {row["part"]: row["share"] for row in report["rows"]}
    assert share.keys() >= {"matrix products", "optimizer", *OF_OUR_FILES.values()}
    assert share[OTHER] < 0.05, [row["name"] for row in report["details"] if row["part"] == OTHER]
    assert share["matrix products"] > 0.3


@pytest.mark.gpu
@needs_gpu
def test_limit_is_slower_than_the_largest_product_and_not_by_much(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "limit", "--tokens", "16384", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    [limit] = report["details"]
    assert 0.4 < limit["tflops_per_s"] * 1e12 / report["machine"]["matmul_flops_per_s"] < 1.1
