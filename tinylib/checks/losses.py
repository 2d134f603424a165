"""Checks of lesson 06: TinyBERT's losses, the projection's gradient, the SVD start, and layer maps.

A wrong loss goes wrong in the number that it makes of two entries, in how it averages these numbers, or in
both. So each way is kept under the sentence for the learner ("" = right), and all pairs of ways are compared.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinylib import distill, student
from tinylib.checks.core import Wrong, call, check, close, compare, generator, needs_gradient
from tinylib.checks.distill import whatever_the_batch

Ways = dict[str, Callable[..., Tensor]]


def _square(s: Tensor, t: Tensor) -> Tensor:
    return (s - t).square()


def _cosine(s: Tensor, t: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(s, t, dim=-1)[..., None].expand_as(s)


def _kl(s: Tensor, t: Tensor) -> Tensor:
    return t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))


def _heads_first(s: Tensor, t: Tensor) -> Tensor:
    return _square(s.mean(1, keepdim=True), t.mean(1, keepdim=True)).expand_as(s)


ERRORS: Ways = {  # student, teacher -> errors of the same shape
    "": _square,
    "the difference is not squared, so errors of opposite signs cancel": lambda s, t: s - t,
    "this is the absolute difference; the paper squares it": lambda s, t: (s - t).abs(),
    "the factor ½ is one too many": lambda s, t: _square(s, t) / 2,
}
STATE_ERRORS: Ways = ERRORS | {
    "the states are scaled to length 1 first (PKD's loss, not TinyBERT's): their lengths count too": (
        lambda s, t: _square(F.normalize(s, dim=-1), F.normalize(t, dim=-1))
    ),
    "this is a cosine distance (DistilBERT's); take the squared difference": _cosine,
}
SCORE_ERRORS: Ways = ERRORS | {
    "you compare probabilities; TinyBERT compares the scores before the softmax, so leave the softmax out": (
        lambda s, t: _square(s.softmax(-1), t.softmax(-1))
    ),
    "this is a KL between attention probabilities; square the difference of the scores before softmax": _kl,
    "the heads are averaged before they are compared; compare head with head": _heads_first,
    "the scores are divided once more; they come divided by √D": lambda s, t: _square(s, t) / s.shape[-1],
}


def _over(e: Tensor, kept: Tensor) -> Tensor:
    return e[kept.expand_as(e)].mean()


def _by_sentence(e: Tensor, kept: Tensor) -> Tensor:
    return torch.stack([_over(row, k) for row, k in zip(e, kept, strict=True)]).mean()


def _real_keys(kept: Tensor) -> Tensor:
    return kept.any(-2, keepdim=True)


def _real_queries(kept: Tensor) -> Tensor:
    return kept.any(-1, keepdim=True)


AVERAGES: Ways = {  # errors, which of them are of real text -> one number
    "": _over,
    "the mask is not used, so padding counts as if it were text": lambda e, k: e.mean(),
    "padding is set to zero but still counted in the divisor, so more padding makes a smaller loss; divide "
    "by the number of real entries": lambda e, k: (e * k).mean(),
    "the mask is the wrong way round: True is a real token": lambda e, k: _over(e, ~k),
    "you average each sentence first and then the sentences, so that a short one's tokens count more; take "
    "one mean over the batch": _by_sentence,
    "this is a sum; divide by the number of real entries": lambda e, k: (e * k).sum(),
    "you divide by the batch size; divide by the number of real entries": lambda e, k: (e * k).sum() / len(e),
    "a square root is one too many": lambda e, k: _over(e, k).clamp(min=0).sqrt(),
}
STATE_AVERAGES: Ways = AVERAGES | {
    "the width is summed; divide by the number of real tokens times the width": (lambda e, k: (e * k).sum() / k.sum()),
    "you divide by the number of real tokens twice": lambda e, k: (e * k).sum() / k.sum() ** 2,
}
SCORE_AVERAGES: Ways = AVERAGES | {
    "the heads are summed; average them (the paper's 1/h)": lambda e, k: _over(e, k) * e.shape[1],
    "only padding keys are masked, but the rows of padding queries count still: keep pairs of two real "
    "tokens": lambda e, k: _over(e, _real_keys(k)),
    "only padding queries are masked, but the columns of padding keys count still: keep pairs of two real "
    "tokens": lambda e, k: _over(e, _real_queries(k)),
    "a pair is kept when either token is real; both must be: & rather than |": (
        lambda e, k: _over(e, _real_queries(k) | _real_keys(k))
    ),
    "you divide by the number of tokens; divide by the number of pairs and heads": (
        lambda e, k: (e * k).sum() / (k.any(-1).sum() * e.shape[1])
    ),
}


class Case:
    """Two random tensors with loud padding, the mask of tokens, and that mask as it meets the entries."""

    def __init__(self, *shape: int, lengths: tuple[int, ...]):
        g = generator(sum(shape))
        s, t = (torch.randn(shape, generator=g) for _ in range(2))
        self.mask = torch.arange(shape[-2])[None] < torch.tensor(lengths)[:, None]
        pairs = (self.mask[:, :, None] & self.mask[:, None, :])[:, None]
        self.kept = pairs if len(shape) == 4 else self.mask[..., None]
        self.s, self.t = torch.where(self.kept, 1 + s, 3 + s), torch.where(self.kept, 1.5 * t, t - 4)

    def mistakes(self, errors: Ways, averages: Ways) -> dict[str, Tensor]:
        """Return what each pair of ways gives, those with one slip before those with two."""
        pairs = sorted(((e, a) for e in errors for a in averages if e or a), key=lambda pair: all(pair))
        found = {"; and ".join(filter(None, p)): averages[p[1]](errors[p[0]](self.s, self.t), self.kept) for p in pairs}
        for who, s, t in (("student", self.s * self.kept, self.t), ("teacher", self.s, self.t * self.kept)):
            found[f"only the {who}'s side is masked, so the other's padding counts; mask the difference"] = (
                _square(s, t).sum() / self.kept.expand_as(s).sum()
            )
        return found


def _check_loss(name: str, attempt, right: Callable, errors: Ways, averages: Ways, *cases: Case) -> None:
    first = cases[0]
    for inputs, remedy in (
        ((first.s, first.t), "the mask may be left out, and then every token is real: write `mask=None`"),
        ((first.s, first.t, first.mask), "it gets three arguments: student, teacher and mask"),
    ):
        try:
            _number(name, call(attempt, *inputs))
        except TypeError as error:
            if "argument" in str(error):
                raise Wrong(f"{name}: {remedy}.") from None
            raise
    got = torch.stack([_number(name, attempt(c.s, c.t, c.mask)) for c in cases])
    found = [c.mistakes(errors, averages) for c in cases]
    known = whatever_the_batch(got) | {words: torch.stack([f[words] for f in found]) for words in found[0]}
    said = {f"{name}: {words}.": value for words, value in known.items()}
    compare(name, got, torch.stack([right(c.s, c.t, c.mask) for c in cases]), said)
    compare(f"{name} without a mask", attempt(first.s, first.t), right(first.s, first.t))
    s = first.s.clone().requires_grad_()
    loss = attempt(s, first.t, first.mask)
    needs_gradient(name, loss, s, "The student is what learns: leave its side attached.")
    (gradient,) = torch.autograd.grad(loss, s)
    (wanted,) = torch.autograd.grad(right(s, first.t, first.mask), s)
    compare(f"{name}: the value is right, but its gradient for the student", gradient, wanted)


def _number(name: str, answer) -> Tensor:
    if isinstance(answer, float):
        raise Wrong(f"{name}: you return a float, which has no gradient; keep the tensor (no .item()).")
    if not isinstance(answer, Tensor):
        raise Wrong(f"{name} should return a tensor of one number, but yours is a {type(answer).__name__}.")
    if answer.ndim:
        shape = tuple(answer.shape)
        raise Wrong(f"{name}: you return shape {shape}, but a loss is one number: average over every axis.")
    return answer


@check("hidden_loss")
def hidden_loss(attempt) -> None:
    """attempt(student_hidden, teacher_hidden, mask=None): masked mean squared difference of (B, T, C)."""
    cases = (
        Case(3, 5, 4, lengths=(5, 3, 2)),
        Case(2, 6, 3, lengths=(2, 6)),
        Case(4, 3, 7, lengths=(1, 2, 2, 3)),
    )
    _check_loss("hidden_loss", attempt, distill.hidden_loss, STATE_ERRORS, STATE_AVERAGES, *cases)


@check("embedding_loss")
def embedding_loss(attempt) -> None:
    """attempt(student_embedding, teacher_embedding, mask=None): the same of the embeddings' outputs."""
    cases = (
        Case(2, 6, 5, lengths=(6, 3)),
        Case(3, 4, 2, lengths=(2, 4, 1)),
        Case(4, 3, 6, lengths=(1, 2, 2, 3)),
    )
    _check_loss("embedding_loss", attempt, distill.embedding_loss, STATE_ERRORS, STATE_AVERAGES, *cases)


