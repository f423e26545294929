"""A recipe, an override or a DeepSpeed JSON that says something impossible is refused with a sentence."""

import contextlib
import dataclasses
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mosaicbert_ds.config import RunConfig, describe, load_recipe, shipped_recipes
from mosaicbert_ds.data.config import EVALUATION_MASK_RATE
from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.model import ModelConfig, count_parameters
from mosaicbert_ds.training.ds_config import (
    EngineConfig,
    check_recomputation,
    read_ds_config,
    resolve_ds_config,
)
from mosaicbert_ds.training.plan import plan_batches
from mosaicbert_ds.typed_yaml import from_tree, merge, parse_overrides, to_tree

REPO = Path(__file__).resolve().parents[2]

# The published facts: layers, heads, hidden, intermediate, parameters, attention dropout, mask rate, peak.
PUBLISHED = {
    "mosaicbert-base": (12, 12, 768, 3072, 137_400_384, 0.0, 0.30, 5e-4),
    "mosaicbert-large": (24, 16, 1024, 4096, 435_221_312, 0.0, 0.30, 2e-4),
    "bert-base": (12, 12, 768, 3072, 109_518_912, 0.1, 0.15, 5e-4),
    "bert-large": (24, 16, 1024, 4096, 335_180_608, 0.1, 0.15, 2e-4),
}


# -- the shipped recipes


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_state_the_published_facts(name: str) -> None:
    recipe = load_recipe(name)
    model, optimizer = recipe.model, recipe.optimizer
    assert (
        model.num_hidden_layers,
        model.num_attention_heads,
        model.hidden_size,
        model.intermediate_size,
        count_parameters(model),
        model.attention_dropout,
        recipe.masking.rate,
        optimizer.peak_lr,
    ) == PUBLISHED[name]
    assert model.architecture == name.split("-")[0]
    assert (model.vocab_size, model.type_vocab_size, model.hidden_dropout) == (30528, 2, 0.1)
    assert (model.layer_norm_eps, model.initializer_range) == (1e-12, 0.02)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.98), 1e-6, 1e-5)
    assert recipe.schedule.warmup == 0.06
    assert recipe.schedule.final_lr_fraction == 0.02
    assert (recipe.data.max_length, recipe.data.documents) == (128, "cut")
    assert EVALUATION_MASK_RATE == 0.15
    assert recipe.seed == 17
    assert recipe.engine.precision == "bf16"
    plan = plan_batches(recipe.batch, recipe.duration, world_size=8)
    assert (plan.global_batch_size, plan.total_samples, plan.total_steps) == (4096, 286_720_000, 70_000)


def test_the_weight_decay_of_base_is_0_02_in_adamw() -> None:
    assert load_recipe("mosaicbert-base").optimizer.adamw_weight_decay == pytest.approx(0.02, rel=1e-12)
    assert load_recipe("mosaicbert-large").optimizer.adamw_weight_decay == pytest.approx(0.05, rel=1e-12)


def test_mosaicbert_base_is_the_defaults_but_for_what_it_says_about_saving() -> None:
    """Who writes a recipe of a few lines gets MosaicBERT-Base for the rest."""
    assert (
        dataclasses.replace(load_recipe("mosaicbert-base"), checkpoint=RunConfig().checkpoint) == RunConfig()
    )


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe


def test_the_short_recipes_differ_in_the_model_and_its_compiling_alone() -> None:
    ours, baseline = load_recipe("mosaicbert-base-short"), load_recipe("bert-base-short")
    base, bert = load_recipe("mosaicbert-base").model, load_recipe("bert-base").model
    assert ours.model == dataclasses.replace(base, intermediate_size=2048, hidden_dropout=0.0)
    assert baseline.model == dataclasses.replace(bert, hidden_dropout=0.0, attention_dropout=0.0)
    assert baseline.engine == dataclasses.replace(ours.engine, compile=True)
    same = {name: getattr(ours, name) for name in ("model", "engine")}
    assert dataclasses.replace(baseline, **same) == ours
    with pytest.raises(ConfigError, match=r"engine\.compile is true with model\.architecture mosaicbert"):
        load_recipe("mosaicbert-base-short", ["engine.compile=true"])


