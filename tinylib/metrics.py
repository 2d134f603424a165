"""How good a classifier or a regression is, how sure that is, and whether another one is really better.

scikit-learn and SciPy underneath, imported where they are needed: they take half a second and sixty megabytes, which a
training does without. Labels and predictions are class numbers 0, 1, 2, …, of a regression scores, as tensors (on any
device), arrays or lists, one a text.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from tinylib.errors import UserError

Numbers = torch.Tensor | np.ndarray | Sequence


def accuracy(labels: Numbers, predictions: Numbers) -> float:
    """Return the share of predictions that equal their label, in [0, 1].

    Raises UserError unless both sides are class numbers 0, 1, 2, …, as many on each and at least one.
    """
    labels, predictions = _aligned(labels=labels, predictions=predictions)
    return float((labels == predictions).mean())


def classification_report(labels: Numbers, predictions: Numbers) -> dict[str, float | list[int]]:
    """Return accuracy, macro precision, recall and F1 (each class counts alike), and the support.

    A class that is never predicted has precision 0. ``support`` is the number of texts of each class,
    0 … C-1. Raises UserError as ``accuracy`` does.
    """
    from sklearn import metrics as sk

    labels, predictions = _aligned(labels=labels, predictions=predictions)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(labels, predictions, average="macro", zero_division=0)
    support = np.bincount(labels, minlength=int(max(labels.max(), predictions.max())) + 1)
    report = {"accuracy": accuracy(labels, predictions), "precision": precision, "recall": recall, "f1": f1}
    return {name: float(value) for name, value in report.items()} | {"support": support.tolist()}


def matthews(labels: Numbers, predictions: Numbers) -> float:
    """Return Matthews' correlation coefficient in [-1, 1] (0 = no better than chance), CoLA's metric in GLUE.

    Raises UserError as ``accuracy`` does.
    """
    from sklearn import metrics as sk

    return float(sk.matthews_corrcoef(*_aligned(labels=labels, predictions=predictions)))


def positive_f1(labels: Numbers, predictions: Numbers) -> float:
    """Return the F1 of class 1 alone, the metric of MRPC and QQP in GLUE; 0 where it is never predicted.

    Raises UserError as ``accuracy`` does.
    """
    from sklearn import metrics as sk

    labels, predictions = _aligned(labels=labels, predictions=predictions)
    return float(sk.f1_score(labels == 1, predictions == 1, zero_division=0))


def pearson(labels: Numbers, predictions: Numbers) -> float:
    """Return Pearson's correlation of scores in [-1, 1]: how straight the line is; 0 where one side is constant.

    Of STS-B it is GLUE's first metric.
    Raises UserError unless both sides are finite numbers, as many on each and at least one.
    """
    labels, predictions = _scores(labels=labels, predictions=predictions)
    one, two = labels - labels.mean(), predictions - predictions.mean()
    size = np.linalg.norm(one) * np.linalg.norm(two)
    # a constant less its rounded mean need not be 0
    flat = any(np.ptp(values) == 0 for values in (labels, predictions))
    return 0.0 if flat or size == 0 else float(np.clip(one @ two / size, -1.0, 1.0))


def spearman(labels: Numbers, predictions: Numbers) -> float:
    """Return Spearman's rank correlation of scores in [-1, 1]: Pearson's of the ranks; STS-B's second metric.

    Raises UserError as ``pearson`` does.
    """
    from scipy.stats import rankdata

    labels, predictions = _scores(labels=labels, predictions=predictions)
    return pearson(rankdata(labels), rankdata(predictions))


def rmse(labels: Numbers, predictions: Numbers) -> float:
    """Return the root of the mean squared error of scores, in their own unit. Raises UserError as ``pearson`` does."""
    labels, predictions = _scores(labels=labels, predictions=predictions)
    return float(np.sqrt(np.square(labels - predictions).mean()))


SCORE_METRICS = {"pearson": pearson, "spearman": spearman, "rmse": rmse}


# GLUE's metric of each task that has classes (Wang et al. 2019, table 1); the others are measured by accuracy.
GLUE: dict[str, tuple[str, Callable[[Numbers, Numbers], float]]] = {
    "glue/cola": ("matthews", matthews),
    "glue/mrpc": ("f1 of class 1", positive_f1),
    "glue/qqp": ("f1 of class 1", positive_f1),
}


def of_task(data: str) -> tuple[str, Callable[[Numbers, Numbers], float]]:
    """Return the name and the function of the metric that a data set is reported by."""
    return GLUE.get(str(data).lower(), ("accuracy", accuracy))


def confusion(labels: Numbers, predictions: Numbers, classes: int | None = None) -> np.ndarray:
    """Return the (C, C) confusion matrix of counts: row = true class, column = predicted class.

    ``classes`` is C; without it, as many as the largest number among labels and predictions asks for.
    Raises UserError as ``accuracy`` does, and for a class that is not below ``classes``.
    """
    from sklearn import metrics as sk

    labels, predictions = _aligned(labels=labels, predictions=predictions)
    largest = int(max(labels.max(), predictions.max()))
    if classes is not None and largest >= classes:
        raise UserError(
            f"class {largest} occurs, but classes={classes} allows 0 to {classes - 1}; pass classes={largest + 1}"
        )
    return sk.confusion_matrix(labels, predictions, labels=np.arange(classes or largest + 1))


def bootstrap_interval(
    labels: Numbers,
    predictions: Numbers,
    metric: Callable[..., float] = accuracy,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of ``metric(labels, predictions)``.

    The texts are drawn again with replacement, label and prediction together, ``resamples`` times; the
    interval holds the middle ``level`` share of the metric's values. It says how the figure would vary with
    another test set of this size, not with another training run. ``metric`` must return one number.
    Source: Efron & Tibshirani 1993, section 13.3.
    Raises UserError as ``accuracy`` does (for the metrics of scores, as ``pearson``), unless 0 < level < 1,
    and for ``resamples`` below 1.
    """
    align = _scores if metric in SCORE_METRICS.values() else _aligned
    labels, predictions = align(labels=labels, predictions=predictions)
    if not 0 < level < 1:
        raise UserError(f"level={level} must lie between 0 and 1; the usual one is 0.95")
    if resamples < 1:
        raise UserError(f"resamples={resamples} must be at least 1; 2000 are usual")
    rng, n = np.random.default_rng(seed), len(labels)
    if metric is accuracy:
        # The number of right texts in a draw is binomial: the same distribution without drawing the rows.
        values = rng.binomial(n, accuracy(labels, predictions), size=resamples) / n
    else:
        draws = (rng.integers(0, n, size=n) for _ in range(resamples))
        values = np.array([float(metric(labels[rows], predictions[rows])) for rows in draws])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(labels: Numbers, a: Numbers, b: Numbers) -> float:
    """Return the exact two-sided p value of "classifiers ``a`` and ``b`` err equally often" (McNemar 1947).

    Only the texts on which exactly one of the two is right count. If neither were better, each such text
    would be a fair coin: a binomial test. The p value is 1 when there is no such text. Raises UserError
    as ``accuracy`` does.
    """
    from scipy.stats import binomtest

    labels, a, b = _aligned(labels=labels, a=a, b=b)
    only_a, only_b = int(((a == labels) & (b != labels)).sum()), int(((a != labels) & (b == labels)).sum())
    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def mean_and_spread(values: Numbers) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (over n - 1; 0 for a single value), as over seeds.

    Raises UserError unless ``values`` is one row of at least one number.
    """
    numbers = _array("values", values).astype(float)
    return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0


def _array(name: str, values: Numbers) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16
    array = np.asarray(values)
    if array.ndim != 1:
        shape = tuple(array.shape)
        raise UserError(
            f"{name} has shape {shape}, but one number a text is needed; logits become classes by .argmax(-1)"
        )
    if not len(array):
        raise UserError(f"{name} is empty; at least one value is needed")
    return array


def _of_one_length(columns: dict[str, Numbers]) -> dict[str, np.ndarray]:
    """Return arrays of one length; refuse others with their name."""
    arrays = {name: _array(name, values) for name, values in columns.items()}
    first = next(iter(arrays))
    for name, array in arrays.items():
        if len(array) != len(arrays[first]):
            raise UserError(
                f"{len(arrays[first])} {first} but {len(array)} {name}; pass one of each a text, in the same order"
            )
    return arrays


def _scores(**columns: Numbers) -> list[np.ndarray]:
    """Return arrays of finite numbers, all of one length; refuse anything else with its name."""
    arrays = _of_one_length(columns)
    for name, array in arrays.items():
        if array.dtype.kind not in "iubf" or not np.isfinite(array).all():
            odd = array[0] if array.dtype.kind not in "iubf" else array[~np.isfinite(array)][0]
            raise UserError(f"{name} must be finite numbers, but hold {odd!s} ({array.dtype}); a score a text is needed")
    return [array.astype(np.float64) for array in arrays.values()]


def _aligned(**columns: Numbers) -> list[np.ndarray]:
    """Return whole-number arrays of one length; refuse anything else with its name."""
    arrays = _of_one_length(columns)
    for name, array in arrays.items():
        if array.dtype.kind not in "iub" or (array.dtype.kind == "i" and array.min() < 0):
            found = array.min() if array.dtype.kind == "i" else array[0]
            raise UserError(
                f"{name} must be class numbers 0, 1, 2, …, but hold {found!s} ({array.dtype}); "
                "take .argmax(-1) of logits, or the label's number"
            )
    return [array.astype(np.int64) for array in arrays.values()]