@check("attention_loss")
def attention_loss(attempt) -> None:
    """attempt(student_scores, teacher_scores, mask=None): mean over heads and pairs of real tokens."""
    cases = Case(3, 2, 5, 5, lengths=(5, 3, 2)), Case(2, 5, 4, 4, lengths=(2, 4))
    _check_loss("attention_loss", attempt, distill.attention_loss, SCORE_ERRORS, SCORE_AVERAGES, *cases)


@check("projection_gradient")
def projection_gradient(attempt) -> None:
    """attempt(hidden (B,T,Cs), weight (Ct,Cs), target (B,T,Ct), mask (B,T)): ∂loss/∂weight, (Ct, Cs)."""
    for B, T, Cs, Ct, lengths, seed in ((3, 5, 2, 4, (5, 3, 2), 1), (2, 4, 6, 3, (1, 4), 2)):
        g = generator(seed)
        hidden, target = torch.randn(B, T, Cs, generator=g), 1 + torch.randn(B, T, Ct, generator=g)
        weight = torch.randn(Ct, Cs, generator=g)
        mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
        real, n = mask[..., None], int(mask.sum())
        miss = hidden @ weight.T - target
        to_weight = lambda x, h=hidden: 2 * torch.einsum("btk,btc->kc", x, h)  # noqa: E731
        wanted = to_weight(miss * real) / (n * Ct)
        slips = {
            "The factor 2 of the square's derivative is missing.": wanted / 2,
            "The sign is wrong: H·Wᵀ − T, the student's side first.": -wanted,
            "Padding counts in your gradient: let the mask take it out.": to_weight(miss) / (n * Ct),
            "The mask is not used: padding counts above and below.": to_weight(miss) / (B * T * Ct),
            "Padding still counts in the divisor: divide by the real tokens.": wanted * n / (B * T),
            "You divide by the number of tokens alone; the mean is over the teacher's width too.": wanted * Ct,
            "You divide by the student's width; the difference has the teacher's.": wanted * Ct / Cs,
            "You divide by the width alone; the mean is over the real tokens too.": wanted * n,
            "Nothing is divided; the loss is a mean over real tokens and width.": wanted * n * Ct,
            "Yours is the transpose: nn.Linear keeps its weight as (Ct, Cs).": wanted.T,
            "This is ∂L/∂H, the student's own gradient; asked for is ∂L/∂W.": 2 * (miss * real) @ weight / (n * Ct),
            "You multiply the target with H; multiply the difference H·Wᵀ − T.": -to_weight(target * real) / (n * Ct),
        }
        compare("The gradient", call(attempt, hidden, weight, target, mask), wanted, slips)


