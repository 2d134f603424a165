"""Lesson 10: operations, percentiles, quantisation, bytes."""

import math
import statistics

import numpy as np
import torch


def scaled(weight, bits, scale):
    return torch.round(weight / scale).to(torch.int8), scale


def top(weight, dim=1):
    return weight.abs().amax(dim=dim, keepdim=True)


def right_rows(weight, bits):
    scale = top(weight) / (2 ** (bits - 1) - 1)
    return scaled(weight, bits, torch.where(scale > 0, scale, torch.ones_like(scale)))


def zero_by_zero(weight, bits):
    return scaled(weight, bits, top(weight) / (2 ** (bits - 1) - 1))


def mended_afterwards(weight, bits):
    q, scale = zero_by_zero(weight, bits)
    q[scale[:, 0] == 0] = 0
    return q, scale


def by_python_division(weight, bits):
    scales = [[max(abs(x) for x in row) / (2 ** (bits - 1) - 1)] for row in weight.tolist()]
    rows = [[round(x / s) for x in row] for row, [s] in zip(weight.tolist(), scales, strict=True)]
    return torch.tensor(rows, dtype=torch.int8), torch.tensor(scales)


def with_zero_point(weight, bits):
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return torch.round((weight - low) / scale - 2 ** (bits - 1)).to(torch.int8), scale


def in_place(weight, bits):
    scale = top(weight) / (2 ** (bits - 1) - 1)
    weight /= scale
    return weight.round().to(torch.int8), scale


def by_loop(weight, bits):
    rows, scales = [], []
    for row in weight:
        s = max(abs(x) for x in row.tolist()) / (2 ** (bits - 1) - 1)
        rows.append([round(x / s) if s else 0 for x in row.tolist()])
        scales.append([s])
    return torch.tensor(rows, dtype=torch.int8), torch.tensor(scales, dtype=weight.dtype)


def by_clamp(weight, bits):
    n = 2 ** (bits - 1) - 1
    scale = (top(weight) / n).clamp(min=1e-12)
    return (weight / scale).round().clamp(-n, n).char(), scale


def sort_in_place(times, share):
    times.sort()
    return times[math.ceil(round(share * len(times), 9)) - 1]


def rank(times, share):
    return math.ceil(round(share * len(times), 9)) - 1


def by_numpy(times, share):
    return np.sort(times)[rank(times, share)]


def by_counting(times, share):
    return min(t for t in times if sum(u <= t for u in times) >= share * len(times) - 1e-9)


def bytes_of(V, P, C, F, L, t, r, tables=None, others=None):
    tables = (V + P + 2) * C if tables is None else tables
    if others is None:
        others = 2 * C + L * (4 * (C * C + C) + 2 * C * F + F + C + 4 * C) + C * C + C
    return (tables * t + others * r) / 8


def all_of(C, F, L):
    return 2 * C + L * (4 * (C * C + C) + 2 * C * F + F + C + 4 * C) + C * C + C


def less(missing):
    """Return a count that lacks some of the rest: ``missing(C, F, L)`` of its parameters."""
    return lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - missing(C, F, L))


