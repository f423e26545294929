"""The estimate agrees with what was published, and with itself."""

import itertools
import json
from pathlib import Path

import pytest

from mosaicbert_ds import cli
from mosaicbert_ds.cluster.estimate import (
    GPUS,
    INTERCONNECTS,
    ONE_TILE_LENGTH,
    estimate_run,
    matrix_flops,
    memory_bytes,
)
from mosaicbert_ds.cluster.network import Link, Network, Transfer, exposed_s
from mosaicbert_ds.config import load_recipe
from mosaicbert_ds.model import count_parameters
from mosaicbert_ds.ops import attention_triton

PUBLISHED = [  # on 8 A100-80GB: recipe, target, hours
    ("mosaicbert-base", "79.6", 1.13),
    ("mosaicbert-base", "83.2", 4.6),
    ("mosaicbert-base", "full run", 9.64),
    ("bert-base", "83.2", 11.5),
    ("bert-base", "full run", 11.01),
]


def estimates(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert cli.main(["estimate", *arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["predicted"] is True
    return told["estimates"]


@pytest.mark.parametrize(("recipe", "target", "hours"), PUBLISHED)
def test_published_times_and_costs_within_10_percent(
    recipe: str, target: str, hours: float, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = estimates(capsys, "--recipe", recipe, "--gpu", "a100-80", "--nodes", "1", "--price", "2.5")
    assert one["hours"][target] == pytest.approx(hours, rel=0.1)
    assert one["dollars"][target] == pytest.approx(hours * 8 * 2.5, rel=0.1)
    mfu = {"mosaicbert-base": 0.349, "bert-base": 0.244}[recipe]
    assert one["mfu"] == pytest.approx(mfu, rel=0.1)


def test_one_speed_of_an_a100_explains_both_published_models_within_10_percent() -> None:
    """The two figures of the preset are no two free numbers: counted as the work that the published code
    does (BERT's head on every token, with padding), one and the same GPU did both."""
    mosaicbert, bert = (load_recipe(name).model for name in ("mosaicbert-base", "bert-base"))
    one = 1033 * matrix_flops(mosaicbert, 128, 0.88, 0.30)
    other = 904 * matrix_flops(bert, 128, 1.0, 1.0)
    assert one == pytest.approx(other, rel=0.1)


def test_the_count_of_operations_is_that_of_6_per_parameter_and_token_where_that_holds() -> None:
    """Without padding, all tokens masked, attention apart: BERT's layers and head are its parameters."""
    model = load_recipe("bert-base").model
    embeddings = (model.max_position_embeddings + model.type_vocab_size) * model.hidden_size
    per_token = matrix_flops(model, 128, 1.0, 1.0) / 128
    attention = 3 * 2 * 2 * 128 * model.hidden_size * model.num_hidden_layers
    assert per_token - attention == pytest.approx(6 * (count_parameters(model) - embeddings), rel=0.01)


def test_masked_only_layers_keep_and_compute_the_masked_tokens_alone_but_for_keys_and_values() -> None:
    plain, one, five = (
        load_recipe("mosaicbert-base", [f"model.masked_only_layers={layers}"]) for layers in (0, 1, 5)
    )
    memory, same_memory, less_memory = (
        memory_bytes(recipe, 137_400_384, 1, 512, 8, fill=0.88) for recipe in (plain, one, five)
    )
    assert memory == same_memory
    unmasked = 512 * 128 * 0.88 * 0.7
    assert memory - less_memory == pytest.approx(2 * unmasked * 4 * (4 * 768 + 3 * 3072))
    assert count_parameters(five.model) == count_parameters(plain.model)


def test_long_sequences_keep_what_attention_lost_in_rounding() -> None:
    assert ONE_TILE_LENGTH == attention_triton.ONE_TILE_LENGTH
    short, long = (load_recipe("mosaicbert-base", [f"data.max_length={length}"]) for length in (128, 256))
    memory, same_tokens = (
        memory_bytes(recipe, 137_400_384, 1, 65_536 // recipe.data.max_length, 8, fill=1.0)
        for recipe in (short, long)
    )
    masked = 0.3  # what the last layer keeps of them
    assert same_tokens - memory == pytest.approx(2 * 65_536 * (11 + masked) * 768)


def test_time_falls_and_cost_rises_with_nodes_and_the_table_shows_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = estimates(capsys, "--nodes", "1,8,16,32,64")
    assert [row["micro_batch_size"] for row in rows] == [128, 64, 32, 16, 8]
    for fewer, more in itertools.pairwise(rows):
        assert more["gpus"] > fewer["gpus"] and more["mfu"] < fewer["mfu"]
        for target in ("79.6", "83.2", "full run"):
            assert more["dollars"][target] > fewer["dollars"][target]
    picture = tmp_path / "scaling.svg"
    assert cli.main(["estimate", "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "Predicted" in shown and f"{rows[1]['samples_per_s']:,.0f}" in shown
    assert "<svg" in picture.read_text()


def test_glue_hours_stand_only_where_the_steps_are_published(capsys: pytest.CaptureFixture[str]) -> None:
    for changes in (["--recipe", "mosaicbert-large"], ["--set", "batch.global_batch_size=2048"]):
        (one,) = estimates(capsys, "--nodes", "8", *changes)
        assert one["hours"]["83.2"] is one["dollars"]["79.6"] is None
        assert one["hours"]["full run"] > 0


def test_a_measured_speed_comes_out_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = load_recipe("mosaicbert-base")
    rows = [
        {"samples_per_s": None, "parameters_m": None, "micro_batch_size": 1024, "max_length": 128},
        {"samples_per_s": 9000.0, "parameters_m": 109.5, "micro_batch_size": 512, "max_length": 128},
        {"samples_per_s": 6000.0, "parameters_m": 137.4, "micro_batch_size": 128, "max_length": 128},
        {"samples_per_s": 24000.0, "parameters_m": 137.4, "micro_batch_size": 128, "max_length": 32},
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rows": rows}))
    measured = estimates(capsys, "--nodes", "1", "--bench", str(tmp_path / "bench.json"))
    given = estimates(capsys, "--nodes", "1", "--samples-per-s", "6000")
    assert measured == given
    alone = given[0]["compute_s"] / 4  # accumulation 4
    assert 128 / alone == pytest.approx(6000, rel=0.01)
    zero0 = load_recipe("mosaicbert-base", ["engine.deepspeed=zero0"])
    assert estimate_run(recipe, GPUS["h200"], INTERCONNECTS["ndr-8"], 8, 2.5).memory_gib < (
        estimate_run(zero0, GPUS["h200"], INTERCONNECTS["ndr-8"], 8, 2.5).memory_gib
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nodes", "3"], "use batch.global_batch_size=4080"),
        (["--bench", "nowhere.json"], "--bench nowhere.json cannot be read"),
        (["--samples-per-s", "1e9"], "give a measured figure"),
        (["--recipe", "tiny"], "give dollars a GPU-hour"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["estimate", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_collectives_by_hand() -> None:
    slow, fast = Link(bytes_per_s=1e6, latency_s=1e-3), Link(bytes_per_s=1e9, latency_s=0.0)
    pair = Network(nodes=2, gpus_per_node=1, inside=fast, between=slow, tree=False)
    # Half of 1 MB and one hop of 1 ms, there and back.
    assert pair.ring_pass_s(1e6) == pytest.approx(0.501)
    assert pair.all_reduce_s(1e6) == pytest.approx(1.002)
    alone = Network(nodes=1, gpus_per_node=1, inside=fast, between=slow)
    assert alone.all_reduce_s(1e9) == 0.0
    many = Network(nodes=64, gpus_per_node=8, inside=fast, between=slow)
    assert many.all_reduce_s(1e3) < 2 * many.ring_pass_s(1e3), "small ones go by the tree"
    hidden = Transfer(collective="all-reduce", num_bytes=1e6, times=1, overlaps=True)
    assert exposed_s([hidden], pair, compute_s=10.0) == 0.0
    assert exposed_s([hidden], pair, compute_s=0.0) == pytest.approx(1.002)
