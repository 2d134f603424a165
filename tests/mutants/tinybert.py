"""Lesson 09."""

import numpy as np
import torch

MUTANTS = {
    "gap_closed": [
        (lambda d, s, t: (t - d) / (t - s), "left open"),
        (lambda d, s, t: min(1.0, (d - s) / (t - s)), "cut off at 1"),
        (lambda d, s, t: d / t, "retention"),
        (lambda d, s, t: d - s, "gain"),
        (lambda d, s, t: (t - s) / (d - s), "upside down"),
        (lambda d, s, t: (d - s) / s, "relative"),
        (lambda d, s, t: (d - s) / t, "relative"),
        (lambda d, s, t: (t - d) / (d - s), "relative to the gain"),
        (lambda d, s, t: (s - d) / (t - s), "sign"),
        (lambda d, s, t: max(0.0, (d - s) / (t - s)), "cut off"),
        (lambda d, s, t: 100 * (d - s) / (t - s), "percentage"),
        (lambda d, s, t: 0.5, "you return 0.5"),
    ],
    "squeeze": [
        (lambda w, v: w, "itself"),
        (lambda w, v: w @ v, "input side"),
        (lambda w, v: v.T @ w, "output side"),
        (lambda w, v: v.T @ w.T @ v, "transposed"),
        (lambda w, v: w[: v.shape[1], : v.shape[1]], "first rows"),
        (lambda w, v: v @ v.T @ w @ v @ v.T, "stay wide"),
        (lambda w, v: v.T @ w @ v / v.shape[1], "divided"),
        (lambda w, v: v.T @ w @ v * v.shape[1], "multiplied"),
        (lambda w, v: -(v.T @ w @ v), "sign"),
        (lambda w, v: (v.T @ w @ v).double(), "float32"),
        (lambda w, v: (v.T @ w @ v).numpy(), "tensor"),
        (lambda w, v: w.zero_()[: v.shape[1], : v.shape[1]], "in place"),
        (lambda w, v: torch.zeros(v.shape[1], v.shape[1]), "is 0 everywhere"),
        (lambda w, v: torch.eye(v.shape[1]), "differs"),
    ],
    "fold_value_bias": [
        (lambda w, v, o: o, "lost"),
        (lambda w, v, o: o + v, "as it is"),
        (lambda w, v, o: w @ v, "old output bias is lost"),
        (lambda w, v, o: w.T @ v + o, "transposed"),
        (lambda w, v, o: o - w @ v, "sign"),
        (lambda w, v, o: w @ (v + o), "after it"),
        (lambda w, v, o: len(v) * (w @ v) + o, "sum to 1"),
        (lambda w, v, o: w @ v / len(v) + o, "average"),
        (lambda w, v, o: o.add_(w @ v), "in place"),
        (lambda w, v, o: (w @ v + o).sum(), "shape"),
    ],
}
RIGHT = {
    "gap_closed": [
        lambda d, s, t: (d - s) / (t - s),
        lambda d, s, t: 1 - (t - d) / (t - s),
        lambda d, s, t: np.polyval(np.polyfit([s, t], [0, 1], 1), d),  # the line from 0 at s to 1 at t
    ],
    "squeeze": [
        lambda w, v: v.T @ w @ v,
        lambda w, v: torch.einsum("ia,ij,jb->ab", v, w, v),
        lambda w, v: torch.stack([(w @ column) @ v for column in v.T], dim=1),
    ],
    "fold_value_bias": [
        lambda w, v, o: w @ v + o,
        lambda w, v, o: torch.nn.functional.linear(v, w, o),
        lambda w, v, o: torch.stack([b + sum(a * x for a, x in zip(row, v, strict=True)) for row, b in zip(w, o, strict=True)]),
    ],
}