def test_a_dry_run_says_what_a_run_of_minutes_will_do() -> None:
    recipe = load_recipe("bert-base-short", ["optimizer.peak_lr=1e-3"])
    plan = plan_batches(recipe.batch, recipe.duration, world_size=1)
    text = describe(recipe, plan, {})
    assert "accumulation 2 x 1 rank(s) (ramp: 512 from 0%, 1,024 from 10% of the run); 20 minutes of" in text
    assert "each start's first step, evaluation and saving do not count" in text
    assert "steps follow from the speed: the schedule goes by the main rank's clock" in text
    assert "0.00 minutes  0.000e+00  global batch 512\n" in text
    assert "17.78 minutes  5.644e-04  global batch 1,024\n" in text
    assert "20.00 minutes  2.000e-05  global batch 1,024\n" in text
    assert "Muon on the hidden layers' matrices: peak 0.001, weight decay 1 (decoupled 0.001)" in text


# -- what is refused: in a file and as an override, at every key of the tree


def _leaves(tree: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for key, value in tree.items():
        paths += _leaves(value, (*prefix, key)) if isinstance(value, dict) else [(*prefix, key)]
    return paths


TREE = to_tree(load_recipe("mosaicbert-base"))
LEAVES = _leaves(TREE)
SECTIONS = [(), *((key,) for key, value in TREE.items() if isinstance(value, dict))]
TEXTS = {
    ("model", "architecture"),
    ("model", "norm"),
    ("model", "norm_placement"),
    ("data", "documents"),
    ("engine", "deepspeed"),
    ("engine", "precision"),
    ("engine", "kernels"),
    ("optimizer", "name"),
    ("schedule", "shape"),
}
FLAGS = {("model", "activation_checkpointing"), ("engine", "cuda_graphs"), ("engine", "compile")}
LISTS = {("batch", "ramp"), ("optimizer", "betas"), ("checkpoint", "keep_at_samples")}
NUMBERS = [path for path in LEAVES if path not in TEXTS | FLAGS | LISTS]
NULLABLE = {
    ("batch", "gradient_accumulation_steps"),
    ("duration", "samples"),
    ("duration", "minutes"),
    ("masking", "final_rate"),
    ("schedule", "decay"),
    ("telemetry", "usd_per_gpu_hour"),
}


def test_every_key_of_a_recipe_is_of_a_kind_tested_here() -> None:
    assert {type(_at(TREE, path)) for path in NUMBERS} <= {int, float, type(None)}
    assert set(LEAVES) >= TEXTS | FLAGS | LISTS | NULLABLE


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree


def _refused(path: tuple[str, ...], value: str, folder: Path) -> list[str]:
    """The messages that `path: value` (YAML) gets in a file and as an override; each names its source."""
    messages = []
    file, key = folder / "mine.yaml", ".".join(path)
    text = ""
    for depth, part in enumerate(path):
        text += "  " * depth + part + (":\n" if depth < len(path) - 1 else f": {value}\n")
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(file))
    messages.append(str(caught.value))
    assert str(file) in messages[0]
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(folder / "short.yaml"), [f"{key}={value}"])
    messages.append(str(caught.value))
    assert f"{key}={value}" in messages[1]
    for message in messages:
        assert all(key in line for line in message.splitlines()), message
    return messages


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "short.yaml").write_text("seed: 17\n", encoding="utf-8")  # the rest is defaults
    return folder


CYRILLIC = dict(zip(map(ord, "aeopcxs"), (0x430, 0x435, 0x43E, 0x440, 0x441, 0x445, 0x455), strict=True))


def _misspell(word: str, seed: int) -> str:
    """One edit: a letter gone, doubled, swapped, in upper case, or its Cyrillic look-alike."""
    rng = random.Random(seed)
    at = rng.randrange(len(word))
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :],
            word[:at] + word[at].upper() + word[at + 1 :],
            word[:at] + word[at].translate(CYRILLIC) + word[at + 1 :],
        ]
    )


@settings(max_examples=150, deadline=None, database=None)
@given(path=st.sampled_from([*LEAVES, *SECTIONS[1:]]), seed=st.integers(0, 10_000))
def test_a_misspelt_key_is_refused_and_the_right_one_named(path: Any, seed: int, folder: Path) -> None:
    wrong = _misspell(path[-1], seed)
    if not wrong or wrong in _at(TREE, path[:-1]):
        return
    for message in _refused((*path[:-1], wrong), "1", folder):
        assert f"unknown key '{'.'.join((*path[:-1], wrong))}'" in message
        assert f"'{'.'.join(path)}'" in message or f"allowed are {', '.join(_at(TREE, path[:-1]))}" in message


