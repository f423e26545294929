"""The commands of finetuning over the sample tasks: the suite killed and resumed, shared, failing."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from mosaicbert_ds import cli
from mosaicbert_ds.data.tokenizer import train_tokenizer
from mosaicbert_ds.errors import CheckpointError, ConfigError, DataError, TrainingError
from mosaicbert_ds.finetune import job as job_module
from mosaicbert_ds.finetune.batches import epoch_batches
from mosaicbert_ds.finetune.config import load_finetune_recipe
from mosaicbert_ds.finetune.models import find_pretrained, load_classifier
from mosaicbert_ds.finetune.plan import choose_tasks
from mosaicbert_ds.finetune.suite import Devices, finetune, glue_files
from mosaicbert_ds.finetune.tasks import GLUE
from mosaicbert_ds.model import ModelConfig, build_pretraining_model, export_model
from mosaicbert_ds.training.faults import EXIT_STOPPED

SAMPLES = Path(__file__).resolve().parents[2] / "mosaicbert_ds" / "samples"
COMMAND = [sys.executable, "-m", "mosaicbert_ds.cli", "finetune"]
SHORT = ["max_length=32", *(f"tasks.{name}.epochs=2" for name in ("qnli", "qqp", "cola", "mrpc", "stsb"))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer([str(SAMPLES / "pretrain" / "val.jsonl")], folder / "tokenizer", 512)
    config = ModelConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64, vocab_size=512
    )
    torch.manual_seed(0)
    weights = {n: p.detach().clone() for n, p in build_pretraining_model(config).named_parameters()}
    export_model(weights, config, folder / "tokenizer", folder / "exported")
    return folder / "exported"


def glue(model: Path, out: Path, *arguments: str) -> list[str]:
    fixed = ["--model", str(model), "--glue-dir", str(SAMPLES / "glue"), "--out", str(out)]
    return [*COMMAND, "glue", *fixed, "--jobs", "2", *arguments]


def scores(out: Path) -> dict:
    results = json.loads((out / "results.json").read_text())
    return {key: results[key] for key in ("tasks", "average", "notes")}


def answers(out: Path) -> dict[str, dict[str, np.ndarray]]:
    return {
        file.parent.name: safetensors.numpy.load_file(file) for file in out.glob("jobs/*/answers.safetensors")
    }


# What the test below starts and kills: the command itself, but saving after every chunk of steps.
SAVING_OFTEN = """
import sys
from mosaicbert_ds import cli
from mosaicbert_ds.finetune import suite
suite.SAVE_EVERY_S = 0.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.timeout(900)
def test_the_suite_killed_and_stopped_in_the_middle_gives_what_an_undisturbed_one_gives(
    model: Path, tmp_path: Path
) -> None:
    """Eight tasks, two seeds, staged. SIGKILL hits the queue, its server and its jobs alike; SIGTERM, as a
    scheduler sends it, all of them too, or the queue alone, which passes it on."""
    arguments = ("--seeds", "1", "2", "--set", *SHORT)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(glue(model, whole, *arguments), check=True, capture_output=True, timeout=600)
    again = [sys.executable, "-c", SAVING_OFTEN, *glue(model, killed, *arguments)[3:]]

    def is_mid_job() -> bool:
        return any(killed.glob("jobs/qnli-*.work/checkpoints/step-*[0-9]/manifest.json"))

    def are_done(count: int) -> bool:
        return len(list(killed.glob("jobs/*/result.json"))) >= count

    for moment, send, number in (
        (is_mid_job, os.killpg, signal.SIGKILL),
        (lambda: are_done(6), os.killpg, signal.SIGTERM),
        (lambda: are_done(9), os.kill, signal.SIGTERM),
    ):
        with (tmp_path / "said.txt").open("w") as said:
            process = subprocess.Popen(again, start_new_session=True, stdout=said)
        while not moment():
            assert process.poll() is None, "it ended before the moment came"
            time.sleep(0.01)
        send(process.pid, number)
        assert process.wait() == (-number if number == signal.SIGKILL else EXIT_STOPPED)
        lines = (tmp_path / "said.txt").read_text()
        assert "ended" not in lines and "killed" not in lines, "the queue lost a job"
    assert re.search(r"mnli-.*: accuracy [0-9.]+; [0-9]+ s\n", lines)
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("jobs/*/result.json")}
    assert 8 <= len(finished) < 16
    assert not (killed / "results.json").exists()
    subprocess.run(again, check=True, capture_output=True, timeout=600)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "a finished job ran again"
    assert any("goes on from step" in log.read_text() for log in killed.glob("jobs/qnli-*/log.txt"))

    assert scores(killed) == scores(whole)
    first, second = answers(whole), answers(killed)
    assert len(first) == 16 and first.keys() == second.keys()
    for name, arrays in first.items():
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, second[name][key], err_msg=f"{name} {key}")

    table = (whole / "results.md").read_text()
    assert "NOT comparable with published GLUE" in table and "nan" not in table.lower()
    assert "MNLI dev_mismatched is absent" in table
    results = scores(whole)
    mean = np.mean([row["score"] for row in results["tasks"].values()])
    assert results["average"]["score"] == pytest.approx(mean) and results["average"]["is_glue"]


