"""Lesson 17: gradients of parts, bytes of a ring, owners of rows, the interval between checkpoints."""

import math

import numpy as np
import torch

# -- gradients -------------------------------------------------------------------


def pairs(gradients, counts):
    return [(g, n) for g, n in zip(gradients, counts, strict=True) if n]


def whole(gradients, counts):
    return sum(g * n for g, n in pairs(gradients, counts)) / sum(counts)


def kept(function):
    """Return an attempt that leaves empty parts out and does ``function`` to the others: a list of gradients and of counts."""
    return lambda gradients, counts: function(*(list(x) for x in zip(*pairs(gradients, counts), strict=True)))


def in_place(gradients, counts):
    for g, n in zip(gradients, counts, strict=True):
        g *= n / sum(counts)
    return sum(gradients)


def into_the_first(gradients, counts):
    total = gradients[0]
    total *= counts[0]
    for g, n in pairs(gradients[1:], counts[1:]):
        total += g * n
    return total / sum(counts)


def pops(gradients, counts):
    total = 0
    while counts:
        n, g = counts.pop(), gradients.pop()
        total = total + (n * g if n else 0)
    return total


def by_stack(gradients, counts):
    share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return torch.einsum("p,p...->...", share, torch.stack([g.nan_to_num() for g in gradients]))


def running(gradients, counts):
    mean, seen = None, 0
    for g, n in pairs(gradients, counts):
        seen += n
        mean = g.clone() if mean is None else mean + (g - mean) * n / seen
    return mean


# -- rows ------------------------------------------------------------------------


def drops_own(rows, index, count):
    rows[:] = [r for r in rows if r % count == index]
    return rows


def sorts(rows, index, count):
    rows.sort()
    return [r for r in rows if r % count == index]


def padded(rows, index, count):
    own = [r for r in rows if r % count == index]
    return own + own[:1]


def stands_in(rows, index, count):
    return [r for r in rows if r % count == index] or rows[:1]


def of(test):
    return lambda rows, index, count: [r for r in rows if test(r, index, count)]


