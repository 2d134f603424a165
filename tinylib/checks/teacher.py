"""Checks of lesson 03: cross-entropy's gradient, the learning rate, precision to F1, the bootstrap."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylib.checks.core import Wrong, call, check, compare, generator
from tinylib.checks.start import number

RESAMPLES = 2000
FEW = 20


@check("cross_entropy_gradient")
def cross_entropy_gradient(attempt) -> None:
    """(p − y) / B for logits (B, K) and labels (B,)."""
    g = generator(3)
    for B, K in ((5, 3), (1, 4), (6, 2)):
        logits, labels = 2 * torch.randn(B, K, generator=g), torch.randint(K, (B,), generator=g)
        y, p = F.one_hot(labels, K).float(), logits.softmax(-1)
        mistakes = {
            "Every entry is 0: is the stub still there?": torch.zeros(B, K),
            "This is y − p, the way downhill; the gradient points uphill: p − y.": (y - p) / B,
            "This is y − p, and not yet divided by the B sentences of the mean; the gradient is p − y.": y - p,
            "Each row is right for its own sentence, but the loss is a mean over B sentences: divide by B.": p - y,
            "This is divided by all B·K numbers; the mean goes over the B sentences only.": (p - y) / B / K,
            "This is divided by the K classes; the mean goes over the B sentences.": (p - y) / K,
            "Your softmax runs over the batch (dim 0); each sentence's classes compete: dim -1.": (
                logits.softmax(0) - y
            )
            / B,
            "This is z − y: the logits have to go through softmax first.": (logits - y) / B,
            "This is p without y: the label is not used.": p / B,
            "This is −y: the probabilities are missing.": -y / B,
            "This is log p − y: use the probabilities, not their logarithms.": (logits.log_softmax(-1) - y) / B,
            "This is sigmoid(z) − y, for independent yes-or-no questions; here classes share one softmax.": (
                logits.sigmoid() - y
            )
            / B,
            "This is p(1 − p), softmax's own slope; the loss −log p cancels it.": p * (1 - p) / B,
            "This is −y/p, the slope with respect to p; the chain rule goes on through softmax to z.": -y / p / B,
            "Only the true class's entry is filled in; every other class has the gradient p too.": (p - y) * y / B,
        }
        compare(
            f"The gradient for {B} sentences of {K} classes",
            call(attempt, logits, labels),
            (p - y) / B,
            mistakes,
        )
    large = torch.tensor([[1000.0, 0.0, -1000.0]])
    got = call(attempt, large, torch.tensor([1]))
    if not isinstance(got, Tensor) or not torch.isfinite(got).all():
        raise Wrong("With a logit of 1000 you return NaN: exp overflows. torch.softmax subtracts the largest first.")
    compare("The gradient at a logit of 1000", got, torch.tensor([[1.0, -1.0, 0.0]]))


def schedule(step: int, steps: int, warmup: int, peak: float) -> float:
    """Return the linear schedule with warm-up, the check's own copy of the answer."""
    return peak * (step / warmup if step < warmup else (steps - step) / (steps - warmup))


