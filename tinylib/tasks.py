"""The two kinds of task, classes and scores (a regression): the loss with the labels, the figure that counts, the report.

A model's head says which it is: of one output it is a regression's (``BertConfig.head_for``).
"""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tinylib import metrics
from tinylib.config import BertConfig
from tinylib.text import Encoded
from tinylib.train import Batch, LossFn, classification_loss, predict

NO_CLASS, NO_SCORE = -100, float("nan")  # the label of a text that has none: no loss with labels counts it


def regression_loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the mean squared error of the scores, the loss that fine-tuning minimises; rows of ``NO_SCORE`` do not count."""
    scores = model(batch["ids"], batch["mask"], batch["segments"]).logits[:, 0]
    known = ~batch["labels"].isnan()
    return {"labels": (scores.float() - batch["labels"])[known].square().mean()}


def label_loss(config: BertConfig) -> LossFn:
    """Return the loss with the labels that belongs to a model's head."""
    return regression_loss if config.head == "regression" else classification_loss


@contextlib.contextmanager
def standard_units(model: nn.Module, encoded: Encoded, targets: Tensor, texts: int = 256) -> Iterator[Tensor]:
    """Yield the targets of a training of these texts, scores less their mean and over their spread; classes as they are.

    Inside, a regression's head gives its scores in those units, the mean of its guesses (over the first ``texts``) moved to
    that of the targets and their spread, where it is larger, made that of the targets; at the end it is put back into the
    scores' own. Adam moves a weight by about the learning rate a
    step, whatever the loss's size, so at the small rates of fine-tuning a head that begins at 0 would take the whole run to
    reach scores around 50, and never their spread. The loss is the mean squared error over the squared spread.
    targets: (N,) labels or (N, K) logits of a teacher, in the order of ``encoded``.
    """
    if not targets.is_floating_point() or (targets.ndim == 2 and targets.shape[1] > 1):
        yield targets
        return
    exact = targets.double()
    mean, spread = float(exact.mean()), float(exact.std()) if len(exact) > 1 else 0.0
    if spread <= 1e-7 * abs(mean):  # one score for all, but for roundings
        spread = 1.0
    some = range(min(texts, len(encoded)))
    guesses = predict(model, encoded.select(some)).double()
    # a new head knows no unit: where scores differ by little, its guesses would lie apart by many of their spreads
    wide = float(guesses.std()) if len(some) > 1 else 0.0
    smaller = min(1.0, spread / wide) if wide else 1.0
    begin = float(targets.flatten()[: len(some)].mean())
    head = [part for part in model.modules() if isinstance(part, nn.Linear) and part.out_features == 1][-1]
    with torch.no_grad():
        head.weight *= smaller / spread
        head.bias.copy_((smaller * (head.bias - float(guesses.mean())) + begin - mean) / spread)
    try:
        yield (targets - mean) / spread
    finally:
        with torch.no_grad():
            head.weight *= spread
            head.bias.copy_(head.bias * spread + mean)


def without_labels(labels: Tensor, count: int) -> Tensor:
    """Return labels (count,) of the kind of ``labels`` that say that there are none."""
    return labels.new_full((count,), NO_SCORE if labels.is_floating_point() else NO_CLASS)


def figure(logits: Float[Tensor, "N K"]) -> str:
    """Return the name of the figure that a task is judged by: accuracy, of scores Pearson's correlation."""
    return "accuracy" if logits.shape[1] > 1 else "pearson"


def told(logits: Float[Tensor, "N K"]) -> Tensor:
    """Return what a model says of each text (N,): the class of the largest logit, or the score."""
    return logits.argmax(-1) if logits.shape[1] > 1 else logits[:, 0]


def score(labels: Tensor, logits: Float[Tensor, "N K"], data: str = "") -> float:
    """Return the figure that a task is judged by: of classes accuracy or GLUE's own of the task ``data``, of scores Pearson's."""
    judge = metrics.of_task(data)[1] if logits.shape[1] > 1 else metrics.pearson
    return judge(labels, told(logits))


def figures(labels: Tensor, logits: Float[Tensor, "N K"], data: str = "") -> dict[str, float]:
    """Return what a teacher is compared by: accuracy (and the ``score`` of a GLUE task that has one), or the three of scores."""
    said = told(logits)
    if logits.shape[1] == 1:
        return {name: metric(labels, said) for name, metric in metrics.SCORE_METRICS.items()}
    metric, measured = metrics.of_task(data)
    more = {} if metric == "accuracy" else {"score": measured(labels, said)}
    return {"accuracy": metrics.accuracy(labels, said)} | more


def report(labels: Tensor, logits: Float[Tensor, "N K"], data: str = "") -> dict:
    """Return the figures of a split by name, accuracy and those of scores with their 95 % bootstrap interval.

    Of classes accuracy, precision, recall and F1 (macro), and GLUE's own ``score`` where the task ``data`` has one; of scores
    Pearson, Spearman and RMSE, and nothing of classes.
    """
    said, found = told(logits), {}
    if logits.shape[1] == 1:
        for name, metric in metrics.SCORE_METRICS.items():
            found |= {name: metric(labels, said), f"{name}_interval_95": list(metrics.bootstrap_interval(labels, said, metric))}
        return {"metric": "pearson"} | found
    scores = metrics.classification_report(labels, said)
    interval = list(metrics.bootstrap_interval(labels, said))
    found = {"accuracy": scores.pop("accuracy"), "accuracy_interval_95": interval}
    found |= {name: scores[name] for name in ("precision", "recall", "f1")}
    metric, measured = metrics.of_task(data)
    return found if metric == "accuracy" else found | {"metric": metric, "score": measured(labels, said)}