def by_slices(rows, index, count):
    n = -(-len(rows) // count)
    return rows[index * n : (index + 1) * n]


def equal_blocks(rows, index, count):
    n = len(rows) // count
    return rows[index * n : (index + 1) * n]


MUTANTS = {
    "weighted_mean_gradient": [
        (lambda g, n: torch.stack(g).mean(0), "as equals"),
        (kept(lambda g, n: sum(g) / len(g)), "as equals"),
        (lambda g, n: sum(g), "the sum of the means"),
        (kept(lambda g, n: sum(a * b for a, b in zip(g, n, strict=True))), "no shares"),
        (kept(lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)) / len(n)), "instead of by N"),
        (lambda g, n: whole(g, n) / len(n), "as well"),
        (lambda g, n: whole(g, n) / sum(n), "twice"),
        (kept(lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)) / max(n)), "largest count"),
        (kept(lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)) / min(n)), "smallest count"),
        (kept(lambda g, n: sum(a / b for a, b in zip(g, n, strict=True)) / sum(1 / b for b in n)), "upside down"),
        (kept(lambda g, n: sum(a / b for a, b in zip(g, n, strict=True))), "a mean already"),
        (kept(lambda g, n: sum(g) / sum(n)), "how many things"),
        (lambda g, n: g[-1].clone(), "the last one's"),
        (lambda g, n: g[0].clone(), "the first one's"),
        (lambda g, n: g[n.index(max(n))].clone(), "alone"),
        (kept(lambda g, n: sum(a * b for a, b in zip(g, torch.tensor(n).double().softmax(0), strict=True))), "softmax"),
        (kept(lambda g, n: sum(a * b * b for a, b in zip(g, n, strict=True)) / sum(b * b for b in n)), "n_p²"),
        (kept(lambda g, n: sum(a * b for a, b in zip(g, n[::-1], strict=True)) / sum(n)), "wrong gradients"),
        (lambda g, n: -whole(g, n), "wrong sign"),
        (lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)) / sum(n), "leave such a part out"),
        (in_place, "in place"),
        (into_the_first, "in place"),
        (pops, "in place: afterwards the list `gradients` is shorter"),
        (lambda g, n: whole(g, n).float(), "float64"),
        (lambda g, n: whole(g, n).sum(), "shape"),
        (lambda g, n: whole(g, n).tolist(), "tensor"),
        (lambda g, n: None, "return"),
    ],
    "ring_bytes": [
        (lambda size, P: 2 * (P - 1) * size, "together"),
        (lambda size, P: (P - 1) / P * size, "one of the two halves"),
        (lambda size, P: (P - 1) * size, "receives"),
        (lambda size, P: 2 * size, "there and back"),
        (lambda size, P: size, "once"),
        (lambda size, P: 2 * (P + 1) / P * size, "one round less"),
        (lambda size, P: 2 * P / max(P - 1, 1e-9) * size, "upside down"),
        (lambda size, P: size / P, "one piece"),
        (lambda size, P: 2 * size / P, "two pieces"),
        (lambda size, P: 2 * (P - 1), "number of pieces"),
        (lambda size, P: 2 * (P - 1) / P, "share of the gradient"),
        (lambda size, P: 2 * (P - 1) / P * size * 8, "bits"),
        (lambda size, P: 2 * (P - 1) / P * size * 4, "in bytes already"),
        (lambda size, P: 4 * (P - 1) / P * size, "received together"),
        (lambda size, P: 2 * (P - 1) / P * size / 1e6, "megabytes"),
        (lambda size, P: 2 * (P - 1) * (size // P), "rounded down"),
        (lambda size, P: 2 * math.log2(P) * size, "logarithm"),
        (lambda size, P: math.log2(P) * size, "tree"),
        (lambda size, P: -2 * (P - 1) / P * size, "sign"),
        (lambda size, P: size**2 / P, "answer is"),
        (lambda size, P: f"{2 * (P - 1) / P * size}", "number"),
        (lambda size, P: None, "return"),
    ],
    "own_rows": [
        (lambda rows, i, P: [r % P == i for r in rows], "True and False"),
        (lambda rows, i, P: np.array(rows) % P == i, "True and False"),
        (lambda rows, i, P: [k for k, r in enumerate(rows) if r % P == i], "places of the rows"),
        (lambda rows, i, P: rows[i::P], "by place"),
        (by_slices, "blocks"),
        (equal_blocks, "leave the rest"),
        (of(lambda r, i, P: r % P != i), "all the others"),
        (of(lambda r, i, P: r % P == i - 1), "numbered from 1"),
        (of(lambda r, i, P: (r - 1) % P == i), "off by one"),
        (of(lambda r, i, P: r // P == i), "quotient"),
        (of(lambda r, i, P: i and r % i == 0), "r mod index"),
        (of(lambda r, i, P: r % P == 0), "count divides"),
        (lambda rows, i, P: list(rows), "all rows"),
        (of(lambda r, i, P: P - 1 - r % P == i), "from the end"),
        (of(lambda r, i, P: r % (i or 1) == P), "nothing"),
        (lambda rows, i, P: [r // P for r in rows if r % P == i], "own table"),
        (lambda rows, i, P: sorted(r for r in rows if r % P == i), "another order"),
        (padded, "more than once"),
        (stands_in, "owns none"),
        (lambda rows, i, P: [r for r in rows if r % P == i][: len(rows) // P], "missing"),
        (drops_own, "in place: afterwards the list `rows` is shorter"),
        (sorts, "in place: afterwards something else stands at `rows[0]`"),
        (lambda rows, i, P: filter(lambda r: r % P == i, rows), "iterator"),
        (lambda rows, i, P: torch.tensor([r for r in rows if r % P == i]), "tensor"),
        (lambda rows, i, P: sum(r % P == i for r in rows), "not int"),
        (lambda rows, i, P: [float(r) for r in rows if r % P == i], "holds 12.0"),
        (lambda rows, i, P: [str(r) for r in rows if r % P == i], "holds '12'"),
        (lambda rows, i, P: dict.fromkeys(r for r in rows if r % P == i), "not dict"),
        (lambda rows, i, P: {r for r in rows if r % P == i}, "has no order"),
        (lambda rows, i, P: [r + 1 for r in rows if r % P == i], "but you return"),
        (lambda rows, i, P: None, "return"),
    ],
    "checkpoint_interval": [
        (lambda C, M, P: math.sqrt(C * M / P), "2 is missing"),
        (lambda C, M, P: 2 * C * M / P, "square root"),
        (lambda C, M, P: math.sqrt(2 * C * M), "one machine"),
        (lambda C, M, P: math.sqrt(2 * C * M * P), "longer with more machines"),
        (lambda C, M, P: math.sqrt(2 * C * M) / P, "outside the root"),
        (lambda C, M, P: math.sqrt(2 * C * P / M), "as a share"),
        (lambda C, M, P: math.sqrt(C * M / P / 2), "belongs above"),
        (lambda C, M, P: math.sqrt(2 * M / C / P), "upside down"),
        (lambda C, M, P: M / P, "together"),
        (lambda C, M, P: M / P / 2, "half the time"),
        (lambda C, M, P: math.sqrt(2 * C * M / P) / 60, "minutes"),
        (lambda C, M, P: math.sqrt(2 * C * M / P) / 3600, "hours"),
        (lambda C, M, P: (2 * C * M / P) ** (1 / 3), "cube root"),
        (lambda C, M, P: math.sqrt(4 * C * M / P), "factor √2"),
        (lambda C, M, P: M / P / math.sqrt(2 * C * M / P), "number of checkpoints"),
        (lambda C, M, P: math.sqrt(2 * C * M / P) - C, "root alone"),
        (lambda C, M, P: math.sqrt(2) * C * M / P, "under the root too"),
        (lambda C, M, P: -math.sqrt(2 * C * M / P), "sign"),
        (lambda C, M, P: C + M, "answer is"),
        (lambda C, M, P: [math.sqrt(2 * C * M / P)], "number"),
        (lambda C, M, P: None, "return"),
    ],
}
RIGHT = {
    "weighted_mean_gradient": [whole, by_stack, running],
    "ring_bytes": [
        lambda size, P: 2 * (P - 1) / P * size,
        lambda size, P: 2 * size - 2 * size / P,
        lambda size, P: torch.tensor(2 * size * (P - 1) / P, dtype=torch.float64),
        lambda size, P: sum(size / P for _ in range(2 * (P - 1))),
    ],
    "own_rows": [
        of(lambda r, i, P: r % P == i),
        of(lambda r, i, P: (r - i) % P == 0),
        lambda rows, i, P: tuple(r for r in rows if r % P == i),
        lambda rows, i, P: list(filter(lambda r: r % P == i, rows)),
        lambda rows, i, P: np.array(rows)[np.array(rows) % P == i],
    ],
    "checkpoint_interval": [
        lambda C, M, P: math.sqrt(2 * C * M / P),
        lambda C, M, P: (2 * C * M / P) ** 0.5,
        lambda C, M, P: torch.tensor(2 * C * M / P, dtype=torch.float64).sqrt(),
        lambda C, M, P: np.sqrt(np.float32(2 * C * M / P)),
        lambda C, M, P: math.exp(0.5 * (math.log(2 * C) + math.log(M) - math.log(P))),
    ],
}
