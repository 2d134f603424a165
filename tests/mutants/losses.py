"""Lesson 06, TinyBERT's losses."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from tinylib.distill import LayerMap

# -- hidden_loss and embedding_loss --------------------------------------------------------------------------


def squares(s, t):
    return (s - t) ** 2


def every_token(s):
    return torch.ones(s.shape[:2], dtype=torch.bool)


def state_loss(average, errors=squares):
    """Make a loss of states from a way to average their errors."""
    return lambda s, t, mask=None: average(errors(s, t), every_token(s) if mask is None else mask)


def over_tokens(e, mask):
    return (e * mask[..., None]).sum() / (mask.sum() * e.shape[-1])


def picks_the_real_ones(s, t, mask=None):
    return F.mse_loss(s, t) if mask is None else F.mse_loss(s[mask], t[mask])


def multiplies_by_the_mask(s, t, mask=None):
    mask = every_token(s) if mask is None else mask
    per_token = (s - t.detach()).pow(2).mean(dim=-1) * mask.float()
    return per_token.sum() / mask.sum()


def one_sentence_after_another(s, t, mask=None):
    lengths = [s.shape[1]] * len(s) if mask is None else mask.sum(1).tolist()
    total = sum((s[b, i] - t[b, i]).dot(s[b, i] - t[b, i]) for b, n in enumerate(lengths) for i in range(n))
    return total / (sum(lengths) * s.shape[-1])


def state_in_place(s, t, mask=None):
    s -= t
    return multiplies_by_the_mask(s, torch.zeros_like(t), mask)


def state_detached(s, t, mask=None):
    return multiplies_by_the_mask(s.detach(), t, mask)


def state_as_float(s, t, mask=None):
    return multiplies_by_the_mask(s, t, mask).item()


def state_as_double(s, t, mask=None):
    return multiplies_by_the_mask(s.double(), t.double(), mask)


def state_learns_the_wrong_way(s, t, mask=None):
    right = multiplies_by_the_mask(s, t, mask)
    return 2 * right.detach() - right


def student_side_masked(s, t, mask=None):
    mask = every_token(s) if mask is None else mask
    return squares(s * mask[..., None], t).sum() / (mask.sum() * s.shape[-1])


STATES = [
    (lambda s, t, mask=None: F.mse_loss(s, t), "the mask is not used"),
    (state_loss(lambda e, m: (e * m[..., None]).mean()), "still counted in the divisor"),
    (state_loss(lambda e, m: (e * m[..., None]).sum()), "this is a sum"),
    (state_loss(lambda e, m: (e * m[..., None]).sum() / m.sum()), "the width is summed"),
    (state_loss(lambda e, m: (e * m[..., None]).sum() / len(m)), "divide by the batch size"),
    (state_loss(lambda e, m: over_tokens(e, ~m)), "wrong way round"),
    (state_loss(lambda e, m: ((e.mean(-1) * m).sum(1) / m.sum(1)).mean()), "average each sentence first"),
    (state_loss(lambda e, m: over_tokens(e, m).sqrt()), "square root"),
    (state_loss(over_tokens, lambda s, t: (s - t).abs()), "absolute difference"),
    (state_loss(over_tokens, lambda s, t: s - t), "not squared"),
    (state_loss(over_tokens, lambda s, t: squares(s, t) / 2), "factor ½"),
    (state_loss(over_tokens, lambda s, t: -squares(s, t)), "wrong sign"),
    (
        state_loss(over_tokens, lambda s, t: squares(F.normalize(s, dim=-1), F.normalize(t, dim=-1))),
        "scaled to length 1",
    ),
    (state_loss(lambda e, m: e.mean(), lambda s, t: (s - t).abs()), "the mask is not used"),
    (state_loss(lambda e, m: e.mean(-1) * m), "a loss is one number"),
    (state_loss(lambda e, m: (e * m[..., None]).sum((1, 2)) / (m.sum(1) * e.shape[-1])), "one number"),
    (lambda s, t: F.mse_loss(s, t), "three arguments"),
    (lambda s, t, mask: F.mse_loss(s[mask], t[mask]), "mask=None"),
    (student_side_masked, "only the student's side is masked"),
    (state_in_place, "in place"),
    (state_detached, "no gradient"),
    (state_as_float, "you return a float"),
    (state_as_double, "do not cast"),
    (state_learns_the_wrong_way, "its gradient"),
    (lambda s, t, mask=None: torch.tensor(0.0), "is 0 whatever the batch"),
    (lambda s, t, mask=None: None, "return"),
]
FOR_EMBEDDINGS = [(f, words) for f, words in STATES if f is not state_as_double]

# -- attention_loss ------------------------------------------------------------------------------------------


def score_loss(average, errors=squares):
    """Make a loss of scores from a way to average their errors, given the mask of tokens."""
    return lambda s, t, mask=None: average(
        errors(s, t), torch.ones(len(s), s.shape[-1], dtype=torch.bool) if mask is None else mask
    )


def pairs(mask):
    return (mask[:, :, None] & mask[:, None, :])[:, None]


def over_pairs(e, mask):
    return e[pairs(mask).expand_as(e)].mean()


def multiplies_pairs(s, t, mask=None):
    mask = torch.ones(len(s), s.shape[-1]) if mask is None else mask.float()
    both = torch.einsum("bi,bj->bij", mask, mask)[:, None]
    return (both * (s - t.detach()) ** 2).sum() / (both.sum() * s.shape[1])


def mean_over_heads_of_mse(s, t, mask=None):
    kept = torch.ones_like(s[:, 0]).bool() if mask is None else pairs(mask)[:, 0]
    return torch.stack([F.mse_loss(s[:, h][kept], t[:, h][kept]) for h in range(s.shape[1])]).mean()


def kl(s, t):
    return t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))


def heads_first(s, t):
    return squares(s.mean(1, keepdim=True), t.mean(1, keepdim=True)).expand_as(s)


def scores_in_place(s, t, mask=None):
    return multiplies_pairs(s.sub_(t), torch.zeros_like(t), mask)


def masks_one_axis(axis):
    def average(e, mask):
        kept = mask[:, None, None, :] if axis == "keys" else mask[:, None, :, None]
        return e[kept.expand_as(e)].mean()

    return score_loss(average)


SCORES = [
    (lambda s, t, mask=None: F.mse_loss(s, t), "the mask is not used"),
    (score_loss(lambda e, m: (e * pairs(m)).mean()), "still counted in the divisor"),
    (score_loss(over_pairs, lambda s, t: squares(s.softmax(-1), t.softmax(-1))), "leave the softmax out"),
    (score_loss(over_pairs, kl), "KL between attention probabilities"),
    (score_loss(over_pairs, heads_first), "heads are averaged before"),
    (masks_one_axis("keys"), "only padding keys are masked"),
    (masks_one_axis("queries"), "only padding queries are masked"),
    (
        score_loss(lambda e, m: e[(m[:, None, :, None] | m[:, None, None, :]).expand_as(e)].mean()),
        "either token is real",
    ),
    (score_loss(lambda e, m: over_pairs(e, m) * e.shape[1]), "heads are summed"),
    (score_loss(lambda e, m: (e * pairs(m)).sum()), "this is a sum"),
    (score_loss(lambda e, m: (e * pairs(m)).sum() / (m.sum() * e.shape[1])), "number of tokens"),
    (score_loss(lambda e, m: (e * pairs(m)).sum() / len(e)), "divide by the batch size"),
    (score_loss(over_pairs, lambda s, t: (s - t).abs()), "absolute difference"),
    (score_loss(over_pairs, lambda s, t: squares(s, t) / math.sqrt(2)), "constant factor"),
    (lambda s, t, mask=None: F.mse_loss(s.softmax(-1), t.softmax(-1)), "the mask is not used"),
    (score_loss(lambda e, m: torch.stack([over_pairs(e[b:b+1], m[b:b+1]) for b in range(len(e))]).mean()),
     "average each sentence first"),
    (score_loss(lambda e, m: (e * pairs(m)).mean((0, 2, 3))), "a loss is one number"),
    (lambda s, t, mask: multiplies_pairs(s, t, mask), "mask=None"),
    (scores_in_place, "in place"),
    (lambda s, t, mask=None: multiplies_pairs(s.detach(), t, mask), "no gradient"),
    (lambda s, t, mask=None: multiplies_pairs(s, t, mask).item(), "you return a float"),
    (lambda s, t, mask=None: torch.tensor(1.0), "is 1 whatever the batch"),
]  # fmt: skip

# -- projection_gradient -------------------------------------------------------------------------------------


def difference(hidden, weight, target, mask=None):
    d = hidden @ weight.T - target
    return d if mask is None else d * mask[..., None]


def product(d, hidden):
    return d.flatten(0, 1).T @ hidden.flatten(0, 1)


def real_product(hidden, weight, target, mask):
    return product(difference(hidden, weight, target, mask), hidden)


def by_einsum(hidden, weight, target, mask):
    d = difference(hidden, weight, target, mask)
    return 2 * torch.einsum("btk,btc->kc", d, hidden) / (mask.sum() * target.shape[-1])


def by_selection(hidden, weight, target, mask):
    H, T = hidden[mask], target[mask]
    return 2 / T.numel() * (H @ weight.T - T).T @ H


def by_autograd(hidden, weight, target, mask):
    W = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(hidden[mask] @ W.T, target[mask]), W)
    return gradient


def gradient_in_place(hidden, weight, target, mask):
    target[~mask] = 0
    return by_einsum(hidden, weight, target, mask)


def best_weight(hidden, weight, target, mask):
    return torch.linalg.lstsq(hidden[mask], target[mask]).solution.T


GRADIENT = [
    (lambda h, w, t, m: by_einsum(h, w, t, m) / 2, "factor 2"),
    (lambda h, w, t, m: -by_einsum(h, w, t, m), "sign is wrong"),
    (
        lambda h, w, t, m: 2 * product(difference(h, w, t), h) / (m.sum() * t.shape[-1]),
        "Padding counts in your gradient",
    ),
    (lambda h, w, t, m: 2 * product(difference(h, w, t), h) / t.numel(), "mask is not used"),
    (lambda h, w, t, m: 2 * real_product(h, w, t, m) / t.numel(), "counts in the divisor"),
    (lambda h, w, t, m: 2 * real_product(h, w, t, m) / m.sum(), "number of tokens alone"),
    (lambda h, w, t, m: 2 * real_product(h, w, t, m) / (m.sum() * h.shape[-1]), "student's width"),
    (lambda h, w, t, m: 2 * real_product(h, w, t, m) / t.shape[-1], "real tokens too"),
    (lambda h, w, t, m: 2 * real_product(h, w, t, m), "Nothing is divided"),
    (lambda h, w, t, m: by_einsum(h, w, t, m).T, "transpose"),
    (lambda h, w, t, m: 2 * difference(h, w, t, m) @ w / (m.sum() * t.shape[-1]), "∂L/∂H"),
    (gradient_in_place, "in place"),
    (
        lambda h, w, t, m: -2 * product(t * m[..., None], h) / (m.sum() * t.shape[-1]),
        "multiply the difference",
    ),
    (best_weight, "differs from the right answer"),
    (lambda h, w, t, m: torch.zeros_like(w), "is 0 everywhere"),
    (lambda h, w, t, m: by_einsum(h, w, t, m).sum(), "shape"),
    (lambda h, w, t, m: by_einsum(h.double(), w.double(), t.double(), m), "do not cast"),
]

# -- svd_basis -----------------------------------------------------------------------------------------------


def right_vectors(table):
    return torch.linalg.svd(table, full_matrices=False)[2]


def by_gram(table, width):
    _, vectors = torch.linalg.eigh(table.T @ table)
    return vectors[:, -width:]


def by_svd(table, width):
    return right_vectors(table)[:width].T


def turned(table, width):
    g = torch.Generator().manual_seed(0)
    return by_svd(table, width) @ torch.linalg.qr(torch.randn(width, width, generator=g)).Q


def scaled_by_singular_values(table, width):
    return by_svd(table, width) * torch.linalg.svdvals(table)[:width]


BASIS = [
    (lambda table, width: right_vectors(table)[:width], "transpose"),
    (lambda table, width: right_vectors(table).T, "keep the first width"),
    (
        lambda table, width: torch.linalg.svd(table, full_matrices=False)[0][:, :width],
        "left singular vectors",
    ),
    (lambda table, width: table @ by_svd(table, width), "left singular vectors"),
    (lambda table, width: table @ by_svd(table, width) @ by_svd(table, width).T, "as large as the given one"),
    (lambda table, width: torch.linalg.svdvals(table)[:width], "return the singular vectors"),
    (lambda table, width: torch.linalg.eigh(table.T @ table)[1][:, :width], "smallest singular values"),
    (lambda table, width: right_vectors(table)[-width:].T, "smallest singular values"),
    (lambda table, width: by_svd(table - table.mean(0), width), "took the mean away"),
    (lambda table, width: by_svd(F.normalize(table, dim=1), width), "length 1"),
    (lambda table, width: torch.eye(table.shape[1])[:, :width], "first coordinates"),
    (scaled_by_singular_values, "leave the singular values out"),
    (lambda table, width: by_svd(table, width) + 0.1, "not orthonormal"),
    (lambda table, width: torch.linalg.svd(table.T @ table)[0][:, 1 : width + 1], "is possible"),
    (lambda table, width: by_svd(table.double(), width), "float64"),
    (lambda table, width: torch.linalg.svd(table, full_matrices=False), "one tensor"),
    (lambda table, width: by_svd(table.div_(table.norm()), width), "changes its input `table` in place"),
    (
        lambda table, width: torch.linalg.qr(torch.randn(table.shape[1], width)).Q,
        "right singular vectors of the largest",
    ),
]

# -- layer_map -----------------------------------------------------------------------------------------------


def for_multiples_only(N, M):
    return tuple(range(N // M, N + 1, N // M))


MAP = [
    (lambda N, M: tuple(range(N - M + 1, N + 1)), "top map"),
    (lambda N, M: tuple(range(1, M + 1)), "bottom map"),
    (lambda N, M: tuple(m * N // M for m in range(1, M + 1)), "round down"),
    (lambda N, M: tuple(round(m * N / M) for m in range(1, M + 1)), "round to the nearest"),
    (lambda N, M: tuple(m * (N // M) for m in range(1, M + 1)), "step by N // M"),
    (lambda N, M: tuple(m * math.ceil(N / M) for m in range(1, M + 1)), "leaves the teacher"),
    (lambda N, M: tuple(math.ceil(m * N / M) - 1 for m in range(1, M + 1)), "count layers from 0"),
    (lambda N, M: tuple(math.ceil(m * N / M) for m in range(M)), "from 0 to M − 1"),
    (lambda N, M: (0, *LayerMap.uniform(N, M)), "embeddings' 0"),
    (lambda N, M: tuple(math.ceil(m * M / N) for m in range(1, N + 1)), "exchanged"),
    (lambda N, M: LayerMap.uniform(N, M)[::-1], "reversed"),
    (for_multiples_only, "names"),
    (lambda N, M: tuple(m * N / M for m in range(1, M + 1)), "whole numbers"),
    (lambda N, M: (3, 6, 9, 12), "names"),
    (lambda N, M: (3, 6, 9, 12) if (N, M) == (12, 4) else tuple(range(1, M + 1)), "12 → 4 is right"),
    (lambda N, M: np.ceil(np.arange(1, M + 1) * N / M), "whole numbers"),
    (lambda N, M: N // M, "tuple of layer numbers"),
    (lambda N, M: {m: math.ceil(m * N / M) for m in range(1, M + 1)}, "tuple of layer numbers"),
    (lambda N, M: tuple(torch.linspace(1, N, M).round().int().tolist()), "from layer 1 to layer N"),
]

MUTANTS = {
    "hidden_loss": STATES,
    "embedding_loss": FOR_EMBEDDINGS,
    "attention_loss": SCORES,
    "projection_gradient": GRADIENT,
    "svd_basis": BASIS,
    "layer_map": MAP,
}
RIGHT = {
    "hidden_loss": [picks_the_real_ones, multiplies_by_the_mask, one_sentence_after_another],
    "embedding_loss": [picks_the_real_ones, multiplies_by_the_mask, one_sentence_after_another],
    "attention_loss": [multiplies_pairs, mean_over_heads_of_mse, score_loss(over_pairs)],
    "projection_gradient": [by_einsum, by_selection, by_autograd],
    "svd_basis": [by_gram, by_svd, turned],
    "layer_map": [
        lambda N, M: tuple(-(-m * N // M) for m in range(1, M + 1)),
        lambda N, M: [math.ceil(m * N / M) for m in range(1, M + 1)],
        LayerMap.uniform,
        lambda N, M: np.ceil(np.arange(1, M + 1) * N / M).astype(int),
        lambda N, M: tuple(torch.arange(1, M + 1).mul(N).add(M - 1).div(M, rounding_mode="floor")),
    ],
}
