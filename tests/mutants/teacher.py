"""Lesson 03."""

import math

import numpy as np
import torch
import torch.nn.functional as F


def hot(z, labels):
    return F.one_hot(labels, z.shape[-1]).float()


def p(z):
    return z.softmax(-1)


def naive_softmax(z, labels):
    e = z.exp()
    return (e / e.sum(-1, keepdim=True) - hot(z, labels)) / len(z)


def in_place(z, labels):
    z.copy_(z.softmax(-1))
    z[torch.arange(len(z)), labels] -= 1
    return z / len(z)


def only_true_class(z, labels):
    return (p(z) - hot(z, labels)) * hot(z, labels) / len(z)


def by_index(z, labels):
    gradient = p(z)
    gradient[torch.arange(len(z)), labels] -= 1
    return gradient / len(z)


def by_logsumexp(z, labels):
    chances = (z - z.logsumexp(-1, keepdim=True)).exp()
    return (chances - torch.eye(z.shape[1])[labels]) / z.shape[0]


CROSS_ENTROPY = [
    (lambda z, y: (hot(z, y) - p(z)) / len(z), "uphill"),
    (lambda z, y: p(z) - hot(z, y), "divide by B"),
    (lambda z, y: (p(z) - hot(z, y)) / z.numel(), "B·K"),
    (lambda z, y: (p(z) - hot(z, y)) / z.shape[1], "K classes"),
    (lambda z, y: (z.softmax(0) - hot(z, y)) / len(z), "dim -1"),
    (lambda z, y: (z - hot(z, y)) / len(z), "softmax first"),
    (lambda z, y: p(z) / len(z), "label is not used"),
    (lambda z, y: -hot(z, y) / len(z), "probabilities are missing"),
    (lambda z, y: (z.log_softmax(-1) - hot(z, y)) / len(z), "logarithms"),
    (lambda z, y: (z.sigmoid() - hot(z, y)) / len(z), "sigmoid"),
    (lambda z, y: -hot(z, y) / p(z) / len(z), "chain rule"),
    (lambda z, y: p(z) * (1 - p(z)) / len(z), "cancels"),
    (only_true_class, "other class"),
    (lambda z, y: F.cross_entropy(z, y), "shape"),
    (lambda z, y: ((p(z) - hot(z, y)) / len(z)).double(), "float64"),
    (lambda z, y: (p(z) - hot(z, y)) / 5, "too small"),
    (lambda z, y: ((p(z) - hot(z, y)) / len(z)).numpy(), "should be a tensor"),
    (naive_softmax, "overflows"),
    (in_place, "in place"),
    (lambda z, y: torch.zeros_like(z), "stub"),
    (lambda z, y: None, "return"),
]


def rate(step, steps, warmup, peak):
    if step < warmup:
        return peak * step / warmup
    return peak * (steps - step) / (steps - warmup)


def rate_by_min(step, steps, warmup, peak):
    return peak * min(step / max(warmup, 1) if warmup else 1.0, (steps - step) / (steps - warmup))


def as_tensor(step, steps, warmup, peak):
    return torch.tensor(rate(step, steps, warmup, peak))


def by_interpolation(step, steps, warmup, peak):
    return np.interp(step, [0, warmup, steps], [0, peak, 0]) if warmup else peak * (1 - step / steps)


def cosine(t, n, w, peak):
    return peak * t / w if t < w else peak * (1 + math.cos(math.pi * (t - w) / (n - w))) / 2


def no_warmup_guard(t, n, w, peak):
    return min(peak * t / w, peak * (n - t) / (n - w))


