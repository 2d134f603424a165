"""Lesson 01."""

import math

import torch
import torch.nn.functional as F

INF = math.inf


def scores(q, k):
    return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


def hide(s, mask, value=-INF):
    return s if mask is None else s.masked_fill(~mask, value)


def mixed(weights, v):
    return weights @ v, weights


def attend_with(make_scores, value=-INF, dim=-1, after=lambda w, mask: w.nan_to_num(0.0)):
    """Make an attend that does one thing its own way."""
    return lambda q, k, v, mask=None: mixed(after(hide(make_scores(q, k), mask, value).softmax(dim), mask), v)


def raw(q, k):
    return q @ k.transpose(-2, -1)


def right_attend(q, k, v, mask=None):
    return mixed(hide(scores(q, k), mask).softmax(-1).nan_to_num(0.0), v)


def attend_by_exponentials(q, k, v, mask=None):
    s = torch.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones_like(s) if mask is None else mask.to(s.dtype).expand_as(s)
    e = (s - s.amax(-1, keepdim=True)).exp() * seen
    total = e.sum(-1, keepdim=True)
    weights = torch.where(total > 0, e / total.clamp_min(1e-30), torch.zeros_like(e))
    return torch.einsum("bhts,bhsd->bhtd", weights, v), weights


def attend_that_overflows(q, k, v, mask=None):
    e = scores(q, k).exp()
    e = e if mask is None else e * mask
    return mixed((e / e.sum(-1, keepdim=True)).nan_to_num(0.0), v)


def attend_by_torch(q, k, v, mask=None):
    eye = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-1], -1)  # as values it gives the weights back
    out, weights = (F.scaled_dot_product_attention(q, k, x, attn_mask=mask) for x in (v, eye))
    return out.nan_to_num(0.0), weights.nan_to_num(0.0)


def attend_large_negative(q, k, v, mask=None):
    weights = hide(scores(q, k), mask, -1e9).softmax(-1)
    if mask is not None:
        weights = weights * mask  # also empties the rows that may look nowhere
    return weights @ v, weights


def attend_in_place(q, k, v, mask=None):
    q /= math.sqrt(q.shape[-1])
    return mixed(hide(raw(q, k), mask).softmax(-1).nan_to_num(0.0), v)


def attend_float32(q, k, v, mask=None):
    return right_attend(q.float(), k.float(), v.float(), mask)


def attend_zeroed_scores(q, k, v, mask=None):
    s = scores(q, k)
    return mixed((s if mask is None else s * mask).softmax(-1), v)


def attend_blanked_weights(q, k, v, mask=None):
    w = scores(q, k).softmax(-1)
    return mixed(w if mask is None else w * mask, v)


def attend_scores_as_result(q, k, v, mask=None):
    out, _ = right_attend(q, k, v, mask)
    return out, scores(q, k)


def attend_mixes_scores(q, k, v, mask=None):
    weights = right_attend(q, k, v, mask)[1]
    return scores(q, k) @ v, weights


def jacobian_one_by_one(p):
    rows = p.reshape(-1, p.shape[-1])
    return torch.stack([torch.diag(r) - torch.outer(r, r) for r in rows]).reshape(*p.shape, p.shape[-1])


def jacobian_by_kronecker(p):
    return p[..., :, None] * (torch.eye(p.shape[-1], dtype=p.dtype) - p[..., None, :])


def jacobian_in_place(p):
    p *= 1 - p
    return torch.diag_embed(p)


def jacobian_by_autograd(p):
    one = torch.func.jacrev(lambda z: z.softmax(-1))
    return torch.vmap(one)(p.log().reshape(-1, p.shape[-1])).reshape(*p.shape, -1)


def outer(p):
    return p[..., :, None] * p[..., None, :]


def causal_by_loops(T):
    mask = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        mask[t, : t + 1] = True
    return mask