@settings(max_examples=100, deadline=None, database=None)
@given(section=st.sampled_from(SECTIONS), name=st.text(string.ascii_lowercase + "_", min_size=1, max_size=12))
def test_an_unknown_key_at_any_depth_is_refused(section: Any, name: str, folder: Path) -> None:
    if name in _at(TREE, section) or name in ("null", "true", "false", "extends"):
        return
    for message in _refused((*section, name), "{a: {b: 1}}", folder):
        assert "unknown key" in message


BAD_NUMBERS = ["yes", ".nan", ".inf", "-.inf", "1e999", "-1", "-1e300", "'5'", "text", "[1]", "{a: 1}"]
BAD_NUMBERS += [
    "true",
    "010",
    "1:30",
    "2024-01-01",
    "0x10",
    "\uff11\uff12",
]  # numbers to YAML 1.1 or to Python


@pytest.mark.parametrize("value", BAD_NUMBERS)
def test_what_is_no_sensible_number_is_refused_for_every_number(value: str, folder: Path) -> None:
    for path in NUMBERS:
        for message in _refused(path, value, folder):
            assert re.search(rf"{re.escape('.'.join(path))} is .*; input should |unknown key", message)


@pytest.mark.parametrize("value", ["9" * 30, "1e300"])
def test_a_huge_number_is_refused_where_it_can_mean_nothing(value: str, folder: Path) -> None:
    """Not for the model's sizes and the price: there the machine's memory or the purse says no."""
    for path in NUMBERS:
        if path[0] != "model" and path[-1] != "usd_per_gpu_hour":
            _refused(path, value, folder)


@pytest.mark.parametrize("path", [path for path in LEAVES if path not in NULLABLE], ids=".".join)
def test_nothing_is_no_value_where_one_is_needed(path: Any, folder: Path) -> None:
    for message in _refused(path, "null", folder):
        assert f"{'.'.join(path)} is null; " in message


@pytest.mark.parametrize("path", sorted(TEXTS | FLAGS | LISTS), ids=".".join)
@pytest.mark.parametrize("value", ["1", "1.5", "nonsense", "[]", "[1, 2, true]", "{a: 1}"])
def test_words_flags_and_lists_are_checked(path: Any, value: str, folder: Path) -> None:
    if path == ("engine", "deepspeed") and value == "nonsense":  # a word, which names no file
        with pytest.raises(
            ConfigError, match=r"'nonsense'; allowed are .*, offload, zero0, zero1, zero2, zero3"
        ):
            read_ds_config(load_recipe("tiny", ["engine.deepspeed=nonsense"]).engine)
        return
    if value == "[]" and path in (("checkpoint", "keep_at_samples"), ("batch", "ramp")):
        recipe = load_recipe("mosaicbert-base", [f"{'.'.join(path)}=[]"])
        assert _at(to_tree(recipe), path) == []
        return
    _refused(path, value, folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nbatch: {micro_batch_size: 1}\nseed: 2\n", "mine.yaml:3: key 'seed' is given twice"),
        (
            "batch:\n  micro_batch_size: 1\n  micro_batch_size: 1\n",
            "mine.yaml:3: key 'micro_batch_size' is given twice",
        ),
        ("batch: &b {micro_batch_size: 1}\noptimizer: *b\n", "mine.yaml:2: an alias"),
        ("a: &a [*a]\n", "mine.yaml:1: an alias"),
        ("1: 2\n", "mine.yaml:1: key 1 is no text"),
        ("? [a, b]\n: 2\n", "mine.yaml:1: key ['a', 'b'] is no text"),
        ("seed: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
        ("seed: !!binary aGk=\n", "is not valid YAML"),
        ("seed: " + "9" * 5000, "is not valid YAML"),
        ("seed: " + "[" * 5000, "is not valid YAML"),
        ("seed: [1\n", "is not valid YAML"),
        ("- seed\n", "holds list, not a mapping"),
        ("", "holds nothing, not a mapping"),
        ("extends: [tiny]\n", "extends is ['tiny']; allowed is"),
        ("extends:\n", "extends is None; allowed is"),
        ("extends: tinny\n", "mine.yaml: extends 'tinny' is unknown; allowed are bert-base, "),
    ],
)
def test_yaml_that_means_no_recipe_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(file))
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


@settings(max_examples=300, deadline=None, database=None)
@given(
    data=st.one_of(
        st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))
    )
)
def test_no_file_ends_in_a_traceback(data: bytes, folder: Path) -> None:
    file = folder / "fuzz.yaml"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=r"fuzz\.yaml"):
        load_recipe(str(file))