SCHEDULE = [
    (lambda t, n, w, peak: peak * (n - t) / n, "no warm-up"),
    (lambda t, n, w, peak: peak * min(1, t / max(w, 1)), "stays at its peak"),
    (lambda t, n, w, peak: peak, "constant"),
    (lambda t, n, w, peak: peak * (t / w if t < w else (n - t) / n), "jumps down"),
    (lambda t, n, w, peak: peak * (t / w if t < w else 1 - (t - w) / n), "does not reach 0"),
    (lambda t, n, w, peak: rate(t, n, w, 1.0), "multiply it by the peak"),
    (lambda t, n, w, peak: peak * (t + 1) / w if t < w else rate(t, n, w, peak), "counts from 1"),
    (lambda t, n, w, peak: peak * (t // w) if t < w else rate(t, n, w, peak), "instead of //"),
    (lambda t, n, w, peak: peak * (1 - t / w) if t < w else peak * (t - w) / (n - w), "swapped"),
    (cosine, "cosine"),
    (no_warmup_guard, "division by zero"),
    (lambda t, n, w, peak: peak * (t / w if t < w else (n - 2 * t) / (n - w)), "negative"),
    (lambda t, n, w, peak: 1e-4 * rate(t, n, w, 1.0), "too small"),
    (lambda t, n, w, peak: [rate(t, n, w, peak)], "one number"),
]


def scores(table):
    right = table.diag()
    precision = right / table.sum(0).clamp(min=1)
    recall = right / table.sum(1).clamp(min=1)
    return torch.stack([precision, recall, 2 * precision * recall / (precision + recall).clamp(min=1e-9)], 1)


def scores_by_loop(table):
    rows = []
    for c in range(len(table)):
        true = float(table[c, c])
        missed, false = float(table[c].sum()) - true, float(table[:, c].sum()) - true
        rows.append(
            [
                true / (true + false) if true + false else 0.0,
                true / (true + missed) if true + missed else 0.0,
                2 * true / (2 * true + missed + false) if true + missed + false else 0.0,
            ]
        )
    return torch.tensor(rows)


def scores_in_double(table):
    return scores(table.double())


def with_third(rule):
    def mutant(table):
        precision, recall, _ = scores(table).unbind(1)
        return torch.stack([precision, recall, rule(precision, recall)], 1)

    return mutant


def accuracy_for_f1(table):
    right, n = table.diag(), table.sum()
    precision, recall, _ = scores(table).unbind(1)
    return torch.stack([precision, recall, (n - table.sum(0) - table.sum(1) + 2 * right) / n], 1)


def specificity_for_recall(table):
    right, n = table.diag(), table.sum()
    spared = (n - table.sum(0) - table.sum(1) + right) / (n - table.sum(1))
    precision = scores(table)[:, 0]
    return torch.stack([precision, spared, 2 * precision * spared / (precision + spared)], 1)


def not_a_number(table):
    right = table.diag()
    precision, recall = right / table.sum(0), right / table.sum(1)
    return torch.stack([precision, recall, 2 * precision * recall / (precision + recall)], 1)


def diagonal_taken_out(table):
    right, wanted = table.diag().clone(), scores(table)
    missed = table.fill_diagonal_(0).sum(1)
    wanted[:, 1] = right / (right + missed)
    return wanted


def two_classes_only(table):
    tn, fp, fn, tp = table[:2, :2].flatten()
    both = [[tn / (tn + fn), tn / (tn + fp)], [tp / (tp + fp), tp / (tp + fn)]]
    return torch.tensor([[a, b, 2 * a * b / (a + b)] for a, b in both])


SCORES = [
    (lambda table: scores(table)[:, [1, 0, 2]], "swapped"),
    (lambda table: scores(table.T), "swapped"),
    (lambda table: scores(table).T, "transpose"),
    (lambda table: scores(table).mean(0), "macro"),
    (with_third(lambda a, b: (a + b) / 2), "plain mean"),
    (with_third(lambda a, b: a * b / (a + b)), "factor 2"),
    (with_third(lambda a, b: (a * b).sqrt()), "geometric"),
    (with_third(lambda a, b: a * b), "product"),
    (accuracy_for_f1, "true negatives"),
    (specificity_for_recall, "specificity"),
    (lambda table: (table.diag() / table.sum())[:, None].repeat(1, 3), "all sentences"),
    (lambda table: 100 * scores(table), "percentages"),
    (lambda table: scores(table)[:, [2, 0, 1]], "another order"),
    (lambda table: scores(table)[:, [1, 1, 1]], "row's"),
    (not_a_number, "never predicted"),
    (two_classes_only, "shape"),
    (lambda table: torch.zeros(len(table), 3), "stub"),
    (lambda table: scores(table).numpy(), "should be a tensor"),
    (diagonal_taken_out, "changes its input `table` in place"),
]


def draws(right, resamples, generator):
    N = len(right)
    return right.float()[torch.randint(N, (resamples, N), generator=generator)].mean(1)


def interval(right, resamples, level, generator):
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2])
    low, high = draws(right, resamples, generator).quantile(ends)
    return low.item(), high.item()


def interval_by_sorting(right, resamples, level, generator):
    N, means = len(right), []
    for _ in range(resamples):
        means.append(right[torch.randint(0, N, (N,), generator=generator)].double().mean().item())
    means.sort()
    cut = int(resamples * (1 - level) / 2)
    return means[cut], means[resamples - 1 - cut]


def upside_down(right, resamples, level, generator):
    return interval(right, resamples, level, generator)[::-1]


def unseeded(right, resamples, level, generator):
    return interval(right, resamples, level, torch.Generator().manual_seed(torch.seed() % 2**31))


def fixed_seed(right, resamples, level, generator):
    return interval(right, resamples, level, torch.Generator().manual_seed(0))


