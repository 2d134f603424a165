"""Lesson 05: magnitude pruning."""

import heapq
import math

import torch


def _smallest(size, k):
    keep = torch.ones(size.numel(), dtype=torch.bool)
    keep[size.flatten().argsort(stable=True)[:k]] = False
    return keep.reshape(size.shape)


# -- magnitude_mask ------------------------------------------------------------


def by_threshold(weight, sparsity):
    """Right without ties; with ties it removes too few or too many."""
    k = round(sparsity * weight.numel())
    if k == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    return weight.abs() > weight.abs().flatten().kthvalue(k).values


def at_least_the_next(weight, sparsity):
    """The other way to cut ties wrongly: all of them stay."""
    size = weight.abs()
    return size >= size.flatten().sort().values[round(sparsity * weight.numel())]


def truncated(weight, sparsity):
    return _smallest(weight.abs(), int(sparsity * weight.numel()))


def rounded_up(weight, sparsity):
    return _smallest(weight.abs(), math.ceil(sparsity * weight.numel()))


def in_place(weight, sparsity):
    return _smallest(weight.abs_(), round(sparsity * weight.numel()))


def zero_removes_all(weight, sparsity):
    k = round(sparsity * weight.numel())
    order = weight.abs().flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(weight.numel(), dtype=torch.bool)
    keep[order[:-k]] = True
    return keep.reshape(weight.shape)


def matrices_only(weight, sparsity):
    rows, columns = weight.shape
    return _smallest(weight.abs(), round(sparsity * rows * columns))


def rows(weight, sparsity):
    rank = weight.abs().argsort(dim=-1, stable=True).argsort(-1)
    return rank >= round(sparsity * weight.shape[-1])


def columns(weight, sparsity):
    rank = weight.abs().argsort(dim=0, stable=True).argsort(0)
    return rank >= round(sparsity * weight.shape[0])


def drawn(weight, sparsity):
    lots = torch.rand(weight.shape, generator=torch.Generator().manual_seed(9))
    return _smallest(lots, round(sparsity * weight.numel()))


def by_topk(weight, sparsity):
    keep = torch.zeros(weight.numel(), dtype=torch.bool)
    keep[weight.abs().flatten().topk(weight.numel() - round(sparsity * weight.numel())).indices] = True
    return keep.view_as(weight)


def by_ranks(weight, sparsity):
    ranks = weight.square().flatten().argsort().argsort().reshape(weight.shape)
    return ranks >= round(sparsity * weight.numel())