def split_in_place(x, heads):
    B, T, C = x.shape
    return x.resize_(B, T, heads, C // heads).transpose(1, 2)


def split_by_slices(x, heads):
    B, T, C = x.shape
    D = C // heads
    found = torch.empty(B, heads, T, D, dtype=x.dtype)
    for h in range(heads):
        found[:, h] = x[:, :, h * D : (h + 1) * D]
    return found


def gradient(q, k, v, mask, grad, scale=None, use_mask=True, softmax=None, order=(0, 1, 2)):
    """Work out the gradient, or one with a slip."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    p = right_attend(q, k, v, mask if use_mask else None)[1]
    dp = grad @ v.transpose(-2, -1)
    ds = (softmax or (lambda p, dp: p * (dp - (p * dp).sum(-1, keepdim=True))))(p, dp)
    found = ds @ k * scale, ds.transpose(-2, -1) @ q * scale, p.transpose(-2, -1) @ grad
    return tuple(found[i] for i in order)


def gradient_slip(**slip):
    return lambda q, k, v, mask, grad: gradient(q, k, v, mask, grad, **slip)


def gradient_by_autograd(q, k, v, mask, grad):
    inputs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    return torch.autograd.grad(out, inputs, grad)


def gradient_with_nan(q, k, v, mask, grad):
    p = hide(scores(q, k), mask).softmax(-1)
    dp = grad @ v.mT
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / math.sqrt(q.shape[-1])
    return ds @ k, ds.mT @ q, p.mT @ grad


def gradient_by_jacobian(q, k, v, mask, grad):
    p = right_attend(q, k, v, mask)[1]
    ds = torch.einsum("bhts,bhtsj->bhtj", grad @ v.mT, torch.diag_embed(p) - outer(p)) / math.sqrt(
        q.shape[-1]
    )
    return ds @ k, ds.mT @ q, p.mT @ grad


def gradient_in_place(q, k, v, mask, grad):
    grad *= 1.0
    grad += 1.0
    return gradient(q, k, v, mask, grad)


MUTANTS = {
    "softmax_jacobian": [
        (lambda p: p * (1 - p), "a vector"),
        (lambda p: torch.diag_embed(p * (1 - p)), "off-diagonal entries are zero"),
        (lambda p: torch.diag_embed(p), "forgot −p·pᵀ"),
        (lambda p: -outer(p), "forgot diag(p)"),
        (lambda p: torch.diag_embed(p) + outer(p), "sign between the terms"),
        (lambda p: outer(p) - torch.diag_embed(p), "wrong sign"),
        (lambda p: torch.eye(p.shape[-1], dtype=p.dtype) - outer(p), "put the identity"),
        (lambda p: torch.eye(p.shape[-1], dtype=p.dtype) - p[..., None, :], "factor p_i is missing"),
        (lambda p: jacobian_by_kronecker(p.softmax(-1)), "once more"),
        (lambda p: torch.diag(p) - torch.outer(p, p), "your code raised"),
        (lambda p: jacobian_by_kronecker(p).float(), "do not cast"),
        (lambda p: jacobian_by_kronecker(p).numpy(), "keep it in torch"),
        (lambda p: 2 * jacobian_by_kronecker(p), "2 times too large"),
        (lambda p: jacobian_by_kronecker(p).sum(-1), "shape"),
        (jacobian_in_place, "in place"),
        (lambda p: None, "returns None"),
    ],
    "causal_mask": [
        (lambda T: torch.ones(T, T, dtype=torch.bool).triu(1), "where looking is forbidden"),
        (lambda T: torch.ones(T, T, dtype=torch.bool).triu(), "Row and column are swapped"),
        (lambda T: torch.ones(T, T, dtype=torch.bool).tril(-1), "the diagonal must be True"),
        (lambda T: torch.ones(T, T, dtype=torch.bool).tril(1), "one step into the future"),
        (lambda T: torch.ones(T, T, dtype=torch.bool), "the future included"),
        (lambda T: torch.eye(T, dtype=torch.bool), "itself only"),
        (lambda T: torch.ones(T, T).tril(), "should be boolean"),
        (lambda T: torch.ones(T, T, dtype=torch.long).tril(), "should be boolean"),
        (lambda T: torch.full((T, T), -INF).triu(1), "numbers to add"),
        (lambda T: torch.ones(4, 4, dtype=torch.bool).tril(), "shape (1, 1)"),
        (lambda T: torch.ones(1, 1, T, T, dtype=torch.bool).tril(), "shape (4, 4)"),
        (lambda T: [[s <= t for s in range(T)] for t in range(T)], "keep it in torch"),
    ],
    "attend": [
        (attend_that_overflows, "overflows"),
        (attend_with(raw), "not divided by √D"),
        (attend_with(lambda q, k: raw(q, k) / q.shape[-1]), "You divided by D"),
        (attend_with(lambda q, k: raw(q, k) * math.sqrt(q.shape[-1])), "multiplied by √D"),
        (attend_with(lambda q, k: raw(q, k) / math.sqrt(k.shape[-2])), "number of keys"),
        (
            attend_with(raw, after=lambda w, mask: w.nan_to_num(0.0) / math.sqrt(6)),
            "after the softmax, so no row",
        ),
        (attend_with(scores, dim=-2), "over the queries"),
        (attend_with(scores, dim=1), "over the heads"),
        (attend_with(lambda q, k: scores(k, q)), "are swapped"),
        (attend_scores_as_result, "scores before it"),
        (attend_mixes_scores, "mix the values by the scores"),
        (lambda q, k, v, mask=None: right_attend(q, k, v, mask)[::-1], "wrong order"),
        (lambda q, k, v, mask=None: right_attend(q, k, v, mask)[0], "two things"),
        (lambda q, k, v, mask=None: right_attend(q, k, v), "mask is ignored"),
        (lambda q, k, v, mask=None: right_attend(q, k, v, None if mask is None else ~mask), "turned round"),
        (attend_zeroed_scores, "e⁰ = 1"),
        (attend_blanked_weights, "blanked the weights"),
        (attend_with(scores, value=-1e9), "looks everywhere alike"),
        (attend_with(scores, after=lambda w, mask: w), "NaN"),
        (attend_in_place, "in place"),
        (attend_float32, "do not cast"),
        (lambda q, k, v, mask=None: right_attend(q, k.detach(), v, mask), "The keys could not learn"),
        (
            lambda q, k, v, mask=None: mixed(right_attend(q, k, v, mask)[1].detach(), v),
            "The queries could not learn",
        ),
        (lambda q, k, v, mask=None: tuple(x.detach() for x in right_attend(q, k, v, mask)), "graph is cut"),
        (lambda q, k, v: right_attend(q, k, v), "your code raised TypeError"),
    ],
    "split_heads": [
        (lambda x, heads: x.reshape(x.shape[0], heads, x.shape[1], -1), "straight to (B, H, T, D)"),
        (lambda x, heads: x.view(*x.shape[:2], heads, -1), "not swapped yet"),
        (lambda x, heads: x.view(*x.shape[:2], -1, heads).permute(0, 3, 1, 2), "every H-th column"),
        (lambda x, heads: x.view(*x.shape[:2], -1, heads).transpose(1, 2), "`heads` wide"),
        (lambda x, heads: x.view(*x.shape[:2], heads, -1).permute(0, 2, 3, 1), "last two axes"),
        (lambda x, heads: torch.stack(x.chunk(heads, dim=-1)), "The heads come first"),
        (lambda x, heads: x[:, None].repeat(1, heads, 1, 1), "whole width"),
        (lambda x, heads: x.view(*x.shape[:2], 4, -1).transpose(1, 2), "your code raised"),
        (lambda x, heads: x[0].view(x.shape[1], heads, -1).transpose(0, 1)[None], "shape"),
        (lambda x, heads: x.chunk(heads, dim=-1), "torch.stack"),
        (lambda x, heads: x.flip(-1).view(*x.shape[:2], heads, -1).transpose(1, 2), "differs"),
        (lambda x, heads: x, "shape"),
        (split_in_place, "changes its input `x` in place"),
    ],
    "attend_gradient": [
        (gradient_slip(scale=1.0), "1/√D is missing"),
        (gradient_slip(scale=0.25), "2 times too small"),
        (gradient_slip(softmax=lambda p, dp: p * (1 - p) * dp), "one score alone"),
        (gradient_slip(softmax=lambda p, dp: p * dp), "second term is missing"),
        (gradient_slip(softmax=lambda p, dp: dp), "passes your softmax unchanged"),
        (gradient_slip(softmax=lambda p, dp: p * (dp - (p * dp).sum(-2, keepdim=True))), "over the queries"),
        (gradient_slip(softmax=lambda p, dp: dp - (p * dp).sum(-1, keepdim=True)), "A factor p is missing"),
        (gradient_slip(softmax=lambda p, dp: p * ((p * dp).sum(-1, keepdim=True) - dp)), "wrong sign"),
        (gradient_slip(use_mask=False), "mask is ignored"),
        (gradient_slip(order=(2, 1, 0)), "wrong order"),
        (gradient_slip(order=(1, 0, 2)), "wrong order"),
        (lambda *a: gradient(*a)[:2], "three tensors"),
        (lambda *a: (*gradient(*a)[:2], a[4].mean(-2, keepdim=True).expand_as(a[2])), "all keys alike"),
        (gradient_with_nan, "NaN"),
        (gradient_in_place, "in place"),
        (lambda *a: tuple(x.float() for x in gradient(*a)), "do not cast"),
    ],
}
RIGHT = {
    "softmax_jacobian": [jacobian_one_by_one, jacobian_by_kronecker, jacobian_by_autograd],
    "causal_mask": [
        causal_by_loops,
        lambda T: torch.arange(T)[None, :] <= torch.arange(T)[:, None],
        lambda T: ~torch.ones(T, T).triu(1).bool(),
    ],
    "attend": [right_attend, attend_by_exponentials, attend_large_negative, attend_by_torch],
    "split_heads": [
        lambda x, heads: torch.stack(x.chunk(heads, dim=-1), dim=1),
        lambda x, heads: x.unflatten(-1, (heads, -1)).movedim(2, 1),
        split_by_slices,
    ],
    "attend_gradient": [gradient, gradient_by_autograd, gradient_by_jacobian],
}
