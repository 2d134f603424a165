"""Metrics against scikit-learn, SciPy and the binomial formula; every refusal is a sentence."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, pearsonr, spearmanr
from sklearn import metrics as sk

from tinylib.errors import UserError
from tinylib.metrics import (
    accuracy,
    bootstrap_interval,
    classification_report,
    confusion,
    mcnemar,
    mean_and_spread,
    of_task,
    pearson,
    rmse,
    spearman,
)

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


def draw(n: int, share_right: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels and predictions of two classes, exactly that share of them right."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=g)
    wrong = torch.randperm(n, generator=g)[: n - round(share_right * n)]
    predictions = labels.clone()
    predictions[wrong] = 1 - predictions[wrong]
    return labels, predictions


@given(pairs)
def test_the_report_agrees_with_scikit_learn(rows):
    labels, predictions = zip(*rows, strict=True)
    report = classification_report(list(labels), list(predictions))
    theirs = sk.precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)
    assert [report["precision"], report["recall"], report["f1"]] == pytest.approx(theirs[:3])
    assert report["accuracy"] == accuracy(labels, predictions) == sk.accuracy_score(labels, predictions)
    assert sum(report["support"]) == len(labels)


@given(pairs)
def test_the_confusion_matrix_has_true_classes_as_rows(rows):
    labels, predictions = map(list, zip(*rows, strict=True))
    table = confusion(labels, predictions, classes=4)
    assert table.shape == (4, 4)
    for true, predicted in rows:
        table[true, predicted] -= 1
    assert not table.any()


def test_tensors_arrays_and_lists_give_the_same():
    labels, predictions = draw(50, 0.8)
    for kind in (torch.Tensor.numpy, torch.Tensor.tolist, lambda t: t.to(torch.uint8)):
        assert accuracy(kind(labels), predictions) == accuracy(labels, predictions) == 0.8
        assert classification_report(kind(labels), predictions) == classification_report(labels, predictions)
    assert accuracy(labels.bool(), predictions.bool()) == 0.8


def test_a_class_that_is_never_predicted_counts_as_zero():
    report = classification_report([0, 0, 1, 2], [0, 0, 1, 1])
    assert report["precision"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert report["support"] == [2, 1, 1]


def test_the_bootstrap_interval_is_that_of_the_binomial():
    labels, predictions = draw(1000, 0.87)
    low, high = bootstrap_interval(labels, predictions, resamples=20_000)
    assert (low, high) == pytest.approx(binom(1000, 0.87).interval(0.95) / np.array(1000), abs=0.002)
    narrow = bootstrap_interval(labels, predictions, level=0.5)
    assert low < narrow[0] < 0.87 < narrow[1] < high


def test_the_short_cut_for_accuracy_is_the_same_as_drawing_rows():
    labels, predictions = draw(400, 0.9)
    by_rows = bootstrap_interval(labels, predictions, metric=lambda a, b: float((a == b).mean()))
    assert bootstrap_interval(labels, predictions) == pytest.approx(by_rows, abs=0.006)


def test_the_bootstrap_takes_any_metric_and_its_seed_decides():
    labels, predictions = draw(300, 0.8)
    f1 = lambda a, b: classification_report(a, b)["f1"]  # noqa: E731
    first, again, other = (
        bootstrap_interval(labels, predictions, f1, resamples=100, seed=s) for s in (3, 3, 4)
    )
    assert first == again != other
    assert first[0] < f1(labels, predictions) < first[1]


def test_mcnemar_counts_only_the_disagreements():
    labels = [0] * 30
    a = [0] * 10 + [1] * 2 + [0] * 18
    b = [1] * 10 + [0] * 2 + [0] * 18  # 10 that only a gets right, 2 that only b does
    assert mcnemar(labels, a, b) == mcnemar(labels, b, a) == pytest.approx(2 * binom(12, 0.5).cdf(2))
    assert mcnemar(labels, a, a) == 1.0
    assert mcnemar(labels[:12], a[:12], b[:12]) == mcnemar(labels, a, b)


def test_mean_and_spread_is_the_sample_standard_deviation():
    assert mean_and_spread([0.86, 0.87, 0.88]) == pytest.approx((0.87, 0.01))
    assert mean_and_spread(torch.tensor([2.0])) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: accuracy([0, 1], [0]), "2 labels but 1 predictions"),
        (lambda: mcnemar([0, 1], [0, 1], [0]), "2 labels but 1 b"),
        (lambda: accuracy([], []), "labels is empty"),
        (lambda: accuracy([0], [[0.1, 0.9]]), r"logits become classes by .argmax\(-1\)"),
        (lambda: accuracy([0, 1], [0.1, 0.9]), "predictions must be class numbers"),
        (lambda: accuracy([0, -1], [0, 1]), "labels must be class numbers"),
        (lambda: accuracy(["good"], ["bad"]), "labels must be class numbers"),
        (lambda: confusion([0, 3], [0, 1], classes=2), "pass classes=4"),
        (lambda: bootstrap_interval([0, 1], [0, 1], level=95.0), "between 0 and 1"),
        (lambda: bootstrap_interval([0, 1], [0, 1], resamples=0), "at least 1"),
        (lambda: mean_and_spread([]), "values is empty"),
    ],
)
def test_a_mistake_gets_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_each_glue_task_has_its_own_metric():
    """Against the formulas written out, and accuracy for every other data set."""
    labels, predictions = [1, 1, 1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 1, 0, 0]
    tp, tn, fp, fn = 3, 3, 1, 1
    by_hand = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    name, cola = of_task("glue/cola")
    assert name == "matthews"
    assert cola(labels, predictions) == pytest.approx(by_hand)
    assert cola(labels, [0] * 8) == 0
    assert of_task("glue/mrpc")[1](labels, predictions) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert of_task("glue/qqp")[1](labels, [0] * 8) == 0
    for other in ("glue/sst2", "glue/mnli", "movie_reviews", "/some/file.csv"):
        assert of_task(other) == ("accuracy", accuracy)


# Scores

reals = st.lists(st.tuples(st.integers(-50, 50), st.floats(-100, 100, width=32)), min_size=2, max_size=40)


@given(reals)
def test_correlations_agree_with_scipy(rows):
    labels, predictions = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        assert pearson(labels, predictions) == spearman(labels, predictions) == 0.0
        return
    assert spearman(labels, predictions) == pytest.approx(spearmanr(labels, predictions).statistic, abs=1e-9)
    if np.ptp(predictions) > 1e-3:  # below, SciPy itself warns of its rounding
        assert pearson(labels, predictions) == pytest.approx(pearsonr(labels, predictions).statistic, abs=1e-6)
    assert rmse(labels, predictions) == pytest.approx(np.sqrt(sk.mean_squared_error(labels, predictions)))


def test_a_constant_correlates_with_nothing_though_its_mean_is_rounded():
    tenths = [0.1] * 3
    assert np.mean(tenths) != 0.1
    assert pearson(tenths, tenths) == spearman(tenths, tenths) == 0.0


def test_the_bootstrap_interval_of_a_correlation_is_that_of_fisher():
    g = np.random.default_rng(0)
    labels = g.normal(size=800)
    predictions = 0.8 * labels + 0.6 * g.normal(size=800)
    found, (low, high) = pearson(labels, predictions), bootstrap_interval(labels, predictions, pearson)
    fisher = np.tanh(np.arctanh(found) + np.array([-1, 1]) * 1.96 / np.sqrt(797))
    assert (low, high) == pytest.approx(tuple(fisher), abs=0.01)
    for metric in (spearman, rmse):
        low, high = bootstrap_interval(labels, predictions, metric, resamples=200)
        assert low < metric(labels, predictions) < high


def test_scores_as_tensors_and_lists_give_the_same():
    labels, predictions = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.5, 2.0, 3.0])
    for metric in (pearson, spearman, rmse):
        assert metric(labels.tolist(), predictions) == pytest.approx(metric(labels, predictions.numpy()))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pearson([1.0, 2.0], [1.0]), "2 labels but 1 predictions"),
        (lambda: rmse([1.0, float("nan")], [1.0, 2.0]), "labels must be finite numbers, but hold nan"),
        (lambda: spearman([1.0, 2.0], ["a", "b"]), "predictions must be finite numbers, but hold a"),
        (lambda: rmse([], []), "labels is empty"),
        (lambda: bootstrap_interval([0.5, 1.5], [0.5, 1.5]), "labels must be class numbers"),
    ],
)
def test_scores_that_are_none_are_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_training_loads_no_scikit_learn():
    """It takes half a second and sixty megabytes, which stand beside what training takes."""
    code = "import sys, tinylib.distill, tinylib.metrics; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_bfloat16_is_a_number_too():
    values = torch.tensor([0.5, 1.5, -2.0, 3.0])
    assert pearson(values, values.bfloat16()) == pytest.approx(1.0)