@check("svd_basis")
def svd_basis(attempt) -> None:
    """attempt(table (V, C), width): orthonormal columns (C, width) that keep most of the squared norm."""
    for V, C, width, seed in ((40, 6, 3, 1), (30, 8, 5, 2), (25, 5, 1, 3)):
        g = generator(seed)
        turn = torch.linalg.qr(torch.randn(C, C, generator=g)).Q
        # a mean far from zero: what takes the mean away first finds another space
        table = torch.randn(V, C, generator=g) * torch.linspace(2.5, 0.4, C) @ turn + 1.5 * turn[-1]
        _check_basis(call(attempt, table, width), table, width)


def _check_basis(got, table: Tensor, width: int) -> None:
    V, C = table.shape
    if not isinstance(got, Tensor):
        raise Wrong(f"svd_basis should return one tensor, the basis, but yours is a {type(got).__name__}.")
    of_shape = {
        (width, C): "Your basis lies in the rows, as torch.linalg.svd gives Vh; transpose it into columns.",
        (C, C): f"You return all {C} vectors; keep the first width={width}.",
        (V, width): "These are left singular vectors or the reduced table itself, a row a word; return the "
        "right singular vectors, a row a coordinate, so that table @ basis is the reduced table.",
        (V, C): "You return a table as large as the given one; return the basis (C, width) alone.",
        (width,): "You return the singular values; return the singular vectors.",
    }
    if got.shape != (C, width):
        shape = tuple(got.shape)
        raise Wrong(of_shape.get(shape, f"The basis should be (C, width) = {(C, width)}, not {shape}."))
    if got.dtype != table.dtype:
        raise Wrong(f"The basis is {got.dtype}, the table {table.dtype}: convert it, or table @ basis fails.")
    gram = got.T @ got
    if not close(gram, torch.eye(width), 1e-3):
        scaled = close(gram, torch.diag(gram.diagonal()), 1e-3)
        why = "leave the singular values out" if scaled else "basisᵀ · basis is not the identity"
        raise Wrong(f"The columns are not orthonormal: {why}.")
    best = student.explained(table, student.svd_basis(table, width))
    kept = student.explained(table, got)
    if best - kept > 1e-3 * best:
        why = _why(got, table, width)
        raise Wrong(f"Yours keeps {kept:.1%} of the table's squared norm, but {best:.1%} is possible: {why}.")