@settings(max_examples=600, deadline=None, database=None)
@given(path=st.sampled_from(NUMBERS), text=st.text("0123456789.eE+-_x: ", min_size=1, max_size=6))
@example(path=("telemetry", "usd_per_gpu_hour"), text="---")
def test_a_number_that_is_taken_is_the_one_that_was_written(path: Any, text: str) -> None:
    with contextlib.suppress(ConfigError):
        override = f"{'.'.join(path)}={text}"
        recipe = from_tree(RunConfig, merge(TREE, parse_overrides([override])), override)
        taken = _at(to_tree(recipe), path)
        assert taken == (None if not text.strip() else float(text.replace("_", "")))
        assert not re.match(r"[-+]?0[0-9]", text.strip()) or "." in text or "e" in text.lower()


def test_a_fault_is_named_in_the_file_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("batch: {micro: 1}\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=rf"^{re.escape(str(tmp_path / 'base.yaml'))}: unknown key 'batch.micro'"
    ):
        load_recipe(str(tmp_path / "mine.yaml"), ["seed=3"])


def test_recipes_that_extend_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    for name, base in (("a", "b.yaml"), ("b", "./sub/../c.yaml"), ("c", "a.yaml"), ("self", "self.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {base}\n", encoding="utf-8")
    (tmp_path / "sub").mkdir()
    for name in ("a", "self"):
        with pytest.raises(ConfigError, match="circle") as caught:
            load_recipe(str(tmp_path / f"{name}.yaml"))
        assert str(tmp_path / f"{name}.yaml") in str(caught.value)


def test_a_recipe_says_only_what_differs_and_finds_its_base_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: mosaicbert-large\nseed: 3\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\noptimizer: {eps: 1e-8}\n", encoding="utf-8")
    expected = to_tree(load_recipe("mosaicbert-large"))
    expected["seed"], expected["optimizer"]["eps"] = 3, 1e-8
    assert to_tree(load_recipe(str(tmp_path / "mine.yaml"))) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("5E-4", 5e-4),
        ("0.0005", 5e-4),
        ("5.e-4", 5e-4),
        (".5e-3", 5e-4),
        ("1e0", 1.0),
        ("1", 1.0),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert load_recipe("tiny", [f"optimizer.peak_lr={text}"]).optimizer.peak_lr == value


def test_an_override_lies_over_the_recipe_and_the_last_one_counts() -> None:
    recipe = load_recipe("tiny", ["seed=1", "model.hidden_size=64", "seed=1_000", "masking.final_rate=0.15"])
    expected = to_tree(load_recipe("tiny"))
    expected["seed"], expected["model"]["hidden_size"], expected["masking"]["final_rate"] = 1000, 64, 0.15
    assert to_tree(recipe) == expected


@pytest.mark.parametrize("text", ["seed", "=3", "seed 3", ".seed=1", "model..hidden_size=3", "--seed=3", ""])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override '{text}' is not of the form key=value")):
        load_recipe("tiny", [text])


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("mosaicbert-bse")
    assert "'mosaicbert-bse'" in str(caught.value)
    assert all(name in str(caught.value) for name in shipped_recipes())


# -- DeepSpeed's JSON

SHIPPED_JSON = sorted((REPO / "ds_configs").glob("*.json"))
GOOD = json.loads((REPO / "ds_configs" / "zero2.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SHIPPED_JSON, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_accepts_what_we_ship(path: Path, precision: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    engine = EngineConfig(deepspeed=path.stem, precision=precision)
    recipe = load_recipe("mosaicbert-base")
    plan = plan_batches(recipe.batch, recipe.duration, world_size=1)
    config = DeepSpeedConfig(resolve_ds_config(read_ds_config(engine), engine, plan))
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (4096, 128)
    assert config.gradient_accumulation_steps == 32
    assert config.gradient_clipping == 0.0
    assert config.grad_accum_dtype == "fp32"
    stage = json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    assert config.zero_optimization_stage == stage
    assert config.bfloat16_config.enabled == (precision == "bf16" and stage != 0)


def _without(key: str) -> dict[str, Any]:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        (
            GOOD | {"gradient_cliping": 1.0},
            "unknown key 'gradient_cliping'; did you mean 'gradient_clipping'?",
        ),
        (
            GOOD | {"zero_optimisation": {}},
            "unknown key 'zero_optimisation'; did you mean 'zero_optimization'?",
        ),
        (GOOD | {"fp16": {"enabled": True}}, "unknown key 'fp16'"),
        (
            GOOD | {"train_batch_size": 32},
            "'train_batch_size' belongs to the recipe; set batch.global_batch_size",
        ),
        (GOOD | {"optimizer": {}}, "'optimizer' belongs to the recipe"),
        (GOOD | {"scheduler": {}}, "'scheduler' belongs to the recipe; set schedule there"),
        (_without("gradient_clipping"), "key 'gradient_clipping' is missing; state 0.0 for none"),
        (_without("data_types"), "key 'data_types' is missing"),
        (_without("bf16"), "key 'bf16' is missing"),
        (_without("zero_optimization"), "key 'zero_optimization' is missing"),
        (GOOD | {"data_types": {}}, "key 'data_types.grad_accum_dtype' is missing"),
        (GOOD | {"data_types": {"grad_acum_dtype": "fp32"}}, "did you mean 'data_types.grad_accum_dtype'?"),
        (GOOD | {"data_types": {"grad_accum_dtype": "fp8"}}, 'data_types.grad_accum_dtype is "fp8"'),
        (GOOD | {"data_types": "fp32"}, 'data_types is "fp32"'),
        (GOOD | {"bf16": {"enabeld": True}}, "unknown key 'bf16.enabeld'; did you mean 'bf16.enabled'?"),
        (GOOD | {"bf16": {"enabled": "false"}}, 'bf16.enabled is "false"'),
        (GOOD | {"bf16": True}, "bf16 is true"),
        (
            GOOD | {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "zero_optimization.overlap_com is true",
        ),
        (GOOD | {"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        (
            GOOD | {"zero_optimization": {"stage": True}},
            "zero_optimization.stage is true; allowed are 0, 1, 2 and 3",
        ),
        (GOOD | {"zero_optimization": {"stage": "1"}}, 'zero_optimization.stage is "1"; allowed are'),
        (GOOD | {"zero_optimization": {}}, "zero_optimization.stage is null"),
        (GOOD | {"zero_optimization": 2}, "zero_optimization is 2"),
        (
            GOOD | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpuu"}}},
            "zero_optimization.offload_optimizer.device",
        ),
        (  # no key is wrong alone
            GOOD | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "only supported for ZeRO Stage 3",
        ),
        (
            GOOD | {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "for another's, in training",
        ),
        *(
            (GOOD | {"gradient_clipping": value}, f"gradient_clipping is {json.dumps(value)}; ")
            for value in (-1, "abc", True, None, float("nan"), float("inf"), [1.0])
        ),
        ([GOOD], "holds list, not an object"),
    ],
)
def test_a_deepspeed_json_that_deepspeed_would_take_in_silence_is_refused(
    tree: Any, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_ds_config(EngineConfig(deepspeed=str(file)))
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


def test_layers_are_not_recomputed_where_their_bf16_weights_are_gone() -> None:
    model = ModelConfig(activation_checkpointing=True)
    for refused, engine in (
        (True, EngineConfig(deepspeed="zero0", precision="bf16")),
        (False, EngineConfig(deepspeed="zero1", precision="bf16")),
        (False, EngineConfig(deepspeed="zero0", precision="fp32")),
    ):
        ds_config = read_ds_config(engine)
        says = pytest.raises(ConfigError, match=r"at ZeRO stage 0 in bf16.*use engine\.deepspeed=zero1")
        with says if refused else contextlib.nullcontext():
            check_recomputation(model, engine, ds_config)


@pytest.mark.parametrize("text", ["", "{", '{"bf16": 1, "bf16": 2}', "\ufffe", '{"a":' * 5000, "null"])
def test_a_file_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.json"):
        read_ds_config(EngineConfig(deepspeed=str(file)))


def test_bf16_with_a_json_that_switches_it_off_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(GOOD | {"bf16": {"enabled": False}}), encoding="utf-8")
    recipe = load_recipe("tiny")
    plan = plan_batches(recipe.batch, recipe.duration, world_size=1)
    engine = EngineConfig(deepspeed=str(file), precision="bf16")
    with pytest.raises(ConfigError, match=r"engine.precision is bf16 but .* says bf16.enabled false"):
        resolve_ds_config(read_ds_config(engine), engine, plan)
    assert not resolve_ds_config(read_ds_config(engine), dataclasses.replace(engine, precision="fp32"), plan)[
        "bf16"
    ]["enabled"]
