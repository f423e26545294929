"""From a recipe to jobs: stages in order, and a fingerprint of everything that decides a result."""

from dataclasses import replace
from pathlib import Path

import pytest

from mosaicbert_ds.errors import ConfigError
from mosaicbert_ds.finetune.config import FinetuneConfig, load_finetune_recipe
from mosaicbert_ds.finetune.plan import Job, TaskData, choose_tasks, plan_jobs
from mosaicbert_ds.finetune.tasks import GLUE

# recipe.md, section GLUE: starts from, epochs, rate, decay, batch, seeds
PUBLISHED = {
    "mnli": ("pretrained", 3, 5e-5, 5e-6, 48, (19,)),
    "qnli": ("pretrained", 10, 1e-5, 1e-6, 16, (19,)),
    "qqp": ("pretrained", 5, 3e-5, 3e-6, 16, (19,)),
    "sst2": ("pretrained", 3, 3e-5, 3e-6, 16, (19, 8364, 717)),
    "cola": ("pretrained", 10, 5e-5, 5e-6, 32, (19, 8364, 717, 10536)),
    "rte": ("mnli", 3, 1e-5, 1e-5, 16, (19, 8364, 717, 10536, 90166)),
    "mrpc": ("mnli", 10, 8e-5, 8e-6, 32, (19, 8364, 717, 10536, 90166)),
    "stsb": ("mnli", 10, 3e-5, 3e-6, 32, (19, 8364, 717, 10536, 90166)),
}
ROWS = {name: TaskData(num_rows=t.official_rows["train"], splits={"train": name}) for name, t in GLUE.items()}
FACTS = {"model": "m", "tokenizer": "t", "precision": "bf16", "pads": False}


def jobs_of(config: FinetuneConfig, **changes) -> list[Job]:
    return plan_jobs(config, GLUE, changes.pop("data", ROWS), **(FACTS | changes))


def test_the_glue_recipe_states_the_published_protocol() -> None:
    config = load_finetune_recipe("glue")
    found = {
        name: (t.starts_from, t.epochs, t.peak_lr, t.weight_decay, t.batch_size, t.seeds)
        for name, t in config.tasks.items()
    }
    assert found == PUBLISHED
    assert (config.max_length, config.betas, config.eps) == (256, (0.9, 0.98), 1e-6)
    assert (config.schedule.warmup, config.schedule.final_lr_fraction) == (0.06, 0.0)
    decays = {name: round(config.optimizer(name).adamw_weight_decay, 9) for name in config.tasks}
    assert decays == dict.fromkeys(PUBLISHED, 0.1) | {"rte": 1.0}


def test_a_recipe_that_extends_the_published_one_differs_by_what_it_says(tmp_path: Path) -> None:
    published, short = load_finetune_recipe("glue"), load_finetune_recipe("glue-short")
    rates = {"mnli": 1e-4, "qnli": 4e-5, "rte": 2e-5, "mrpc": 1.6e-4, "stsb": 6e-5}
    tasks = {
        name: replace(row, peak_lr=rates.get(name, row.peak_lr)) for name, row in published.tasks.items()
    }
    assert short == replace(published, tasks=tasks)
    (tmp_path / "mine.yaml").write_text("extends: glue-short\ntasks: {rte: {epochs: 5}}\n")
    assert load_finetune_recipe(str(tmp_path / "mine.yaml")) == replace(
        short, tasks=tasks | {"rte": replace(tasks["rte"], epochs=5)}
    )


def test_jobs_come_after_their_start_and_else_the_longest_first() -> None:
    jobs = jobs_of(load_finetune_recipe("glue"))
    assert len(jobs) == 25 and len({job.name for job in jobs}) == 25
    assert jobs[0].task == "mnli" and jobs[0].steps == 3 * 8182 and jobs[0].keep_model
    names = [job.name for job in jobs]
    for job in jobs:
        if job.task in ("rte", "mrpc", "stsb"):
            assert job.after == jobs[0].name and names.index(job.after) < names.index(job.name)
        else:
            assert job.after is None
    alone = [job.steps for job in jobs[1:] if job.after is None]
    assert alone == sorted(alone, reverse=True)
    assert not any(job.keep_model for job in jobs[1:])


