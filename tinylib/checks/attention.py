"""Checks of lesson 01: the softmax's Jacobian, masks, attention, heads, and the gradient of attention."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tinylib import attention
from tinylib.checks.core import Wrong, call, check, compare, draw, needs_gradient


def _slips(*pairs) -> dict:
    """Turn (what a slip gives, the sentence for it) into what ``compare`` wants."""
    return {sentence: value for value, sentence in pairs}


# -- softmax_jacobian ----------------------------------------------------------


@check("softmax_jacobian")
def softmax_jacobian(attempt: Callable) -> None:
    """attempt(p): probabilities (…, n) -> (…, n, n), entry i, j = ∂p_i/∂z_j."""
    for shape, seed in (((4,), 1), ((3, 5), 2), ((2, 3, 2), 3)):
        p = draw(*shape, seed=seed).softmax(-1)
        diagonal, outer = torch.diag_embed(p), p[..., :, None] * p[..., None, :]
        eye, again = torch.eye(shape[-1], dtype=p.dtype), p.softmax(-1)
        twice = torch.diag_embed(again) - again[..., :, None] * again[..., None, :]
        slips = _slips(
            (
                p * (1 - p),
                "You return a vector, the diagonal p_i(1 − p_i). Off it stands ∂p_i/∂z_j = −p_i·p_j.",
            ),
            (
                torch.diag_embed(p * (1 - p)),
                "Your off-diagonal entries are zero, but raising z_j takes probability from every other i: "
                "∂p_i/∂z_j = −p_i·p_j.",
            ),
            (diagonal, "You forgot −p·pᵀ, the term that comes from the softmax's denominator."),
            (-outer, "You forgot diag(p), the term that comes from the softmax's numerator."),
            (
                diagonal + outer,
                "The sign between the terms is wrong: diag(p) − p·pᵀ, so that each row sums to 0.",
            ),
            (eye - outer, "You put the identity where diag(p) belongs: p_i multiplies all of (δ_ij − p_j)."),
            (eye - p[..., None, :], "The factor p_i is missing: ∂p_i/∂z_j = p_i·(δ_ij − p_j)."),
            (twice, "You applied the softmax to p once more; p is already the softmax of the scores."),
        )
        compare(f"The Jacobian for p of shape {shape}", call(attempt, p), diagonal - outer, slips)


# -- causal_mask ---------------------------------------------------------------


@check("causal_mask")
def causal_mask(attempt: Callable) -> None:
    """attempt(T) -> (T, T) bool, True where position t may look at position s ≤ t."""
    for T in (4, 1, 7):
        got, wanted = call(attempt, T), attention.causal_mask(T)
        if isinstance(got, Tensor) and got.shape == wanted.shape and got.dtype != torch.bool:
            if torch.isinf(got).any():
                raise Wrong("You return numbers to add to the scores (0, −inf); return booleans, True = may look.")
            raise Wrong(f"The mask should be boolean, but yours is {got.dtype}: end with .bool(), or compare.")
        ones = torch.ones(T, T, dtype=torch.bool)
        slips = _slips(
            (
                ones.triu(1),
                "Yours is True where looking is forbidden; True means 'may look'. Turn it round with ~.",
            ),
            (ones.triu(), "Row and column are swapped: the row asks, so row t is True up to column t."),
            (ones.tril(-1), "A position may look at itself: the diagonal must be True."),
            (ones.tril(1), "Yours looks one step into the future: the first diagonal above must be False."),
            (ones, "Yours lets every position look everywhere, the future included."),
            (ones.tril().triu(), "Yours lets a position look at itself only; the past is allowed too."),
        )
        compare(f"The mask for T={T}", got, wanted, slips)


# -- attend --------------------------------------------------------------------


def _attend_slips(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Return the weights that the usual slips give."""
    D, raw = q.shape[-1], q @ k.transpose(-2, -1)
    scores = raw / math.sqrt(D)
    seen = torch.ones_like(raw, dtype=torch.bool) if mask is None else mask.expand_as(raw)

    def softmax(scores: Tensor, seen: Tensor = seen, dim: int = -1) -> Tensor:
        return scores.masked_fill(~seen, -math.inf).softmax(dim).nan_to_num(0.0)

    found = _slips(
        (softmax(raw), "The scores are not divided by √D: large scores make the softmax nearly one-hot."),
        (softmax(raw / D), "You divided by D; the standard deviation of q·k is √D, so divide by √D."),
        (softmax(raw * math.sqrt(D)), "You multiplied by √D instead of dividing by it."),
        (
            softmax(raw / math.sqrt(k.shape[-2])),
            "You divided by the root of the number of keys; D is the width of one head, q.shape[-1].",
        ),
        (
            softmax(raw) / math.sqrt(D),
            "You divided by √D after the softmax, so no row sums to 1; divide the scores.",
        ),
        (
            softmax(scores, dim=-2),
            "Your softmax runs over the queries; over the keys it must sum to 1: dim=-1.",
        ),
        (softmax(scores, dim=1), "Your softmax runs over the heads; over the keys it must sum to 1: dim=-1."),
        (scores, "The weights should come out of a softmax; yours are the scores before it."),
    )
    if q.shape == k.shape:
        swapped = softmax(scores.transpose(-2, -1))
        found["Queries and keys are swapped: row t of q·kᵀ holds query t with every key; yours is k·qᵀ."] = swapped
    if mask is None:
        return found
    return found | _slips(
        (scores.softmax(-1), "The mask is ignored: keys that a query may not look at get weight."),
        (
            softmax(scores, ~seen),
            "The mask is turned round: True means 'may look', and you hide just those (~).",
        ),
        (
            scores.masked_fill(~seen, -1e9).softmax(-1),
            "A query that may look nowhere must get weights of zero; yours looks everywhere alike. A large "
            "negative number stands for −inf only while some key is left.",
        ),
        (
            (scores * seen).softmax(-1),
            "You set hidden scores to 0, but e⁰ = 1 is still a weight; set them to −inf before the softmax.",
        ),
        (
            scores.softmax(-1) * seen,
            "You blanked the weights after the softmax, so the rest no longer sums to 1: mask the scores.",
        ),
    )