def divided_early(V, P, C, F, L, t, r):
    return (V + P + 2) * C * (t // 8) + all_of(C, F, L) * (r // 8)


def norms_in_float(V, P, C, F, L, t, r):
    return bytes_of(V, P, C, F, L, t, r) + (2 * C + L * 4 * C) * (32 - r) / 8


def vectors_in_float(V, P, C, F, L, t, r):
    return bytes_of(V, P, C, F, L, t, r) + (3 * C + L * (9 * C + F)) * (32 - r) / 8


def by_parts(vocabulary, positions, C, F, L, table_bits, rest_bits):
    linear = lambda inputs, outputs: inputs * outputs + outputs  # noqa: E731
    norm, bits = 2 * C, 0
    for rows in (vocabulary, positions, 2):
        bits += rows * C * table_bits
    for _ in range(L):
        bits += (4 * linear(C, C) + linear(C, F) + linear(F, C) + 2 * norm) * rest_bits
    return (bits + (norm + linear(C, C)) * rest_bits) // 8


MUTANTS = {
    "forward_flops": [
        (lambda C, F, L, T: L * (4 * T * C * C + 2 * T * T * C + 2 * T * C * F), "two operations"),
        (lambda C, F, L, T: L * (8 * T * C * C + 2 * T * T * C + 4 * T * C * F), "two products"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * C * F), "attention's two products are missing"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * C + 4 * T * C * F), "square of the length"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * C * C + 4 * T * C * F), "not T·C²"),
        (lambda C, F, L, T: L * (6 * T * C * C + 4 * T * T * C + 4 * T * C * F), "four projections"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C + 2 * T * C * F), "two matrices"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C), "feed-forward network is missing"),
        (lambda C, F, L, T: 8 * T * C * C + 4 * T * T * C + 4 * T * C * F, "one layer"),
        (lambda C, F, L, T: L * (8 * C * C + 4 * T * C + 4 * C * F), "each token"),
        (lambda C, F, L, T: L * (8 * T * C * C + 12 * 4 * T * T * C + 4 * T * C * F), "heads share"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C + 4 * T * C * F) + 2 * T * C * 30522, "look-up"),
        (lambda C, F, L, T: L * (8 * C * C + 4 * T * T * C + 4 * T * C * F), "each of the T tokens"),
        (lambda C, F, L, T: L * (2 * T * C * C + 4 * T * T * C + 4 * T * C * F), "four projections"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C * C + 4 * T * C * F), "not T²·C²"),
        (lambda C, F, L, T: 12 * L * (8 * T * C * C + 4 * T * T * C + 4 * T * C * F), "heads share"),
        (lambda C, F, L, T: 2 * L * (8 * T * C * C + 4 * T * T * C + 4 * T * C * F), "count them twice"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C + 4 * T * C * F) + 2 * C * C, "pooler"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C + 4 * T * C * 4 * C), "need not be 4C"),
        (lambda C, F, L, T: L * (8 * T * C * C + 4 * T * T * C + 4 * T * C * F) / 1e9, "units of 10⁹"),
        (lambda C, F, L, T: 2 * L * T * C, "right"),
        (lambda C, F, L, T: 10**6, "right"),
        (lambda C, F, L, T: None, "return"),
    ],
    "percentile_latency": [
        (lambda t, s: t[rank(t, s)], "not sorted"),
        (lambda t, s: t[min(int(s * len(t)), len(t) - 1)], "not sorted"),
        (lambda t, s: sorted(t)[min(int(s * len(t)), len(t) - 1)], "too far"),
        (lambda t, s: sorted(t)[int(s * len(t))], "too far"),
        (lambda t, s: sorted(t)[math.floor(s * len(t)) - 1], "too few"),
        (lambda t, s: sorted(t)[round(s * len(t)) - 1], "too few"),
        (lambda t, s: sorted(t)[round(s * (len(t) - 1))], "too few"),
        (lambda t, s: sorted(t)[max(math.ceil(s / 100 * len(t)) - 1, 0)], "do not divide it by 100"),
        (lambda t, s: float(np.percentile(t, s)), "np.percentile takes 95"),
        (lambda t, s: sorted(t)[math.ceil(round((1 - s) * len(t), 9)) - 1], "slow end"),
        (lambda t, s: torch.tensor(t).quantile(s), "interpolate"),
        (lambda t, s: statistics.median(t), "median"),
        (lambda t, s: sorted(t)[len(t) // 2], "median"),
        (lambda t, s: rank(t, s), "place in the sorted list"),
        (lambda t, s: sorted(t)[: rank(t, s) + 1], "list"),
        (lambda t, s: sorted(t)[max(rank(t, s) - 1, 0)], "too few"),
        (lambda t, s: sorted(t)[math.ceil(s * len(t)) - 1], "floating point"),
        (lambda t, s: sorted(t, reverse=True)[rank(t, s)], "slow end"),
        (lambda t, s: sum(t) / len(t), "mean"),
        (lambda t, s: max(t), "slowest"),
        (lambda t, s: min(t), "fastest"),
        (lambda t, s: float(np.quantile(t, s)), "interpolate"),
        (lambda t, s: sorted(t)[math.ceil(len(t) / 2) - 1], "median"),
        (lambda t, s: s * max(t), "share of the slowest"),
        (sort_in_place, "`times` in place: afterwards something else stands at `times[0]`"),
        (lambda t, s: str(max(t)), "number"),
        (lambda t, s: None, "return"),
    ],
    "quantize_rows": [
        (lambda w, b: scaled(w, b, w.abs().max() / (2 ** (b - 1) - 1)), "whole matrix"),
        (lambda w, b: scaled(w, b, top(w, 0) / (2 ** (b - 1) - 1)), "columns"),
        (lambda w, b: scaled(w, b, top(w) / (2**b - 1)), "wrap around"),
        (lambda w, b: scaled(w, b, top(w) / 2 ** (b - 1)), "one too many"),
        (lambda w, b: scaled(w, b, top(w) / 127), "whatever `bits`"),
        (lambda w, b: ((w / right_rows(w, b)[1]).to(torch.int8), right_rows(w, b)[1]), "cut the fraction"),
        (lambda w, b: ((w / right_rows(w, b)[1]).floor().to(torch.int8), right_rows(w, b)[1]), "round down"),
        (lambda w, b: scaled(w, b, w.amax(1, keepdim=True) / (2 ** (b - 1) - 1)), "magnitude"),
        (
            lambda w, b: scaled(w, b, (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / (2 * (2 ** (b - 1) - 1))),
            "symmetric",
        ),
        (lambda w, b: (right_rows(w, b)[0] * right_rows(w, b)[1], right_rows(w, b)[1]), "put back"),
        (lambda w, b: ((w / right_rows(w, b)[1]).round(), right_rows(w, b)[1]), "torch.int8"),
        (lambda w, b: (right_rows(w, b)[0].to(torch.uint8), right_rows(w, b)[1]), "one byte with a sign"),
        (lambda w, b: (right_rows(w, b)[0], 1 / right_rows(w, b)[1]), "upside down"),
        (lambda w, b: (right_rows(w, b)[0], right_rows(w, b)[1][:, 0]), "keepdim"),
        (lambda w, b: right_rows(w, b)[::-1], "wrong order"),
        (in_place, "in place"),
        (lambda w, b: scaled(w, b, top(w) / (2 ** (b - 1) - 1) + 0.01), "scale of row 0"),
        (lambda w, b: (right_rows(w, b)[0], top(w) / ((2 ** (b - 1) - 1) * (top(w) > 0))), "zeros"),
        (zero_by_zero, "0/0"),
        (by_python_division, "ZeroDivisionError"),
        (with_zero_point, "zero point"),
        (lambda w, b: scaled(w, b, -w.amin(1, keepdim=True) / (2 ** (b - 1) - 1)), "smallest weight"),
        (lambda w, b: ((w / right_rows(w, b)[1]).ceil().to(torch.int8), right_rows(w, b)[1]), "round up"),
        (lambda w, b: ((w * right_rows(w, b)[1]).round().to(torch.int8), right_rows(w, b)[1]), "row 0 should be"),
        (lambda w, b: (right_rows(w, b)[0], right_rows(w, b)[1].int()), "floating-point"),
        (lambda w, b: (right_rows(w, b)[0].tolist(), right_rows(w, b)[1]), "two tensors"),
        (lambda w, b: right_rows(w.T, b), "weight's shape"),
        (lambda w, b: scaled(w, b, w.max() / 255), "whole matrix"),
        (lambda w, b: right_rows(w, 8), "whatever `bits`"),
        (lambda w, b: right_rows(w, b)[0], "two tensors"),
        (lambda w, b: None, "return"),
    ],
    "model_bytes": [
        (lambda *a: 8 * bytes_of(*a), "a byte has 8"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, r, t), "swapped"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - L * (5 * C + F) - C), "biases"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - 2 * C - 4 * L * C), "layer norms are"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - 2 * C), "behind the tables is"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - C * C - C), "pooler is missing"),
        (
            lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, (V + 2) * C, all_of(C, F, L) + P * C),
            "position table is a table",
        ),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, tables=(V + 2) * C), "position table is missing"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, tables=(V + P) * C), "segment"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - L * (C * C + C)), "four matrices"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) - L * (F * C + C)), "two matrices"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, 1, t, r), "one layer"),
        (
            lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, r, others=all_of(C, F, L) + (L - 1) * (C * C + C)),
            "once",
        ),
        (lambda *a: bytes_of(*a) / 1000, "kilobytes"),
        (lambda *a: bytes_of(*a) / 1024, "kilobytes"),
        (lambda *a: bytes_of(*a) / 1e6, "megabytes"),
        (lambda *a: bytes_of(*a) / 2**20, "megabytes"),
        (lambda *a: 64 * bytes_of(*a), "you multiply by 8"),
        (lambda V, P, C, F, L, t, r: (V + P + 2) * C + all_of(C, F, L), "number of parameters"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, t, t), "table_bits is used for everything"),
        (lambda V, P, C, F, L, t, r: bytes_of(V, P, C, F, L, r, r), "rest_bits is used for everything"),
        (divided_early, "4 // 8 is 0"),
        (norms_in_float, "the layer norms, too"),
        (vectors_in_float, "biases and layer norms, too"),
        (less(lambda C, F, L: L * 4 * C), "biases of attention"),
        (less(lambda C, F, L: L * (F + C)), "biases of the feed-forward"),
        (less(lambda C, F, L: L * 2 * C), "two layer norms"),
        (less(lambda C, F, L: C + L * 2 * C), "2C parameters"),
        (less(lambda C, F, L: L * 4 * (C * C + C)), "four matrices of attention"),
        (less(lambda C, F, L: L * (2 * C * F + F + C)), "feed-forward network is missing"),
        (less(lambda C, F, L: L * F * C), "two matrices"),
        (less(lambda C, F, L: L * (2 * C + 1) * (F - 4 * C)), "need not be 4C"),
        (lambda *a: bytes_of(*a) + 2 * a[2] * (a[5] - a[6]) / 8, "tables belongs to the rest"),
        (lambda *a: bytes_of(*a) - 2 * a[2] * (a[5] - a[6]) / 8, "segment table is a table"),
        (lambda *a: bytes_of(*a) - a[2] * a[5] / 8, "segment table has two rows"),
        (lambda *a: a[4] * bytes_of(*a), "not in each layer"),
        (lambda V, P, C, F, L, t, r: V * C * t / 8, "right"),
        (lambda V, P, C, F, L, t, r: (V + P + 2) * C * t / 8, "tables alone"),
        (lambda V, P, C, F, L, t, r: all_of(C, F, L) * r / 8, "tables are missing"),
        (lambda *a: 1000, "right"),
        (lambda *a: None, "return"),
    ],
}
RIGHT = {
    "forward_flops": [
        lambda C, F, L, T: L * (8 * T * C**2 + 4 * T**2 * C + 4 * T * C * F),
        lambda C, F, L, T: 4.0 * L * T * C * (2 * C + T + F),
        lambda C, F, L, T: torch.tensor(2 * L * (4 * T * C * C + 2 * T * T * C + 2 * T * C * F)),
    ],
    "percentile_latency": [
        lambda t, s: sorted(t)[rank(t, s)],
        by_counting,
        by_numpy,
        lambda t, s: torch.tensor(t, dtype=torch.float64).sort().values[rank(t, s)],
    ],
    "quantize_rows": [right_rows, by_loop, by_clamp, mended_afterwards, lambda w, b: right_rows(w.float(), b)],
    "model_bytes": [
        bytes_of,
        by_parts,
        lambda V, P, C, F, L, t, r: (V + P + 2) * C * t / 8 + all_of(C, F, L) * r / 8,
        lambda V, P, C, F, L, t, r: round(bytes_of(V, P, C, F, L, t, r)),
    ],
}