def half(weight, sparsity):
    return _smallest(weight.abs(), weight.numel() // 2)


def by_sorting_a_list(weight, sparsity):
    sizes = [abs(x) for x in weight.flatten().tolist()]
    gone = set(sorted(range(len(sizes)), key=sizes.__getitem__)[: round(sparsity * len(sizes))])
    return torch.tensor([i not in gone for i in range(len(sizes))]).view(weight.shape)


# -- global_masks --------------------------------------------------------------


def _together(weights, sparsity, size=torch.abs):
    flat = torch.cat([size(w).flatten() for w in weights.values()])
    return _split(weights, _smallest(flat, round(sparsity * len(flat))))


def _split(weights, mask):
    parts = mask.split([w.numel() for w in weights.values()])
    return {name: part.reshape(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


def _cuts(weights, sparsity):
    return [
        w.abs().flatten().sort().values[max(round(sparsity * w.numel()) - 1, 0)] for w in weights.values()
    ]


def by_ranks_of_all(weights, sparsity):
    rank = torch.cat([w.abs().flatten() for w in weights.values()]).argsort(stable=True).argsort()
    return _split(weights, rank >= round(sparsity * len(rank)))


def at_the_quantile(weights, sparsity):
    cut = torch.cat([w.abs().flatten() for w in weights.values()]).quantile(sparsity)
    return {name: w.abs() >= cut for name, w in weights.items()}


def rounded_down(weights, sparsity):
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    return _split(weights, _smallest(flat, int(sparsity * len(flat))))


def zeroes_the_weights(weights, sparsity):
    return {name: weights[name] * mask for name, mask in _together(weights, sparsity).items()}


def flat_parts(weights, sparsity):
    return {name: mask.flatten() for name, mask in _together(weights, sparsity).items()}


def one_tensor(weights, sparsity):
    return torch.cat([mask.flatten() for mask in _together(weights, sparsity).values()])


def one_missing(weights, sparsity):
    return {name: mask for name, mask in _together(weights, sparsity).items() if name != "up"}


def by_kthvalue(weights, sparsity):
    size = torch.cat([w.abs().flatten() for w in weights.values()])
    k = round(sparsity * len(size))
    cut = size.kthvalue(k).values if k else -1.0
    return {name: w.abs() > cut for name, w in weights.items()}


def magnitudes_in_place(weights, sparsity):
    for w in weights.values():
        w.abs_()
    return by_kthvalue(weights, sparsity)


def weights_used_up(weights, sparsity):
    found = by_kthvalue(weights, sparsity)
    return {name: found[name] for name in list(weights) if weights.pop(name) is not None}


def masks_for_weights(weights, sparsity):
    for name, mask in by_kthvalue(weights, sparsity).items():
        weights[name] = mask
    return weights


def note_in_the_dict(weights, sparsity):
    weights["cut"] = torch.tensor(sparsity)
    return by_kthvalue({name: w for name, w in weights.items() if name != "cut"}, sparsity)


def one_by_one(weights, sparsity):
    rest = [(abs(x), name, i) for name, w in weights.items() for i, x in enumerate(w.flatten().tolist())]
    masks = {name: torch.full_like(w, True, dtype=torch.bool) for name, w in weights.items()}
    for _, name, i in heapq.nsmallest(round(sparsity * len(rest)), rest):
        masks[name].view(-1)[i] = False
    return masks


# -- numbers -------------------------------------------------------------------


def clamped(step, begin, end):
    return min(max((step - begin) / (end - begin), 0.0), 1.0)


def cubic_piecewise(step, begin, end, final):
    if step <= begin:
        return 0
    if step >= end:
        return final
    left = (end - step) / (end - begin)
    return final * (1 - left * left * left)


def bytes_by_parts(count, sparsity, value_bits=32):
    removed = round(sparsity * count)
    return math.ceil(count / 8) + (count - removed) * value_bits // 8


# -- remove_neurons ------------------------------------------------------------


def by_places(up, bias, down, keep):
    at = keep.nonzero().squeeze(1)
    return up.index_select(0, at), bias.index_select(0, at), down.index_select(1, at)


def by_rows(up, bias, down, keep):
    rows = [i for i, stays in enumerate(keep.tolist()) if stays]
    return torch.stack([up[i] for i in rows]), torch.stack([bias[i] for i in rows]), torch.stack([down[:, i] for i in rows], 1)


def zeroed_in_place(up, bias, down, keep):
    up[~keep] = 0
    return up[keep], bias[keep], down[:, keep]


def half_of_them(up, bias, down, keep):
    n = len(keep) // 2
    return up[:n], bias[:n], down[:, :n]


def cost_by_loop(w, g, h):
    numbers = (x.flatten().tolist() for x in (w, g, h))
    return torch.tensor([0.5 * c * a**2 - b * a for a, b, c in zip(*numbers, strict=True)], dtype=w.dtype).view_as(w)


MUTANTS = {
    "removal_cost": [
        (lambda w, g, h: g * w + 0.5 * h * w**2, "wrong sign"),
        (lambda w, g, h: -g * w + h * w**2, "½"),
        (lambda w, g, h: -g * w, "only the first-order"),
        (lambda w, g, h: 0.5 * h * w**2, "no minimum"),
        (lambda w, g, h: (g * w).abs() + 0.5 * h * w**2, "lower the loss"),
        (lambda w, g, h: (-g * w + 0.5 * h * w**2).abs(), "lower the loss"),
        (lambda w, g, h: -g * w + 0.5 * h * w, "δ²"),
        (lambda w, g, h: (-g * w + 0.5 * h * w**2).sum(), "each weight"),
        (lambda w, g, h: g * w - 0.5 * h * w**2, "sign"),
        (lambda w, g, h: -g * w + 0.5 * w**2, "curvature"),
        (lambda w, g, h: (-g * w + 0.5 * h * w**2).float(), "float64"),
        (lambda w, g, h: w.mul_(w) * 0.5 * h - g * w, "in place"),
        (lambda w, g, h: -g * w + 0.5 * (h * w) ** 2, "squared"),
        (lambda w, g, h: torch.zeros_like(w), "is 0 everywhere"),
    ],
    "magnitude_mask": [
        (lambda w, s: ~_smallest(w.abs(), round(s * w.numel())), "inverted"),
        (lambda w, s: _smallest(w, round(s * w.numel())), "absolute"),
        (lambda w, s: _smallest(w.abs(), w.numel() - round(s * w.numel())), "share to remove"),
        (lambda w, s: _smallest(-w.abs(), round(s * w.numel())), "largest"),
        (lambda w, s: _smallest(w.abs(), round(s * w.numel())).float(), "torch.bool"),
        (lambda w, s: w * _smallest(w.abs(), round(s * w.numel())), "pruned weight itself"),
        (lambda w, s: w.abs() > s, "not a threshold"),
        (lambda w, s: w.abs() > s * w.abs().max(), "share of the largest"),
        (lambda w, s: _smallest(w.abs(), round(s * w.numel())).flatten(), "shape"),
        (lambda w, s: torch.ones_like(w, dtype=torch.bool), "You remove 0"),
        (lambda w, s: None, "return"),
        (lambda w, s: _smallest(w.abs(), round(s * w.numel())).tolist(), "list"),
        (rows, "each row"),
        (columns, "each column"),
        (by_threshold, "all of them go"),
        (lambda w, s: w.abs() > w.abs().quantile(s), "remove 3 of 9"),
        (at_least_the_next, "all of them stay"),
        (truncated, "exactly"),
        (rounded_up, "exactly"),
        (in_place, "in place"),
        (zero_removes_all, "sparsity 0"),
        (matrices_only, "raised"),
        (drawn, "choice"),
        (half, "exactly"),
    ],
    "global_masks": [
        (lambda ws, s: {n: _smallest(w.abs(), round(s * w.numel())) for n, w in ws.items()}, "same share"),
        (lambda ws, s: _together(ws, s, lambda w: w), "absolute"),
        (lambda ws, s: _together(ws, s, lambda w: w.abs() / w.std()), "own scale"),
        (lambda ws, s: {n: ~m for n, m in _together(ws, s).items()}, "inverted"),
        (lambda ws, s: {n: m.float() for n, m in _together(ws, s).items()}, "torch.bool"),
        (lambda ws, s: {n: w.abs() > sum(_cuts(ws, s)) / 3 for n, w in ws.items()}, "mean of"),
        (lambda ws, s: {n: w.abs() > max(_cuts(ws, s)) for n, w in ws.items()}, "largest of"),
        (lambda ws, s: {n: w.abs() > _cuts(ws, s)[0] for n, w in ws.items()}, "first matrix"),
        (lambda ws, s: {n: w.abs() > _cuts(ws, s)[-1] for n, w in ws.items()}, "last matrix"),
        (lambda ws, s: _together(ws, 0.8), "exactly"),
        (at_the_quantile, "equal magnitude"),
        (rounded_down, "exactly"),
        (by_kthvalue, "equal magnitude"),
        (lambda ws, s: list(_together(ws, s).values()), "dict"),
        (zeroes_the_weights, "pruned weight itself"),
        (flat_parts, "shape"),
        (one_tensor, "dict"),
        (one_missing, "names"),
        (magnitudes_in_place, "`weights` in place: afterwards `weights['up']` holds other numbers"),
        (weights_used_up, "in place: afterwards `weights['up']` is gone"),
        (masks_for_weights, "in place: afterwards something else stands at `weights['up']`"),
        (note_in_the_dict, "in place: afterwards `weights['cut']` is new"),
        (lambda ws, s: None, "return"),
    ],
    "cubic_sparsity": [
        (lambda t, b, e, f: f * clamped(t, b, e), "straight line"),
        (lambda t, b, e, f: f * (1 - (1 - clamped(t, b, e)) ** 2), "exponent"),
        (lambda t, b, e, f: f * (1 - clamped(t, b, e)) ** 3, "still to come"),
        (lambda t, b, e, f: f * clamped(t, b, e) ** 3, "wrong way round"),
        (lambda t, b, e, f: 1 - (1 - clamped(t, b, e)) ** 3, "factor"),
        (lambda t, b, e, f: f * (1 - (1 - (t - b) / (e - b)) ** 3), "clamp"),
        (lambda t, b, e, f: f * (1 - (1 - min((t - b) / (e - b), 1)) ** 3), "clamp"),
        (lambda t, b, e, f: f * (1 - (1 - max((t - b) / (e - b), 0)) ** 3), "clamp"),
        (lambda t, b, e, f: f * (1 - (1 - min(t / e, 1)) ** 3), "begin"),
        (lambda t, b, e, f: f * (1 - (1 - min(max((t - b) / e, 0), 1)) ** 3), "end − begin"),
        (lambda t, b, e, f: 100 * f * (1 - (1 - clamped(t, b, e)) ** 3), "percentage"),
        (lambda t, b, e, f: 1 - f * (1 - (1 - clamped(t, b, e)) ** 3), "share kept"),
        (lambda t, b, e, f: f * (1 - (1 - (t - b) // (e - b)) ** 3), "//"),
        (lambda t, b, e, f: f, "at once"),
        (lambda t, b, e, f: str(f), "number"),
    ],
    "bitmask_bytes": [
        (lambda n, s, b=32: n + (n - round(s * n)) * b, "a byte has 8"),
        (lambda n, s, b=32: (n - round(s * n)) * b / 8, "bitmask itself is missing"),
        (lambda n, s, b=32: n / 8, "values are missing"),
        (lambda n, s, b=32: n + (n - round(s * n)) * b / 8, "not one byte"),
        (lambda n, s, b=32: n / 8 + round(s * n) * b / 8, "removed"),
        (lambda n, s, b=32: n / 8 + (n - round(s * n)) * 4, "whatever"),
        (lambda n, s, b=32: n * b / 8, "dense"),
        (lambda n, s, b=32: (n - round(s * n)) * (1 + b) / 8, "removed weights too"),
        (lambda n, s, b=32: (n - round(s * n)) * (b + 32) / 8, "place"),
        (lambda n, s, b=32: (n / 8 + (n - round(s * n)) * b / 8) / 1e6, "megabytes"),
        (lambda n, s, b=32: n / 8 + (n - round(s * n)) * b, "not divided by 8"),
        (lambda n, s, b=32: n / 8 + n * b / 8, "every value"),
        (lambda n, s, b=32: 5000, "right"),
        (lambda n, s, b=32: None, "return"),
    ],
    "remove_neurons": [
        (lambda u, b, d, k: (u * k[:, None], b * k, d * k), "zero the rows"),
        (lambda u, b, d, k: (u[k], b[k], d), "as large as before"),
        (lambda u, b, d, k: (u[k], b, d[:, k]), "bias is as long"),
        (lambda u, b, d, k: (u[~k], b[~k], d[:, ~k]), "should stay"),
        (lambda u, b, d, k: (u[k], b[k], d * k), "zero the columns"),
        (lambda u, b, d, k: (u[k], b * k, d[:, k]), "zero the entries"),
        (lambda u, b, d, k: (u[k].T, b[k], d[:, k]), "transposed"),
        (lambda u, b, d, k: (u[k], b[k], d[:, k].T), "transposed"),
        (lambda u, b, d, k: (d[:, k], b[k], u[k]), "yours is `down`"),
        (lambda u, b, d, k: (u[k], d[:, k]), "three tensors"),
        (lambda u, b, d, k: (u[k], b[k], d[k[:5]] if len(d) == 5 else d[k]), "shape"),
        (lambda u, b, d, k: (u, b[k], d[:, k]), "as large"),
        (half_of_them, "shape"),
        (zeroed_in_place, "changes its input `up` in place"),
        (lambda u, b, d, k: None, "return"),
    ],
}
RIGHT = {
    "removal_cost": [
        lambda w, g, h: 0.5 * h * w.square() - g * w,
        lambda w, g, h: w * (h * w / 2 - g),
        cost_by_loop,
    ],
    "magnitude_mask": [by_topk, by_ranks, by_sorting_a_list],
    "global_masks": [lambda ws, s: _together(ws, s, torch.square), by_ranks_of_all, one_by_one],
    "cubic_sparsity": [
        lambda t, b, e, f: f - f * (1 - clamped(t, b, e)) ** 3,
        cubic_piecewise,
        lambda t, b, e, f: torch.tensor(f) * (1 - (1 - clamped(t, b, e)) ** 3),
    ],
    "bitmask_bytes": [
        bytes_by_parts,
        lambda n, s, b=32: n * (1 / 8 + (1 - s) * b / 8),
        lambda n, s, b=32: (n + b * (n - round(n * s))) / 8,
    ],
    "remove_neurons": [lambda u, b, d, k: (u[k], b[k], d[:, k]), by_places, by_rows],
}