SCHEDULE_MISTAKES = {
    "There is no warm-up: the first steps must rise from 0 to the peak.": lambda t, n, w, p: p * (n - t) / n,
    "The rate stays at its peak after the warm-up; it must fall to 0 at the last step.": lambda t, n, w, p: (
        p * min(1, t / w)
    ),
    "The rate is constant: it must rise during the warm-up and fall afterwards.": lambda t, n, w, p: p,
    "The fall is measured from step 0, so the rate jumps down when the warm-up ends: "
    "divide what is left by "
    "steps − warmup.": lambda t, n, w, p: p * (t / w if t < w else (n - t) / n),
    "The fall begins anew at the warm-up's end but is divided by all steps, so it does not reach 0.": (
        lambda t, n, w, p: p * (t / w if t < w else 1 - (t - w) / n)
    ),
    "This is a share from 0 to 1: multiply it by the peak.": lambda t, n, w, p: schedule(t, n, w, 1.0),
    "The warm-up counts from 1: at step 0 the rate is 0.": lambda t, n, w, p: (
        p * min((t + 1) / w, (n - t) / (n - w)) if t < w else schedule(t, n, w, p)
    ),
    "The warm-up's share is cut to whole numbers: use / instead of //.": lambda t, n, w, p: (
        p * (t // w if t < w else (n - t) / (n - w))
    ),
    "The rate is cut to whole numbers: use / instead of //.": lambda t, n, w, p: (
        p * (t // w if t < w else (n - t) // (n - w))
    ),
    "The fall follows a cosine; here it is a straight line.": lambda t, n, w, p: (
        p * (t / w if t < w else (1 + math.cos(math.pi * (t - w) / (n - w))) / 2)
    ),
    "The rise is missing its second half: the warm-up must end at the peak.": lambda t, n, w, p: (
        p * t / w / 2 if t < w else schedule(t, n, w, p)
    ),
    "Both halves are swapped: it must rise first and fall afterwards.": lambda t, n, w, p: (
        p * (1 - t / w if t < w else (t - w) / (n - w))
    ),
}


@check("learning_rate")
def learning_rate(attempt) -> None:
    """The linear schedule with warm-up, as a number for one step."""
    for steps, warmup, peak in ((20, 5, 1e-4), (90, 9, 3e-3), (7, 2, 1.0)):
        rates = [number("The rate", call(attempt, t, steps, warmup, peak)) for t in range(steps + 1)]

        def line(rule, n=steps, w=warmup, p=peak) -> Tensor:
            return torch.tensor([rule(t, n, w, p) / p for t in range(n + 1)])

        got = torch.tensor(rates) / peak
        mistakes = {sentence: line(rule) for sentence, rule in SCHEDULE_MISTAKES.items()}
        # A finer tolerance than elsewhere: neighbouring steps differ by little.
        for sentence, value in mistakes.items():
            if torch.allclose(got, value, atol=1e-5) and not torch.allclose(got, line(schedule), atol=1e-5):
                raise Wrong(sentence)
        if got.min() < -1e-6:
            raise Wrong(f"The rate becomes negative at step {int(got.argmin())}: the step would go uphill.")
        name = f"The rate over steps 0 to {steps} (divided by the peak)"
        compare(name, got, line(schedule), tolerance=1e-5)
    without = number("The rate", call(attempt, 0, 10, 0, 1.0))
    if abs(without - 1.0) > 1e-6:
        raise Wrong(f"With warmup=0 the first step takes the whole peak, but yours is {without:.3g} of it.")


@check("precision_recall_f1")
def precision_recall_f1(attempt) -> None:
    """Precision, recall and F1 of each class, (K, 3), from a confusion matrix (rows: true classes)."""
    tables = (
        torch.tensor([[50, 3, 2, 9], [8, 40, 7, 1], [0, 5, 30, 6], [4, 11, 0, 20]]),
        torch.tensor([[90, 10], [40, 60]]),
        torch.tensor([[7, 0, 5], [2, 0, 4], [1, 0, 9]]),  # class 1 is never predicted
    )
    for table in tables:
        wanted = _scores(table)
        got = call(attempt, table)
        if isinstance(got, Tensor) and got.is_floating_point():
            got = got.float()
        if isinstance(got, Tensor) and got.isnan().any() and not (table.sum(0) > 0).all():
            raise Wrong("A class that is never predicted gives 0/0 = NaN: its precision and F1 count as 0.")
        compare("The table of precision, recall and F1", got, wanted, _score_mistakes(table, wanted))


def _scores(table: Tensor) -> Tensor:
    right = table.diag().float()
    precision, recall = right / table.sum(0).clamp(min=1), right / table.sum(1).clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return torch.stack([precision, recall, f1], dim=1)


def _score_mistakes(table: Tensor, wanted: Tensor) -> dict[str, Tensor]:
    precision, recall, f1 = wanted.unbind(1)
    stack = lambda *columns: torch.stack(columns, dim=1)  # noqa: E731
    right, n = table.diag().float(), table.sum()
    true_negatives = n - table.sum(0) - table.sum(1) + right
    accuracy = (right + true_negatives) / n
    specificity = true_negatives / (n - table.sum(1))
    return {
        "Every entry is 0: is the stub still there?": torch.zeros_like(wanted),
        "Precision and recall are swapped: rows are the true classes, so a column holds all that was predicted.": (
            stack(recall, precision, f1)
        ),
        "One row a class, please: yours has one column a class; transpose it.": wanted.T,
        "These are the means over the classes (macro averages); give each class its own row.": wanted.mean(0),
        "F1 is the harmonic mean 2PR/(P+R), not the plain mean: a poor half must not hide.": (
            stack(precision, recall, (precision + recall) / 2)
        ),
        "F1 lacks its factor 2: with P = R it must give P.": stack(precision, recall, f1 / 2),
        "F1 is the harmonic mean 2PR/(P+R), not the geometric mean √(PR).": (
            stack(precision, recall, (precision * recall).sqrt())
        ),
        "F1 is not the product of precision and recall: divide by their sum, times 2.": (
            stack(precision, recall, precision * recall)
        ),
        "The third column is accuracy; F1 leaves the true negatives out.": stack(precision, recall, accuracy),
        "The second column is specificity (of the other classes, how many were left alone), not recall.": (
            stack(precision, specificity, 2 * precision * specificity / (precision + specificity))
        ),
        "You divide by all sentences: precision divides by what was predicted, recall by what is there.": (
            stack(right / n, right / n, right / n)
        ),
        "These are percentages; give shares between 0 and 1.": 100 * wanted,
        "The columns come in another order: precision, recall, F1.": stack(f1, precision, recall),
        "Precision and recall are the same in yours: one divides by the column's sum, one by the row's.": (
            stack(recall, recall, recall)
        ),
        "Precision and recall are the same here: one divides by the column's sum, one by the row's.": (
            stack(precision, precision, precision)
        ),
    }


@check("bootstrap_interval")
def bootstrap_interval(attempt) -> None:
    """The percentile interval of the accuracy, from N booleans (right or not)."""
    moved = False
    for N, share, level in ((400, 0.8, 0.95), (400, 0.8, 0.5), (1000, 0.9, 0.95)):
        right = torch.arange(N) < share * N
        right = right[torch.randperm(N, generator=generator(1))]
        runs = [_two(call(attempt, right, RESAMPLES, level, generator(s))) for s in (7, 7, 8, 9)]
        low, high = runs[0]
        if low > high:
            raise Wrong("The interval is upside down: return the low end first.")
        # Of many draws two unlike runs may end in the same shares, which step by 1/N; of few they hardly ever do.
        few = [[_two(call(attempt, right, FEW, level, generator(s))) for s in range(5)] for _ in range(2)]
        if runs[0] != runs[1] or few[0] != few[1]:
            raise Wrong("Two calls with the same generator differ: hand generator=generator to the random function.")
        if high - low < 1e-9:
            raise Wrong(
                "The interval has no width: draw *with* replacement. A permutation has the same mean each time."
            )
        _judge(*(sum(ends) / 3 for ends in zip(*runs[1:], strict=True)), N, share, level)
        moved = moved or len(set(runs)) > 1 or len(set(few[0])) > 1
    if not moved:
        raise Wrong(
            "Another generator gives the very same interval: draw with it; a formula or a fixed seed is no bootstrap."
        )
    try:
        low, high = _two(attempt(right, 1, 0.95, generator(1)))
    except Exception:  # noqa: BLE001 (a way to take quantiles that is right for many draws need not bear a single one)
        return
    if low != high:
        raise Wrong("With resamples=1 there is one draw, and both ends are its accuracy; yours differ: use the argument.")


def _judge(low: float, high: float, N: int, share: float, level: float) -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    error = math.sqrt(share * (1 - share) / N)
    half = normal.icdf(torch.tensor((1 + level) / 2)).item() * error
    near = lambda a, b: abs(a - b) < max(0.004, 0.13 * half)  # noqa: E731 (draws differ, and shares step by 1/N)
    if near(low, share - half) and near(high, share + half):
        return
    if (low, high) == (0.0, 1.0):
        raise Wrong("0 to 1 is always true and says nothing: is the stub still there?")
    centre, got_half = (low + high) / 2, (high - low) / 2
    if high > 1.5:
        raise Wrong(f"You return {low:.3g} to {high:.3g}: give shares between 0 and 1, not percentages or counts.")
    if near(centre, 1 - share) and not near(share, 1 - share):
        raise Wrong("This is the interval of the error rate; `right` is True where the prediction is right.")
    if near(centre, 0):
        raise Wrong("The interval lies around 0: these are deviations; give the ends themselves.")
    if level == 0.5 and abs(got_half - 1.96 * error) < 0.15 * error:
        raise Wrong("For level=0.5 you return the 95 % interval: use the argument `level`.")
    if got_half > 1.4 * half:
        raise Wrong(
            f"Your interval is {got_half / half:.2g} times too wide: take quantiles, not "
            "the smallest and largest draw, and draw as many sentences as there are."
        )
    if not near(centre, share):
        raise Wrong(
            f"The accuracy is {share}, but your interval lies around {centre:.3g}: does a draw repeat whole sentences?"
        )
    one_sided = normal.icdf(torch.tensor(level)).item() * error if level > 0.5 else None
    if one_sided and abs(got_half - one_sided) < 0.07 * half:
        raise Wrong("Both ends leave out 1 − level, which is twice too much: cut (1 − level)/2 at each end.")
    if abs(got_half - half * math.sqrt(N / RESAMPLES)) < 0.04 * error:
        raise Wrong("Each draw must hold N sentences, but yours holds as many as there are resamples: swap the two.")
    if abs(got_half - error) < 0.1 * error:
        raise Wrong(
            "This is one standard deviation to each side, about 68 %: take the quantiles that `level` asks for."
        )
    inner = normal.icdf(torch.tensor(1 - level / 2)).item() * error
    if level > 0.5 and abs(got_half - inner) < 0.1 * error:
        raise Wrong("You keep the middle 1 − level of the draws and leave `level` of them out: it is the other way round.")
    raise Wrong(
        f"Your interval is {low:.3f} to {high:.3f}, but {share - half:.3f} to "
        f"{share + half:.3f} is right within chance: each of "
        "the resamples must hold N sentences, and the ends are quantiles of their means."
    )


def _two(answer) -> tuple[float, float]:
    if isinstance(answer, Tensor | np.ndarray):
        answer = answer.flatten().tolist()
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Wrong("Return two numbers, (low, high).")
    return number("Each end", answer[0]), number("Each end", answer[1])