def formula(right, resamples, level, generator):
    a = right.float().mean().item()
    z = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + level) / 2)).item()
    half = z * math.sqrt(a * (1 - a) / len(right))
    return a - half, a + half


def by_multinomial(right, resamples, level, generator):
    rows = torch.ones(len(right)).expand(resamples, -1).multinomial(len(right), True, generator=generator)
    means = right[rows].float().mean(-1).sort().values
    cut = round(resamples * (1 - level) / 2)
    return means[cut], means[-cut]


def by_numpy(right, resamples, level, generator):
    rows = torch.randint(len(right), (resamples, len(right)), generator=generator).numpy()
    return np.quantile(right.numpy()[rows].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])


def sorted_in_place(right, resamples, level, generator):
    right.copy_(right.sort().values)
    return interval(right, resamples, level, generator)


def by_binomials(right, resamples, level, generator):
    N, share = float(len(right)), right.float().mean().item()
    hits = torch.binomial(torch.full((resamples,), N), torch.full((resamples,), share), generator=generator)
    return (hits / N).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]))


def always_two_thousand(right, resamples, level, generator):
    return interval(right, 2000, level, generator)


def level_left_out(right, resamples, level, generator):
    return interval(right, resamples, 1 - level, generator)


def without_replacement(right, resamples, level, generator):
    N, ends = len(right), torch.tensor([(1 - level) / 2, (1 + level) / 2])
    means = [right[torch.randperm(N, generator=generator)].float().mean() for _ in range(resamples)]
    return tuple(torch.stack(means).quantile(ends).tolist())


def one_tail_each(right, resamples, level, generator):
    ends = torch.tensor(sorted([1 - level, level]))
    return tuple(draws(right, resamples, generator).quantile(ends).tolist())


def always_95(right, resamples, level, generator):
    return interval(right, resamples, 0.95, generator)


def one_sigma(right, resamples, level, generator):
    means = draws(right, resamples, generator)
    return (means.mean() - means.std()).item(), (means.mean() + means.std()).item()


def smallest_and_largest(right, resamples, level, generator):
    means = draws(right, resamples, generator)
    return means.min().item(), means.max().item()


def axes_swapped(right, resamples, level, generator):
    N, ends = len(right), torch.tensor([(1 - level) / 2, (1 + level) / 2])
    drawn = right.float()[torch.randint(N, (N, resamples), generator=generator)]
    return tuple(drawn.mean(1).quantile(ends).tolist())


def small_draws(right, resamples, level, generator):
    N, ends = len(right), torch.tensor([(1 - level) / 2, (1 + level) / 2])
    drawn = right.float()[torch.randint(N, (resamples, 100), generator=generator)]
    return tuple(drawn.mean(1).quantile(ends).tolist())


def of_the_errors(right, resamples, level, generator):
    return interval(~right, resamples, level, generator)


def in_percent(right, resamples, level, generator):
    low, high = interval(right, resamples, level, generator)
    return 100 * low, 100 * high


def deviations(right, resamples, level, generator):
    low, high = interval(right, resamples, level, generator)
    a = right.float().mean().item()
    return low - a, high - a


BOOTSTRAP = [
    (upside_down, "upside down"),
    (unseeded, "same generator"),
    (fixed_seed, "another generator"),
    (formula, "formula"),
    (without_replacement, "replacement"),
    (one_tail_each, "each end"),
    (always_95, "use the argument"),
    (one_sigma, "68 %"),
    (smallest_and_largest, "too wide"),
    (axes_swapped, "swap the two"),
    (small_draws, "too wide"),
    (of_the_errors, "error rate"),
    (in_percent, "percentages"),
    (deviations, "around 0"),
    (always_two_thousand, "resamples=1"),
    (level_left_out, "other way round"),
    (sorted_in_place, "changes its input `right` in place"),
    (lambda right, resamples, level, generator: (0.0, 1.0), "stub"),
    (lambda right, resamples, level, generator: right.float().mean().item(), "two numbers"),
]

MUTANTS = {
    "cross_entropy_gradient": CROSS_ENTROPY,
    "learning_rate": SCHEDULE,
    "precision_recall_f1": SCORES,
    "bootstrap_interval": BOOTSTRAP,
}
RIGHT = {
    "cross_entropy_gradient": [
        lambda z, y: (p(z) - hot(z, y)) / len(z),
        by_index,
        by_logsumexp,
        lambda z, y: torch.func.grad(F.cross_entropy)(z, y),
    ],
    "learning_rate": [rate, rate_by_min, as_tensor, by_interpolation],
    "precision_recall_f1": [scores, scores_by_loop, scores_in_double],
    "bootstrap_interval": [interval, interval_by_sorting, by_multinomial, by_numpy, by_binomials],
}
