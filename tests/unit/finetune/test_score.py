"""Metrics are those of scikit-learn and SciPy; where those have no number there is a reason."""

import warnings

import numpy as np
import pytest
import sklearn.metrics as theirs
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mosaicbert_ds.finetune import score
from mosaicbert_ds.finetune.score import Answers, bootstrap, interval, task_score
from mosaicbert_ds.finetune.tasks import GLUE

CLASSES = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n).map(np.array)] * 2)
)


@given(CLASSES)
def test_classification_metrics_are_those_of_scikit_learn_also_where_a_class_is_missing(pair) -> None:
    predictions, labels = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert score.accuracy(predictions, labels) == pytest.approx(
            theirs.accuracy_score(labels, predictions)
        )
        assert score.matthews(predictions, labels) == pytest.approx(
            theirs.matthews_corrcoef(labels, predictions), abs=1e-12
        )
        assert score.macro_f1(predictions, labels) == pytest.approx(
            theirs.f1_score(labels, predictions, average="macro")
        )
        two = predictions % 2, labels % 2
        assert score.f1(*two) == pytest.approx(theirs.f1_score(two[1], two[0], zero_division=0))


def test_matthews_counts_do_not_overflow() -> None:
    """Products of counts of 400,000 rows leave 64 bits behind when they are multiplied once more."""
    labels = np.arange(400_000) % 2
    predictions = np.where(np.arange(400_000) % 10 == 0, 1 - labels, labels)
    assert score.matthews(predictions, labels) == pytest.approx(theirs.matthews_corrcoef(labels, predictions))


@given(
    st.integers(2, 50).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(-3, 3), min_size=n, max_size=n).map(np.array)] * 2)
    )
)
def test_correlations_are_those_of_scipy_with_ties_and_have_a_reason_where_scipy_has_nan(pair) -> None:
    predictions, labels = pair[0] * 0.5, pair[1] * 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for ours, their in ((score.spearman, stats.spearmanr), (score.pearson, stats.pearsonr)):
            value, expected = ours(predictions, labels), their(predictions, labels)[0]
            if np.isnan(expected):
                assert value in ("all predictions are equal", "all labels are equal")
            else:
                assert value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_no_numbers_give_a_reason(bad: float) -> None:
    for metric in (score.spearman, score.pearson):
        assert metric(np.array([0.0, bad, 1.0]), np.array([0.0, 1.0, 2.0])) == (
            "not all predictions are finite"
        )


def test_a_task_score_is_the_plain_mean_over_seeds_splits_and_metrics() -> None:
    labels = np.array([1, 1, 0, 0])
    runs = [
        {"dev": Answers(np.array(predicted), labels)}
        for predicted in ([1, 1, 0, 0], [1, 0, 0, 0])  # accuracy 1, 0.75; F1 1, 2/3
    ]
    assert task_score(GLUE["mrpc"], runs) == pytest.approx((1 + 1 + 0.75 + 2 / 3) / 4)
    constant = [{"dev": Answers(np.zeros(4), np.arange(4.0))}]
    assert task_score(GLUE["stsb"], constant) == 0.0  # no correlation counts as none


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 dev sets of 200 rows, each row right with probability 0.8."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        right = rng.random(200) < 0.8
        runs = [{"dev": Answers(right.astype(int), np.ones(200, int))}]
        low, high = interval(bootstrap(GLUE["rte"], runs, rng, replicates=200))
        covered += low <= 0.8 <= high
    assert 180 <= covered <= 200  # 190 expected, 3 standard deviations are 9


def test_the_interval_is_wider_where_seeds_differ() -> None:
    labels = np.ones(1000, int)
    good, bad = np.ones(1000, int), (np.arange(1000) % 2).astype(int)
    rng = np.random.default_rng(0)
    alike = interval(bootstrap(GLUE["rte"], [{"dev": Answers(bad, labels)}] * 2, rng, 200))
    differing = interval(bootstrap(GLUE["rte"], [{"dev": Answers(p, labels)} for p in (good, bad)], rng, 200))
    assert alike[1] - alike[0] < 0.1 < differing[1] - differing[0]