def _attend_case(attempt: Callable, what: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    answer = call(attempt, q, k, v) if mask is None else call(attempt, q, k, v, mask)
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Wrong("attend returns two things, the mixture and the weights: `return out, weights`.")
    out, weights = answer
    right_out, right_weights = attention.attend(q, k, v, mask)
    if isinstance(out, Tensor) and isinstance(weights, Tensor) and right_out.shape != right_weights.shape:
        if (out.shape, weights.shape) == (right_weights.shape, right_out.shape):
            raise Wrong("The two results are in the wrong order: return (out, weights).")
    nowhere = right_weights.sum(-1) == 0
    if isinstance(weights, Tensor) and weights.shape == right_weights.shape and weights[nowhere].isnan().any():
        raise Wrong("A query that may look nowhere gives NaN (a softmax over −inf alone is 0/0): make it zero.")
    slips = _attend_slips(q, k, v, mask)
    if attention.attention_scores(q, k).max() > 1000:
        alike = isinstance(weights, Tensor) and weights.shape == right_weights.shape
        lost = alike and not torch.allclose(weights.sum(-1).double(), right_weights.sum(-1).double())
        if lost or (alike and weights.isnan().any()):
            raise Wrong("With large scores your weights are lost: e to a large number overflows; subtract each row's largest score "
                        "first, as softmax does.")  # fmt: skip
    compare(f"weights ({what})", weights, right_weights, slips)
    mixtures = {sentence: wrong @ v for sentence, wrong in slips.items()}
    scores = _slips((attention.attention_scores(q, k) @ v, "You mix the values by the scores; use the weights."))
    compare(f"out ({what})", out, right_out, scores | mixtures)


@check("attend")
def attend(attempt: Callable) -> None:
    """attempt(q, k, v, mask=None) -> (out, weights), as tinylib.attention.attend."""
    q, k, v = draw(2, 3, 4, 6, seed=1), draw(2, 3, 5, 6, seed=2), draw(2, 3, 5, 7, seed=3)
    _attend_case(attempt, "no mask, T = S", q, k[:, :, :4], v[:, :, :4], None)
    _attend_case(attempt, "no mask, T ≠ S", q, k, v, None)
    padding = attention.padding_mask(torch.tensor([5, 3]), 5)
    _attend_case(attempt, "padding mask of shape (B, 1, 1, S)", q, k, v, padding[:, None, None, :])
    k, v = k[:, :, :4], v[:, :, :4]
    _attend_case(attempt, "causal mask of shape (T, T)", q, k, v, attention.causal_mask(4))
    nowhere = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    nowhere[1, :, 2] = False
    _attend_case(attempt, "a query that may look nowhere", q, k, v, nowhere)
    _attend_case(attempt, "float32", q.float(), k.float(), v.float(), nowhere)
    _attend_case(attempt, "scores of thousands", 3000 * q, k, v, nowhere)
    for name, x in (("queries", q), ("keys", k), ("values", v)):
        x.requires_grad_()
        # squared: the plain sum over weights that sum to 1 would have no gradient for a constant value
        needs_gradient("out", call(attempt, q, k, v)[0].square(), x, f"The {name} could not learn.")


# -- split_heads ---------------------------------------------------------------


@check("split_heads")
def split_heads(attempt: Callable) -> None:
    """attempt(x, heads): (B, T, C) -> (B, H, T, D), head h reading columns h·D…(h+1)·D."""
    for (B, T, C), H in (((2, 5, 12), 4), ((1, 3, 6), 3), ((3, 2, 8), 1)):
        x, D = draw(B, T, C, seed=C), C // H
        cut = x.view(B, T, H, D)
        slips = _slips(
            (
                x.reshape(B, H, T, D),
                "You reshaped straight to (B, H, T, D), which mixes positions into heads: cut the last axis "
                "into (H, D) first, then swap H and T.",
            ),
            (cut, "The axes H and T are not swapped yet: attention wants (B, H, T, D)."),
            (
                x.view(B, T, D, H).permute(0, 3, 1, 2),
                "Head h gets every H-th column; it should get D neighbouring columns: (H, D), not (D, H).",
            ),
            (
                x.view(B, T, D, H).transpose(1, 2),
                "Your pieces are `heads` wide; there should be `heads` pieces, each C // heads wide.",
            ),
            (
                cut.permute(0, 2, 3, 1),
                "The last two axes are swapped: positions before columns, (B, H, T, D).",
            ),
            (cut.permute(2, 0, 1, 3), "The heads come first in yours; the batch stays first: (B, H, T, D)."),
            (
                x[:, None].expand(B, H, T, C),
                "Every head got the whole width; they share it, D = C // heads each.",
            ),
        )
        compare(f"The split of {B, T, C} into {H} heads", call(attempt, x, H), cut.transpose(1, 2), slips)


# -- attend_gradient -----------------------------------------------------------


def _gradient(q, k, v, mask, grad, scaled=True, masked=True, softmax="full") -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of attention, or what a slip in it gives."""
    p = attention.attend(q, k, v, mask if masked else None)[1]
    dp = grad @ v.transpose(-2, -1)
    ds = {
        "full": lambda: p * (dp - (p * dp).sum(-1, keepdim=True)),
        "alone": lambda: p * (1 - p) * dp,
        "one term": lambda: p * dp,
        "skipped": lambda: dp,
        "over queries": lambda: p * (dp - (p * dp).sum(-2, keepdim=True)),
        "no factor": lambda: dp - (p * dp).sum(-1, keepdim=True),
    }[softmax]()
    scale = 1 / math.sqrt(q.shape[-1]) if scaled else 1.0
    return ds @ k * scale, ds.transpose(-2, -1) @ q * scale, p.transpose(-2, -1) @ grad


GRADIENT_SLIPS = _slips(
    (
        {"scaled": False},
        "The factor 1/√D is missing in dq and dk: the scores are q·kᵀ/√D, so it comes along.",
    ),
    ({"softmax": "alone"}, "You took p(1 − p), as if the softmax saw one score alone; it is diag(p) − p·pᵀ."),
    (
        {"softmax": "one term"},
        "The softmax's second term is missing: ds = p * (dp − Σ p·dp), summed over keys.",
    ),
    ({"softmax": "skipped"}, "The gradient passes your softmax unchanged: multiply by its Jacobian."),
    ({"softmax": "over queries"}, "The sum Σ p·dp runs over the queries; it must run over the keys: dim=-1."),
    ({"softmax": "no factor"}, "A factor p is missing: ds = p * (dp − Σ p·dp)."),
    ({"masked": False}, "The mask is ignored: a hidden key must get no gradient."),
)


@check("attend_gradient")
def attend_gradient(attempt: Callable) -> None:
    """attempt(q, k, v, mask, grad) -> (dq, dk, dv); grad (B, H, T, Dv) is the loss's gradient in out."""
    q, k, v = draw(2, 2, 3, 4, seed=1), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 6, seed=3)
    grad, everything = draw(2, 2, 3, 6, seed=4), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    padding = attention.padding_mask(torch.tensor([5, 2]), 5)[:, None, None, :]
    nowhere = padding.repeat(1, 1, 3, 1)
    nowhere[0, :, 1] = False
    masks = {"no key hidden": everything, "padding": padding, "a query that may look nowhere": nowhere}
    for what, mask in masks.items():
        answer = call(attempt, q, k, v, mask, grad)
        if not isinstance(answer, tuple | list) or len(answer) != 3:
            raise Wrong("attend_gradient returns three tensors: `return dq, dk, dv`.")
        if any(isinstance(got, Tensor) and got.isnan().any() for got in answer):
            raise Wrong(f"Your gradient holds NaN ({what}): the weights of such a query are zeros, as in `attend`.")
        right = _gradient(q, k, v, mask, grad)
        if _in_another_order(answer, right):
            raise Wrong("The three gradients are right, but in the wrong order: return dq, dk, dv.")
        wrong = {sentence: _gradient(q, k, v, mask, grad, **slip) for sentence, slip in GRADIENT_SLIPS.items()}
        for i, name in enumerate(("dq", "dk", "dv")):
            slips = {sentence: gradients[i] for sentence, gradients in wrong.items()}
            if name == "dv":
                alike = grad.mean(-2, keepdim=True).expand_as(v)
                slips["Your dv treats all keys alike: weigh grad by the weights, dv = pᵀ·grad."] = alike
            compare(f"{name} ({what})", answer[i], right[i], slips)


def _in_another_order(answer, right: tuple[Tensor, ...]) -> bool:
    def place(a) -> int:
        alike = (isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b) for b in right)
        return next((i for i, same in enumerate(alike) if same), -1)

    found = [place(a) for a in answer]
    return sorted(found) == [0, 1, 2] and found != [0, 1, 2]
