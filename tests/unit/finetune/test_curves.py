"""The Pareto curve scores each checkpoint once; loss by length compares the same tokens."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mosaicbert_ds import cli
from mosaicbert_ds.config import RunConfig
from mosaicbert_ds.data.files import sha256_of
from mosaicbert_ds.errors import CheckpointError, ConfigError, DataError, UserError
from mosaicbert_ds.finetune.config import load_finetune_recipe
from mosaicbert_ds.finetune.lengths import evaluate_lengths
from mosaicbert_ds.finetune.models import export_checkpoint, load_masked_lm
from mosaicbert_ds.finetune.pareto import PUBLISHED, Point, catching_up, named_run, pareto, plot
from mosaicbert_ds.finetune.plan import choose_tasks
from mosaicbert_ds.finetune.report import SplitRows, are_official
from mosaicbert_ds.finetune.suite import Devices, glue_files
from mosaicbert_ds.finetune.tasks import GLUE
from mosaicbert_ds.model import ModelConfig, build_pretraining_model
from mosaicbert_ds.training.checkpoint import KINDS, find_checkpoint, write_step
from mosaicbert_ds.training.optimizer import OptimizerConfig
from mosaicbert_ds.typed_yaml import to_tree

SAMPLES = Path(__file__).resolve().parents[3] / "mosaicbert_ds" / "samples"
MODEL = ModelConfig(
    num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=32, vocab_size=512
)


def _save(run: Path, step: int, tokenizer: Path) -> None:
    """A step as pretraining on 8 GPUs at $2.50 saves it, half an hour after the one before."""
    torch.manual_seed(step)
    weights = {n: p.detach().clone() for n, p in build_pretraining_model(MODEL).named_parameters()}
    state = {
        "progress": {
            "step": step,
            "samples_seen": 4096 * step,
            "tokens_seen": 0,
            "elapsed_s": 2000.0 * step,
            "training_s": 1800.0 * step,
        },
        "tokenizer_sha256": sha256_of(tokenizer / "tokenizer.json"),
        "recipe": to_tree(RunConfig(model=MODEL, optimizer=OptimizerConfig())),
        "world_size": 8,
        "kept": True,
    }
    write_step(run / "checkpoints", step, dict.fromkeys(KINDS, weights), state)
    if not (run / "tokenizer").exists():
        shutil.copytree(tokenizer, run / "tokenizer")


def test_a_step_is_exported_by_any_path_with_the_tokenizer_that_it_was_trained_with(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere" / "checkpoints"
    _save(run, 1, models["tokenizer"])
    step = run / "checkpoints" / "step-00000001"
    elsewhere.mkdir(parents=True)
    (elsewhere / "best").symlink_to(step)
    (tmp_path / "elsewhere" / "tokenizer").mkdir()  # not the run's
    (tmp_path / "elsewhere" / "tokenizer" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(step)
    for number, path in enumerate((Path(), Path("../step-00000001"), elsewhere / "best")):
        export_checkpoint(find_checkpoint(path), tmp_path / str(number))
        assert sha256_of(tmp_path / str(number) / "tokenizer.json") == sha256_of(
            models["mosaicbert"] / "tokenizer.json"
        )
    with pytest.raises(UserError, match=r"^\. is the folder that you are in; name a new one in it$"):
        export_checkpoint(find_checkpoint(step), Path())
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"run/tokenizer does not hold the tokenizer of .*step-1?0*1"):
        export_checkpoint(find_checkpoint(step), tmp_path / "another")


def test_each_checkpoint_of_a_run_is_scored_once(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "my run", tmp_path / "out"
    recipe = load_finetune_recipe("glue", ["max_length=32", "tasks.mnli.epochs=1"])
    config = choose_tasks(recipe, ["mnli", "rte"], [1], from_pretrained=False)
    files = glue_files(SAMPLES / "glue", ["mnli", "rte"])

    def score() -> tuple[list[dict[str, str]], dict[Path, int]]:
        pareto([("mosaic", run)], config, files, out, devices=Devices())
        with (out / "pareto.csv").open() as file:
            return list(csv.DictReader(file)), {
                p: p.stat().st_mtime_ns for p in out.glob("jobs/*/result.json")
            }

    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        score()
    _save(run, 1, models["tokenizer"])
    first, jobs = score()
    _save(run, 2, models["tokenizer"])
    points, more_jobs = score()
    assert len(first) == 1 and points[0] == first[0] and len(jobs) == 2 and len(more_jobs) == 4
    assert jobs.items() <= more_jobs.items(), "what had a score was not run again"
    assert len({p["protocol"] for p in points}) == 1
    assert [(p["run"], p["step"], p["samples"]) for p in points] == [
        ("my run", "1", "4096"),
        ("my run", "2", "8192"),
    ]
    assert [float(points[1][cost]) for cost in ("hours", "gpu_hours", "dollars")] == [1.0, 8.0, 20.0]
    for point in points:
        results = json.loads(
            (out / "points" / f"my run-step-{int(point['step']):08d}/results.json").read_text()
        )
        assert float(point["score"]) == results["average"]["score"]
        assert float(point["low"]) <= float(point["score"]) <= float(point["high"]) and point["tasks"] == "2"
        assert point["is_official"] == "False", "two tasks, of the samples"
    assert (out / "pareto.png").stat().st_size > 10_000 and "<svg" in (out / "pareto.svg").read_text()
    assert not list(out.glob("jobs/*/model")) and not list(out.glob("models/*")), "no gigabytes stay"

    # RTE once more, at another rate: its start is gone from the disk and is made again.
    changed = load_finetune_recipe("glue", ["max_length=32", "tasks.mnli.epochs=1", "tasks.rte.epochs=1"])
    again = choose_tasks(changed, ["mnli", "rte"], [1], from_pretrained=False)
    scored = pareto([("mosaic", run)], again, files, out, devices=Devices())
    assert len(list(out.glob("jobs/*/result.json"))) == 6

    (run / "pareto.csv").write_text("of before")  # as after `--out RUN`; a folder with checkpoints is a run
    assert pareto([("mosaic", run)], again, files, out, devices=Devices()) == scored

    # What was scored elsewhere joins the picture by its table alone.
    shutil.rmtree(run)
    assert pareto([named_run(str(out))], again, files, tmp_path / "joined", devices=Devices()) == scored
    assert {p.curve for p in scored} == {"mosaic"} and named_run(f"bert={run}") == ("bert", run)
    with pytest.raises(
        ConfigError, match="means of mnli rte and of rte do not compare; give --tasks mnli rte"
    ):
        _save(tmp_path / "other", 1, models["tokenizer"])
        alone = choose_tasks(changed, ["rte"], [1], from_pretrained=True)
        pareto([named_run(str(out)), ("other", tmp_path / "other")], alone, files, out, devices=Devices())
    with pytest.raises(
        ConfigError, match="scores by different finetuning recipes, seeds, GLUE files or versions"
    ):
        pareto([named_run(str(out)), (None, tmp_path / "other")], config, files, out, devices=Devices())
    assert {
        p.curve for p in pareto([("old", out)], again, files, tmp_path / "renamed", devices=Devices())
    } == {"old"}
    table = (out / "pareto.csv").read_text().splitlines()
    for runs, code in (([out], 0), ([out, tmp_path / "other"], 2)):
        assert cli.main(["pareto", *map(str, runs), "--out", str(tmp_path / "by its table")]) == code
    assert (tmp_path / "by its table/pareto.csv").read_text().splitlines() == table
    assert "other has no score yet; give --glue-dir" in capsys.readouterr().err
    for curve, joined in (("mosaic", None), ("another", 2 * len(scored))):  # another run of the same name
        copy = tmp_path / f"of before {curve}"
        copy.mkdir()
        rows = [
            row.replace("mosaic,my run,1,4096", f"{curve},my run,1,9").replace("mosaic", curve)
            for row in table
        ]
        (copy / "pareto.csv").write_text("\n".join(rows) + "\n")
        both = [named_run(str(out)), named_run(str(copy))]
        if joined:
            assert len(pareto(both, again, files, tmp_path / "both", devices=Devices())) == joined
        else:
            with pytest.raises(ConfigError, match="has another score of my run step 1, curve mosaic"):
                pareto(both, again, files, tmp_path / "both", devices=Devices())
            both = [named_run(str(out)), named_run(f"copy={copy}")]
            assert len(pareto(both, again, files, tmp_path / "both", devices=Devices())) == 2 * len(scored)
    lines = (tmp_path / "joined/pareto.md").read_text().splitlines()
    assert "| MNLI | RTE |" in lines[0] and lines[3].startswith("| mosaic | 8.0 | 20.00 |")
    assert len(lines) == 6 and "NOT comparable with published GLUE" in lines[5]
    (out / "pareto.csv").write_text("run,step\nrun,1\n")
    with pytest.raises(DataError, match="is no table of"):
        pareto([named_run(str(out))], again, files, out, devices=Devices())


def _point(curve: str, minutes: float, score: float, is_official: bool = False) -> Point:
    return Point(
        curve=curve, run=f"{curve}-{minutes}", step=1, samples=1, hours=minutes / 60, gpu_hours=minutes / 60,
        dollars=None, score=score, low=score, high=score, tasks=8, is_official=is_official,
        protocol="", by_task={},
    )  # fmt: skip


def test_the_time_to_anothers_best_score_is_told() -> None:
    bert = [_point("bert", 5, 60.0), _point("bert", 20, 66.0), _point("bert", 40, 65.0)]
    mosaic = [_point("mosaic", 4, 64.0), _point("mosaic", 16, 68.0)]
    # 66 lies half way from 64 to 68, 8 minutes half way from 4 to 16 in their logarithms
    assert catching_up([*bert, *mosaic]) == [
        "mosaic reaches bert's best score, 66.0, after 8.0 GPU-minutes, bert after 20.0: 0.40 of its time."
    ]
    unsure = [replace(point, low=point.score - 3) for point in mosaic]
    (said,) = catching_up([*bert, *unsure])
    assert "0.40 of its time, within the 95 % intervals." in said
    late = _point("mosaic", 60, 75.0)  # clearly higher, but after bert was there
    (said,) = catching_up([*bert, *unsure, late])
    assert "0.40 of its time, within the 95 % intervals." in said
    (said,) = catching_up([*bert[:1], *mosaic])
    assert "60.0, after at most 4.0 GPU-minutes, bert after 5.0: 0.80" in said
    assert catching_up(bert) == catching_up([*bert, _point("mosaic", 30, 70.0)]) == []


def test_official_files_are_known_by_their_rows() -> None:
    rows = {
        name: {split: SplitRows(rows=n, broken=0) for split, n in task.official_rows.items()}
        for name, task in GLUE.items()
    }
    rows["qqp"]["train"] = SplitRows(rows=363_846, broken=3)  # as the official file is
    assert are_official(GLUE, rows)
    for split in ({}, {"dev_mismatched": SplitRows(rows=9_831, broken=0)}):
        matched = {key: rows["mnli"][key] for key in ("train", "dev_matched")}
        assert not are_official(GLUE, rows | {"mnli": matched | split})


def test_published_curves_stand_beside_scores_that_compare_with_them_only(tmp_path: Path) -> None:
    for is_official in (True, False):
        picture = tmp_path / f"{is_official}.svg"
        plot([_point("mosaic", 4, 64.0, True), _point("mosaic", 16, 68.0, is_official)], [picture])
        text = picture.read_text()
        assert ("published (8 A100)" in text) is is_official
        assert ("not comparable with published GLUE" in text) is not is_official


def test_the_published_curves_are_those_of_the_plot() -> None:
    (_, mosaic), (_, bert) = PUBLISHED.values()
    assert len(mosaic) == len(bert) == 10 and (mosaic[-1], bert[-1]) == (84.26, 83.51)
    assert all(hours == tuple(sorted(hours)) for hours, _ in PUBLISHED.values())


@pytest.mark.parametrize("architecture", ["mosaicbert", "bert"])
def test_loss_by_length_is_the_models_own_loss_on_the_same_tokens(
    architecture: str, models: dict[str, Path], tmp_path: Path
) -> None:
    text = str(SAMPLES / "pretrain" / "val.jsonl")
    short, long = evaluate_lengths(models[architecture], [text], [32, 64], tmp_path, "text", 2048)
    assert (short.pieces, long.pieces) == (2 * long.pieces, long.pieces) and long.pieces == 32
    # 15 % of the places that are no ends; the longer pieces have fewer ends, so all of the shorter's are in.
    assert short.masked < long.masked and long.masked == pytest.approx(0.15 * 62 * long.pieces, rel=0.15)
    for row in (short, long):
        # A model that was never trained: over places as over parts the mean is near log(vocabulary).
        assert row.loss == pytest.approx(np.log(512), abs=0.2) and len(row.by_position) == 16
        assert np.mean(row.by_position) == pytest.approx(row.loss, abs=0.05)
        assert 0 < row.std_error < 0.1
    assert all((tmp_path / name).exists() for name in ("lengths.json", "lengths.md", "lengths.png"))
    (ends,) = evaluate_lengths(models[architecture], [text], [16], tmp_path, "text", 2048)
    assert ends.by_position[0] is None and all(ends.by_position[1:-1]), "the ends are never masked"
    assert (tmp_path / "lengths.md").read_text().endswith(" |  |  |\n")


def test_loss_by_length_is_what_hugging_faces_labels_give(models: dict[str, Path], tmp_path: Path) -> None:
    """The same masked pieces through the padded face with labels, which has a loss of its own."""
    from mosaicbert_ds.data.loader import EVALUATION_SEED
    from mosaicbert_ds.data.masking import mask_tokens, sample_keys
    from mosaicbert_ds.data.tokenizer import load_tokenizer
    from mosaicbert_ds.finetune.lengths import _long_text

    text, tokenizer = str(SAMPLES / "pretrain" / "val.jsonl"), load_tokenizer(models["tokenizer"])
    (found,) = evaluate_lengths(models["mosaicbert"], [text], [64], tmp_path, "text", 640)
    stream = _long_text([text], tokenizer, 64, "text", 640)
    keys = sample_keys(EVALUATION_SEED, 0, np.arange(len(stream)))
    places, targets = mask_tokens(stream.reshape(-1), np.full(len(stream), 64), keys, 0.15, tokenizer)
    labels = np.full(stream.size, -100)
    labels[places] = targets
    labels = labels.reshape(stream.shape)
    stream[:, 0], stream[:, -1], labels[:, 0], labels[:, -1] = tokenizer.cls_id, tokenizer.sep_id, -100, -100
    with torch.no_grad():
        network = load_masked_lm(models["mosaicbert"])
        loss = network(torch.from_numpy(stream), labels=torch.from_numpy(labels)).loss
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("model", "lengths", "error", "said"),
    [
        ("mosaicbert", [32, 48], ConfigError, "length 32 is not allowed: each must be 16 or more and divide"),
        ("mosaicbert", [8, 16], ConfigError, "length 8 is not allowed"),
        ("bert", [64, 128], ConfigError, "length 128 is over the 64 positions"),
        ("mosaicbert", [32, 65536], DataError, "no document of .* has 65536 tokens"),
    ],
)
def test_a_length_that_cannot_be_is_refused(
    model: str, lengths: list[int], error: type, said: str, models: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        evaluate_lengths(
            models[model], [str(SAMPLES / "pretrain" / "val.jsonl")], lengths, tmp_path, "text", 999
        )


def test_text_and_a_tokenizer_that_do_not_belong_to_the_model_are_named(
    models: dict[str, Path], tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a b"}\n{"body": "a b"}\n')
    with pytest.raises(DataError, match=r"text\.jsonl, line 2: field 'text' is missing"):
        evaluate_lengths(models["bert"], [str(text)], [32], tmp_path, "text", 999)
    config = json.loads((models["bert"] / "config.json").read_text()) | {"vocab_size": 500}
    shutil.copytree(models["bert"], tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has 512 ids, the model 500"):
        evaluate_lengths(tmp_path / "bert", [str(text)], [32], tmp_path, "text", 999)