def _why(got: Tensor, table: Tensor, width: int) -> str:
    right = lambda x: torch.linalg.svd(x, full_matrices=False).Vh  # noqa: E731
    spaces = {
        "you took the smallest singular values (eigh sorts upwards)": right(table)[-width:],
        "you took the mean away first, as principal components do": right(table - table.mean(0))[:width],
        "you scaled each row to length 1 first": right(F.normalize(table, dim=1))[:width],
        "you keep the first coordinates, not the directions in which the table is largest": (
            torch.eye(table.shape[1])[:width]
        ),
    }
    for sentence, rows in spaces.items():
        if torch.linalg.svdvals(rows @ got).min() > 0.999:
            return sentence
    return "take the right singular vectors of the largest singular values"


MAPS = {  # what is wrong -> the map for N teacher layers and the student's ms = 1…M
    "This is the top map, m + N − M; the uniform one spreads over the whole teacher": (
        lambda N, ms: [m + N - len(ms) for m in ms]
    ),
    "This is the bottom map, m; the uniform one spreads over the whole teacher": lambda N, ms: list(ms),
    "You round down; round up": lambda N, ms: [m * N // len(ms) for m in ms],
    "You round to the nearest; round up": lambda N, ms: [round(m * N / len(ms)) for m in ms],
    "You step by N // M, which stops short of the top unless M divides N; round after multiplying by m": (
        lambda N, ms: [m * (N // len(ms)) for m in ms]
    ),
    "You step by ⌈N/M⌉, which leaves the teacher unless M divides N; round after multiplying by m": (
        lambda N, ms: [m * math.ceil(N / len(ms)) for m in ms]
    ),
    "You count layers from 0; 0 is the embeddings, the layers are 1 to N": (
        lambda N, ms: [math.ceil(m * N / len(ms)) - 1 for m in ms]
    ),
    "m runs from 0 to M − 1; it must run from 1 to M": (lambda N, ms: [math.ceil((m - 1) * N / len(ms)) for m in ms]),
    "The embeddings' 0 stands in front; give the M Transformer layers alone": (
        lambda N, ms: [0, *(math.ceil(m * N / len(ms)) for m in ms)]
    ),
    "N and M are exchanged": lambda N, ms: [math.ceil(m * len(ms) / N) for m in range(1, N + 1)],
    "The order is reversed; student layer 1 learns from the lowest": (
        lambda N, ms: [math.ceil(m * N / len(ms)) for m in reversed(ms)]
    ),
    "You spread from layer 1 to layer N; each student layer stands for N/M teacher layers and learns from "
    "the last of them, ⌈m·N/M⌉": lambda N, ms: [round(1 + (m - 1) * (N - 1) / max(len(ms) - 1, 1)) for m in ms],
}


@check("layer_map")
def layer_map(attempt) -> None:
    """attempt(teacher_layers, student_layers): ⌈m·N/M⌉ for m = 1…M."""
    cases = [(12, 4), (6, 3), (6, 4), (12, 6), (7, 3), (5, 5), (24, 9)]
    right = [list(distill.LayerMap.uniform(*case)) for case in cases]
    got = [_layers(call(attempt, *case), case) for case in cases]
    for sentence, wrong in MAPS.items():
        if got != right and got == [wrong(N, range(1, M + 1)) for N, M in cases]:
            raise Wrong(f"{sentence}. For 7 → 3 you give {tuple(got[4])}, not {tuple(right[4])}.")
    for (N, M), ours, wanted in zip(cases, got, right, strict=True):
        start = "12 → 4 is right, but for" if got[0] == right[0] else "For"
        if len(ours) != M:
            raise Wrong(f"{start} {N} → {M} yours names {len(ours)} layers; name one a student layer, {M}.")
        if ours != wanted:
            raise Wrong(f"{start} {N} → {M} you give {tuple(ours)}; ⌈m·N/M⌉ is {tuple(wanted)}.")


def _layers(answer, case: tuple[int, int]) -> list[int]:
    if isinstance(answer, Tensor | np.ndarray):
        answer = answer.tolist()
    if not isinstance(answer, list | tuple | range):
        raise Wrong(f"layer_map should return a tuple of layer numbers, not a {type(answer).__name__}.")
    answer = [n.item() if isinstance(n, np.generic | Tensor) and n.ndim == 0 else n for n in answer]
    for n in answer:
        if type(n) is not int:
            raise Wrong(f"Layers are whole numbers (int), but for {case[0]} → {case[1]} you give {n!r}.")
    return list(answer)