def test_queues_that_share_a_folder_share_the_jobs(model: Path, tmp_path: Path) -> None:
    """Three commands at once, as on three nodes of a Slurm job."""
    command = glue(model, tmp_path, "--tasks", "mnli", "rte", "stsb", "--seeds", "1", "2", "--set", *SHORT)
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0 and "mean of 3 tasks" in out
    logs = list(tmp_path.glob("jobs/*/log.txt"))
    assert len(logs) == 6 and not list(tmp_path.glob("jobs/*.work"))
    assert all(log.read_text().count(" on cpu of ") == 1 for log in logs), "each job ran once"


def _finetune(
    model: Path, out: Path, files: dict, overrides: list[str], said: list[str] | None = None
) -> dict:
    config = load_finetune_recipe("glue", [*SHORT, *overrides])
    config = choose_tasks(config, list(files), [1], False)
    pretrained = find_pretrained(model, out / "models")
    tasks = {name: GLUE[name] for name in files}
    say = said.append if said is not None else print
    return finetune(config, tasks, files, pretrained, out, devices=Devices(), say=say)


def test_a_failed_job_is_reported_and_the_rest_goes_on(model: Path, tmp_path: Path) -> None:
    """MNLI with numbers that leave none finite (AdamW's decay: 1 / 1e-320); RTE has nothing to start from."""
    files = glue_files(SAMPLES / "glue", ["mnli", "rte", "cola"])
    with pytest.raises(TrainingError) as caught:
        _finetune(model, tmp_path, files, ["tasks.mnli.peak_lr=1e-320", "tasks.mnli.weight_decay=1.0"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["tasks"]) == ["cola"] and results["average"]["tasks"] == 1
    notes = "\n".join(results["notes"])
    assert "is not finite; lower peak_lr" in notes
    assert "not run, since mnli-seed1-" in notes
    said_last = str(caught.value)
    assert "2 of 3 jobs have no result: mnli-seed1-" in said_last and said_last.count("not finite") == 1
    assert "; 1 start from these and were not run; the same command" in said_last and "rte" not in said_last
    said: list[str] = []
    _finetune(model, tmp_path, files, [], said)  # mended
    assert (tmp_path / "results.md").read_text().count("| RTE |") == 1


def test_a_damaged_model_is_said_once_and_starts_no_job(model: Path, tmp_path: Path) -> None:
    damaged, out = tmp_path / "damaged", tmp_path / "out"
    shutil.copytree(model, damaged)
    weights = safetensors.numpy.load_file(damaged / "model.safetensors")
    del weights["bert.encoder.layer.0.mlp.wo.weight"]
    safetensors.numpy.save_file(weights, damaged / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing bert\.encoder\.layer\.0\.mlp\.wo\.weight"):
        _finetune(damaged, out, glue_files(SAMPLES / "glue", ["mnli", "rte"]), [])
    assert not list(out.glob("jobs/*"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file cannot be made: File exists"):
        _finetune(model, tmp_path / "file", {}, [])


def test_the_staged_start_is_the_finished_runs_encoder_and_pooler(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What RTE's trainer holds at step 0, against the last weights of MNLI's."""
    seen: dict[str, dict[str, torch.Tensor]] = {}
    train = job_module._train

    def weights(trainer):  # type: ignore[no-untyped-def]
        return {name: weight.detach().clone() for name, weight in trainer._model.named_parameters()}

    def spy(spec, trainer, *others):  # type: ignore[no-untyped-def]
        assert trainer.steps_done == 0
        seen[f"{spec.job.task} first"] = weights(trainer)
        finished = train(spec, trainer, *others)
        seen[f"{spec.job.task} last"] = weights(trainer)
        return finished

    class InThisProcess:
        """Runs the jobs one after the other, in their order."""

        def __init__(self, specs, *_):  # type: ignore[no-untyped-def]
            self.specs = specs

        def run(self):  # type: ignore[no-untyped-def]
            from mosaicbert_ds.finetune.run import Outcome

            outcomes = {}
            for spec in self.specs:
                spec.work.mkdir()
                assert job_module.run_job(spec, torch.device("cpu"))
                result = json.loads((spec.finished / "result.json").read_text())
                outcomes[spec.job.name] = Outcome(result=result)
            return outcomes

    monkeypatch.setattr(job_module, "_train", spy)
    monkeypatch.setattr("mosaicbert_ds.finetune.suite.Queue", InThisProcess)
    _finetune(model, tmp_path, glue_files(SAMPLES / "glue", ["mnli", "rte"]), [])
    mnli, rte, pretrained = seen["mnli last"], seen["rte first"], seen["mnli first"]
    body = [name for name in rte if not name.startswith("classifier")]
    assert "bert.pooler.dense.weight" in body
    assert all(torch.equal(rte[name], mnli[name]) for name in body)
    assert not any(torch.equal(rte[name], pretrained[name]) for name in body), "MNLI trained all of it"
    assert rte["classifier.weight"].shape != mnli["classifier.weight"].shape
    fresh = load_classifier(model, GLUE["rte"], seed=1).classifier.weight
    assert rte["classifier.weight"].std() == pytest.approx(fresh.std().item(), rel=0.3)


def test_a_task_of_ones_own_is_scored_and_its_model_kept(model: Path, tmp_path: Path, capsys) -> None:
    from transformers import AutoModelForSequenceClassification

    data = SAMPLES / "domain" / "medquad_qtype"
    half = tmp_path / "half.jsonl"
    half.write_text("".join((data / "dev.jsonl").read_text().splitlines(keepends=True)[::2]))
    files = ["--train", data / "train.jsonl", "--dev", data / "dev.jsonl", "--test", half]
    options = ["--text", "question", "text", "--metrics", "accuracy", "macro_f1", "--seeds", "1"]
    recipe = ["--set", "max_length=32", "tasks.task.epochs=1"]
    arguments = ["--model", model, "--out", tmp_path / "out", *files, *options, *recipe]
    assert cli.main(["finetune", "task", *map(str, arguments)]) == 0
    said = capsys.readouterr().out
    task = scores(tmp_path / "out")["tasks"]["task"]
    of_test = [metric["mean"] for metric in task["metrics"] if metric["split"] == "test"]
    assert task["score"] == pytest.approx(np.mean(of_test)) and len(of_test) == 2, "dev is for choosing"
    assert "| task | macro F1 (test) |" in said and f"model in {tmp_path / 'out' / 'jobs'}" in said
    (kept,) = (tmp_path / "out").glob("jobs/*/model")
    changed_ns = kept.stat().st_mtime_ns
    arguments[arguments.index("macro_f1")] = "matthews"  # asked for later, of the answers that are there
    assert cli.main(["finetune", "task", *map(str, arguments)]) == 0
    assert "| task | Matthews (test) |" in capsys.readouterr().out and kept.stat().st_mtime_ns == changed_ns
    classifier = AutoModelForSequenceClassification.from_pretrained(kept, trust_remote_code=True)
    labels = {json.loads(line)["label"] for line in (data / "train.jsonl").read_text().splitlines()}
    assert set(classifier.config.id2label.values()) == labels


def test_a_regression_of_years_is_learned_and_answered_in_years(model: Path, tmp_path: Path) -> None:
    """A new head begins at 0, and 2,000 is thousands of steps away."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [f"{'word ' * (1 + number % 9)}{number}" for number in range(120)]
    rows = [json.dumps({"text": text, "year": 2000 + 3 * len(text.split())}) + "\n" for text in texts]
    (tmp_path / "train.jsonl").write_text("".join(rows[:96]))
    (tmp_path / "dev.jsonl").write_text("".join(rows[96:]))
    files = ["--train", tmp_path / "train.jsonl", "--dev", tmp_path / "dev.jsonl"]
    options = ["--text", "text", "--label", "year", "--kind", "regression", "--seeds", "1"]
    recipe = ["--set", "max_length=32", "tasks.task.epochs=60", "tasks.task.peak_lr=2e-3"]
    arguments = ["--model", model, "--out", tmp_path / "out", *files, *options, *recipe]
    assert cli.main(["finetune", "task", *map(str, arguments)]) == 0
    (job,) = (tmp_path / "out").glob("jobs/task-*")
    answers = safetensors.numpy.load_file(job / "answers.safetensors")
    said, years = answers["dev.logits"][:, 0], answers["dev.labels"]
    assert np.abs(said - years).mean() < 0.5 * np.abs(years - years.mean()).mean(), "better than the mean"
    tokenizer = AutoTokenizer.from_pretrained(job / "model", trust_remote_code=True)
    kept = AutoModelForSequenceClassification.from_pretrained(job / "model", trust_remote_code=True).eval()
    assert tokenizer.model_max_length == 32 and kept.config.id2label == {0: "year"}
    with torch.no_grad():
        logits = kept(**tokenizer(texts[96:], return_tensors="pt", padding=True)).logits[:, 0]
    assert np.abs(logits.numpy() - said).max() < 0.01, "in the user's numbers; fp32 has 1e-4 at 2,000"
    with pytest.raises(DataError, match=r"labels are 1700000030 give or take 30, .* subtract 1700000030"):
        job_module._Scale.of(replace(GLUE["stsb"], label_range=None), 1.7e9 + np.array([0.0, 60.0]))


def test_test_files_become_a_submission(model: Path, tmp_path: Path) -> None:
    files = glue_files(SAMPLES / "glue", ["rte", "stsb", "cola"])
    for name, columns in (
        ("rte", ("sentence1", "sentence2")),
        ("stsb", ("sentence1", "sentence2")),
        ("cola", ("sentence",)),
    ):
        path = tmp_path / name / "test.tsv"
        path.parent.mkdir()
        rows = ["\t".join(("index", *columns)), *("\t".join((str(i), *columns)) for i in range(5))]
        path.write_text("\n".join(rows) + "\n")
        files[name]["test"] = path
    config = choose_tasks(load_finetune_recipe("glue", SHORT), ["rte", "stsb", "cola"], [1], True)
    tasks = {name: GLUE[name] for name in files}
    (tmp_path / "out" / "submission").mkdir(parents=True)
    (tmp_path / "out" / "submission" / "SST-2.tsv").write_text("of another model")
    finetune(config, tasks, files, find_pretrained(model, tmp_path), tmp_path / "out", devices=Devices())
    assert {path.stem for path in tmp_path.glob("out/submission/*")} == {"RTE", "CoLA", "STS-B"}
    for file, allowed in (("RTE", {"entailment", "not_entailment"}), ("CoLA", {"0", "1"}), ("STS-B", None)):
        lines = (tmp_path / "out" / "submission" / f"{file}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == list(
            "01234"
        )
        predictions = [line.split("\t")[1] for line in lines[1:]]
        assert set(predictions) <= allowed if allowed else all(0 <= float(p) <= 5 for p in predictions)


def test_no_shuffling_is_the_order_of_the_file() -> None:
    config = load_finetune_recipe("glue", ["shuffle=false"])
    lengths = np.arange(3, 103)
    order = np.concatenate(epoch_batches(1, 3, lengths, 16, shuffle=config.shuffle, sort_window=16))
    assert order.tolist() == list(range(100))


def test_a_hostfile_runs_the_command_on_its_hosts_with_its_arguments_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssh` is a script that runs the line in a shell, as sshd does, and notes the host."""
    shim = tmp_path / "bin" / "ssh"
    shim.parent.mkdir()
    shim.write_text(
        f'#!/bin/bash\necho "$4" >> {shlex.quote(str(tmp_path / "hosts"))}\n'
        'line="${5/ --gpus ?/}"\nexec bash -c "$line"\n'  # no GPU here to give them
    )
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}:{os.environ['PATH']}")
    out = tmp_path / "out with $HOME; 'quotes'"
    (tmp_path / "hostfile").write_text("node0 slots=2  # first\n\nnode1 slots=4\n")
    arguments = glue(model, out, "--tasks", "mnli", "rte", "--seeds", "1", "--set", *SHORT)[3:]
    assert cli.main([*arguments, "--hostfile", str(tmp_path / "hostfile"), "--gpus", "7"]) == 0
    assert sorted((tmp_path / "hosts").read_text().split()) == ["node0", "node1"]
    assert (out / "results.md").exists() and len(list(out.glob("jobs/*/log.txt"))) == 2
    with pytest.raises(SystemExit):  # each host would else start it on all hosts
        cli.main([*arguments, "--hostf", str(tmp_path / "hostfile")])
    for text in ("-oProxyCommand=x slots=1\n", "a slots=0\n", "a\n", "a slots=1\na slots=1\n", "\n"):
        (tmp_path / "bad").write_text(text)
        assert cli.main([*arguments, "--hostfile", str(tmp_path / "bad")]) == 2