def test_a_stage_takes_the_same_seed_where_there_is_one() -> None:
    jobs = jobs_of(choose_tasks(load_finetune_recipe("glue"), ["mnli", "rte"], [3, 4], False))
    starts = {job.seed: job.name for job in jobs if job.task == "mnli"}
    assert {job.seed: job.after for job in jobs if job.task == "rte"} == starts


def test_rte_without_mnli_is_refused_unless_the_pretrained_start_is_asked_for() -> None:
    config = load_finetune_recipe("glue")
    with pytest.raises(ConfigError, match=r"rte starts from the finished mnli.*--from-pretrained"):
        choose_tasks(config, ["rte"], None, from_pretrained=False)
    jobs = jobs_of(choose_tasks(config, ["rte"], None, from_pretrained=True))
    assert {job.after for job in jobs} == {None}


@pytest.mark.parametrize(
    ("arguments", "overrides", "said"),
    [
        ((["wnli"], None), [], "task 'wnli' is unknown; the recipe has mnli, qnli"),
        ((None, [1, 1]), [], "--seeds 1 1 name one twice"),
        ((None, [1, -1]), [], "--seeds 1 -1 are not all whole numbers from 0"),
        ((None, None), ["tasks.rte.starts_from=wnli"], "tasks.rte.starts_from is 'wnli'; allowed are"),
    ],
)
def test_a_wrong_choice_is_named(arguments, overrides, said) -> None:
    with pytest.raises(ConfigError, match=said):
        choose_tasks(load_finetune_recipe("glue", overrides), *arguments, False)


def test_tasks_that_start_from_each_other_are_refused() -> None:
    config = load_finetune_recipe("glue", ["tasks.mnli.starts_from=rte"])
    with pytest.raises(ConfigError, match="in a circle: mnli -> rte -> mnli"):
        jobs_of(choose_tasks(config, None, None, False))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks.rte.epoch=1", "unknown key 'tasks.rte.epoch'; did you mean 'tasks.rte.epochs'?"),
        ("tasks.my-task.epochs=1", "key 'tasks.my-task.peak_lr' is missing"),
        ("max_lenght=1", "did you mean 'max_length'?"),
        ("tasks.rte.seeds=[]", "tasks.rte.seeds"),
        ("tasks.rte.seeds=[1,1]", "name one twice"),
        ("precision=fp16", "precision"),
    ],
)
def test_a_recipe_is_strict(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_finetune_recipe("glue", [override])
    assert said in str(caught.value)


def test_the_fingerprint_changes_with_what_decides_the_result_and_with_nothing_else() -> None:
    config = choose_tasks(load_finetune_recipe("glue"), ["mnli", "rte"], [1], False)

    def prints(config: FinetuneConfig = config, **changes) -> dict[str, str]:
        return {job.task: job.fingerprint for job in jobs_of(config, **changes)}

    def changed(*overrides: str) -> FinetuneConfig:
        return choose_tasks(load_finetune_recipe("glue", list(overrides)), ["mnli", "rte"], [1], False)

    same = (changed("tasks.cola.epochs=1"), changed("sort_window=3"), changed("precision=fp32"))
    assert all(prints(other) == prints() for other in same), "not what a job's numbers depend on"
    both = (
        changed("max_length=64"),
        changed("shuffle=false"),
        changed("hidden_dropout=null"),
        changed("tasks.mnli.epochs=1"),
    )
    for now in (
        *(prints(other) for other in both),
        prints(model="n"),
        prints(tokenizer="u"),
        prints(precision="fp32"),
        prints(data=ROWS | {"mnli": replace(ROWS["mnli"], splits={"train": "other"})}),
    ):
        assert now["mnli"] != prints()["mnli"] and now["rte"] != prints()["rte"], "the stage is part of it"
    only_rte = prints(changed("tasks.rte.peak_lr=1e-3"))
    assert only_rte["mnli"] == prints()["mnli"] and only_rte["rte"] != prints()["rte"]
    assert prints(changed("sort_window=3"), pads=True) != prints(pads=True)
