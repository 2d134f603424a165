"""Checks of lesson 04, the distillation loss.

A wrong loss is usually the right one with a slip or two: the KL reversed, T² forgotten, a mean over the wrong
axes. So the slips are kept by the place where they happen, every combination is tried, the fewest slips
first, and the message names those that give the learner's answer.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from tinylib.checks.core import Wrong, call, check, close, compare, generator, needs_gradient
from tinylib.distill import soft_target_loss

CASES = ((4, 5, 3.0), (6, 3, 0.5), (2, 7, 2.0))  # B, K, T: no two sizes alike, so that a wrong divisor shows
Slips = dict[str, Callable]  # what the learner is told ("" = right) -> that way of doing it


def _log(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


SOFTENED: Slips = {  # logits -> log-probabilities of student and teacher
    "": lambda s, t, T: (_log(s / T), _log(t / T)),
    "the logits are not divided by the temperature": lambda s, t, T: (_log(s), _log(t)),
    "only the student's logits are divided by T": lambda s, t, T: (_log(s / T), _log(t)),
    "only the teacher's logits are divided by T": lambda s, t, T: (_log(s), _log(t / T)),
    "the student's logits are divided by T twice": lambda s, t, T: (_log(s / T**2), _log(t / T)),
    "the logits are multiplied by T: divide, so high T flattens": lambda s, t, T: (_log(s * T), _log(t * T)),
    "the softmax runs over the batch, dim=0: the classes are the last axis, dim=-1": lambda s, t, T: (
        F.log_softmax(s / T, dim=0),
        F.log_softmax(t / T, dim=0),
    ),
}
DIRECTION: Slips = {  # log p_teacher, log p_student -> (B,)
    "": _kl,
    "the KL is reversed, KL(student ‖ teacher): F.kl_div(input, target) is KL(target ‖ input), so the "
    "student comes first": lambda t, s: _kl(s, t),
    "this is the cross-entropy: its gradient is right, but it is not zero where the two agree; take the "
    "teacher's entropy away": lambda t, s: -(t.exp() * s).sum(-1),
    "the sign is wrong: a KL is never negative": lambda t, s: -_kl(t, s),
    "F.kl_div got the student's probabilities, but its first argument is log-probabilities: use "
    "log_softmax": lambda t, s: (t.exp() * (t - s.exp())).sum(-1),
    "softmax twice: the student's probabilities go through log_softmax again; give it the logits": (
        lambda t, s: _kl(t, _log(s.exp()))
    ),
    "softmax twice: the teacher's probabilities go through softmax again; give it the logits": (
        lambda t, s: _kl(_log(t.exp()), s)
    ),
    "the teacher's most likely class is taken as the label, which throws the soft target away": (
        lambda t, s: F.nll_loss(s, t.argmax(-1), reduction="none")
    ),
    "this is the squared difference of probabilities: use the KL": lambda t, s: (t.exp() - s.exp()).square().sum(-1),
}
FACTOR: Slips = {
    "": lambda T: T**2,
    "the factor T² is missing, so the gradient shrinks as T grows": lambda T: 1.0,
    "the factor is T; it should be T²": lambda T: T,
    "you divide by T²; multiply": lambda T: T**-2,
    "you divide by T; multiply by T²": lambda T: 1 / T,
}
REDUCTION: Slips = {  # (B,), number of classes -> ()
    "": lambda rows, K: rows.mean(),
    "K times too small: reduction='mean' divides by the number of classes too; use 'batchmean'": (
        lambda rows, K: rows.mean() / K
    ),
    "B times too large: the sum over the batch; take its mean ('batchmean')": lambda rows, K: rows.sum(),
}
KD = (SOFTENED, DIRECTION, FACTOR, REDUCTION)


def _combined(*places: Slips, most: int = 3) -> Iterator[tuple[str, list[Callable]]]:
    """Yield what to say and the parts, for each combination of up to ``most`` slips, the fewest first."""
    for many in range(1, most + 1):
        for slipped in itertools.combinations(range(len(places)), many):
            for chosen in itertools.product(*(list(places[i])[1:] for i in slipped)):
                at = dict(zip(slipped, chosen, strict=True))
                yield "; and ".join(chosen), [place[at.get(i, "")] for i, place in enumerate(places)]


def _kd(soften, direct, factor, reduce, student: Tensor, teacher: Tensor, T: float) -> Tensor:
    log_student, log_teacher = soften(student, teacher, T)
    return factor(T) * reduce(direct(log_teacher, log_student), student.shape[-1])


def _sentences(name: str, slips: dict) -> dict:
    return {f"{name}: {said}.": value for said, value in slips.items()}


def _logits(B: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(10 * B + K)
    # unlike means: a loss that must not see the mean of the logits is found out if it does
    student = 2 * torch.randn(B, K, generator=g) + 0.7
    return student, 2 * torch.randn(B, K, generator=g), torch.randint(K, (B,), generator=g)


def _scalar(name: str, answer):
    if isinstance(answer, float):
        raise Wrong(f"{name}: you return a float, which has no gradient; keep the tensor (no .item()).")
    if isinstance(answer, Tensor) and answer.ndim:
        remedy = "take the mean over the batch"
        remedy = remedy if answer.ndim == 1 else f"sum over the classes, {remedy}"
        raise Wrong(f"{name}: you return shape {tuple(answer.shape)}, but a loss is one number: {remedy}.")
    return answer


def _compare_losses(
    name: str, attempt, inputs: list[tuple], right: Callable, slips: Iterable[tuple[str, Callable]]
) -> None:
    """Compare a loss on all cases at once: one number alone would fit many a wrong formula."""
    answers = [_scalar(name, call(attempt, *case)) for case in inputs]
    if not all(isinstance(a, Tensor) for a in answers):
        compare(name, answers[0], right(*inputs[0]))
    if any(a.isnan() for a in answers):
        reason = "F.kl_div takes its target for probabilities; if you pass logarithms say log_target=True"
        raise Wrong(f"{name} is NaN: {reason}.")
    on_all = lambda loss: lambda: torch.stack([loss(*case) for case in inputs])  # noqa: E731
    got, wanted = torch.stack(answers), on_all(right)()
    mistakes = whatever_the_batch(got) | {said: on_all(loss) for said, loss in slips} | _fixed_sizes(got, wanted, inputs)
    compare(name, got, wanted, _sentences(name, mistakes))


def whatever_the_batch(got: Tensor) -> dict[str, Tensor]:
    """Return the mistake of a loss that is one and the same number for all inputs."""
    return {f"it is {got[0].item():.4g} whatever the batch, as if nothing were written yet": got[:1].detach().expand_as(got)}


def _fixed_sizes(got: Tensor, wanted: Tensor, inputs: list[tuple]) -> dict[str, Tensor]:
    """Return what a number in the code gives where a size belongs, for the number that the first case tells of."""
    B, K = (torch.tensor([case[0].shape[axis] for case in inputs]) for axis in (0, 1))
    ratio = (got[0] / wanted[0]).item()
    return {
        f"the number of classes is always {ratio * K[0]:.4g} in yours; it is the length of the last axis": (
            wanted * ratio * K[0] / K
        ),
        f"the batch size is always {B[0] / ratio if ratio else 0:.4g} in yours; it is the length of the first axis": (
            wanted * ratio * B / B[0]
        ),
    }


def _check_gradients(name: str, attempt, right: Callable, *rest) -> str | None:
    """The student's side gets the right gradient, huge logits do no harm; remark on a teacher that gets a gradient too."""
    student, teacher, _ = _logits(4, 5)
    student.requires_grad_()
    loss = attempt(student, teacher, *rest)
    needs_gradient(name, loss, student, "The student is what learns: leave its logits attached.")
    (got,) = torch.autograd.grad(loss, student)
    (wanted,) = torch.autograd.grad(right(student, teacher, *rest), student)
    compare(f"{name}: the value is right, but its gradient for the student", got, wanted)
    far = torch.tensor([[300.0, 0.0, -300.0, 0.0, 0.0]]).repeat(4, 1)
    loss, wanted = attempt(far, far.flip(1), *rest), right(far, far.flip(1), *rest)
    if not loss.isfinite():
        reason = "log(softmax(z)) meets log 0; use log_softmax"
        raise Wrong(f"{name}: logits of ±300 give NaN or infinity: {reason}.")
    if not close(loss, wanted):
        reason = "a clamp, or a small number added before the log, hides the infinity but not the error; log_softmax needs neither"
        raise Wrong(f"{name}: logits of ±300 give {loss.item():.4g}, and {wanted.item():.4g} is right: {reason}.")
    loss = attempt(student, teacher.requires_grad_(), *rest)
    (leak,) = torch.autograd.grad(loss, teacher, allow_unused=True)
    if leak is None or not leak.abs().sum() > 0:
        return None
    return "One habit more: detach the teacher's logits, else a teacher that can learn would follow its student."


@check("softened_probabilities")
def softened_probabilities(attempt) -> None:
    """softmax(z / T) over the classes."""
    name = "softened_probabilities"
    softened = {said: how for said, how in SOFTENED.items() if "only" not in said and "twice" not in said}
    out: Slips = {"": torch.exp, "you return log-probabilities: softmax, not log_softmax": torch.clone}
    for B, K, T in CASES:
        z = _logits(B, K)[0]
        slips = {said: out(soften(z, z, T)[0]) for said, (soften, out) in _combined(softened, out)}
        p = z.softmax(-1)
        slips |= {
            "you return the logits: the softmax is missing": z / T,
            "you divide the probabilities by T; divide the logits, before the softmax": p / T,
            "the powers p^(1/T) do not sum to 1; divide them by their sum": p ** (1 / T),
            "exp(z/T) is not divided by its sum over the classes": (z / T).exp(),
            "you divide by T²; divide by T": (z / T**2).softmax(-1),
        }
        compare(name, call(attempt, z, T), (z / T).softmax(-1), _sentences(name, slips))
    huge = torch.tensor([[400.0, 0.0, -400.0]])
    compare(f"{name} with logits of ±400", call(attempt, huge, 2.0), (huge / 2).softmax(-1))
    z = _logits(4, 5)[0].requires_grad_()
    needs_gradient(name, attempt(z, 2.0)[:, 0], z, "The student learns through it.")


@check("kd_gradient")
def kd_gradient(attempt) -> None:
    """T (p_s − p_t) / B: the gradient of soft_target_loss with respect to the student's logits."""
    name = "kd_gradient"
    sign: Slips = {
        "": lambda s, t: s - t,
        "the sign is wrong: the student's probabilities come first": lambda s, t: t - s,
    }
    factor: Slips = {
        "": lambda T: T,
        "the factor T is missing: T² from the loss and 1/T from the chain rule leave T": lambda T: 1.0,
        "the factor is T²: the chain rule through z/T takes one T away": lambda T: T**2,
        "the factor is 1/T: that is the gradient without the T² of the loss": lambda T: 1 / T,
    }
    mean: Slips = {
        "": lambda B, K: B,
        "B times too large: the loss is a mean over the batch, so divide by B": lambda B, K: 1,
        "you divide by the classes too: the loss sums over them, so divide by B alone": lambda B, K: B * K,
        "you divide by the number of classes; divide by the batch size": lambda B, K: K,
    }
    for B, K, T in CASES:
        s, t, _ = _logits(B, K)
        p_s, p_t = (s / T).softmax(-1), (t / T).softmax(-1)
        slips = {
            said: times(T) * minus(*(x.exp() for x in soften(s, t, T))) / over(B, K)
            for said, (soften, minus, times, over) in _combined(SOFTENED, sign, factor, mean)
        } | {
            "you subtract logits; subtract the softened probabilities": (s - t) / B,
            "you subtract log-probabilities; subtract probabilities": T * (p_s.log() - p_t.log()) / B,
            "the teacher's most likely class stands for its probabilities": T * (p_s - F.one_hot(t.argmax(-1), K)) / B,
        }
        compare(name, call(attempt, s, t, T), T * (p_s - p_t) / B, _sentences(name, slips))


@check("soft_target_loss")
def check_soft_target_loss(attempt) -> str | None:
    """T²·KL(teacher ‖ student), the mean over the batch."""
    name = "soft_target_loss"
    slips = [(said, lambda *case, parts=parts: _kd(*parts, *case)) for said, parts in _combined(*KD)]
    logits = "this is the squared difference of the logits: compare the softened distributions"
    slips.insert(0, (logits, lambda s, t, T: F.mse_loss(s, t)))
    inputs = [(*_logits(B, K)[:2], T) for B, K, T in CASES]

    def deaf(student: Tensor, teacher: Tensor, T: float) -> Tensor:
        alike = close(attempt(student, teacher, T), attempt(student, teacher, T + 1.5))
        return attempt(student, teacher, T) if alike else torch.tensor(torch.nan)

    slips.append(("it is the same at every temperature, so a number stands where the argument belongs", deaf))
    _compare_losses(name, attempt, inputs, soft_target_loss, slips)
    remark = _check_gradients(name, attempt, soft_target_loss, 3.0)
    student, teacher, _ = _logits(4, 5)
    try:
        answer = attempt(student, teacher)
    except TypeError:
        raise Wrong(f"{name}: the temperature is 1 if none is given: write `temperature=1.0`.") from None
    if not close(answer, soft_target_loss(student, teacher)):
        raise Wrong(f"{name}: without a temperature the result is not that of T = 1.")
    return remark


@check("logit_matching_loss")
def logit_matching_loss(attempt) -> None:
    """The limit of soft_target_loss for T → ∞: half the mean squared difference of the centred logits."""
    name, centre = "logit_matching_loss", lambda z, dim=-1: z - z.mean(dim, keepdim=True)
    centred: Slips = {
        "": lambda s, t: centre(s - t),
        "the logits are not centred: a softmax does not see a row's mean; take it away": lambda s, t: s - t,
        "only the student's logits are centred": lambda s, t: centre(s) - t,
        "only the teacher's logits are centred": lambda s, t: s - centre(t),
        "the mean runs over the batch, dim=0: centre over the classes": lambda s, t: centre(s - t, 0),
        "one mean of the whole batch is taken away: centre each row": lambda s, t: s - t - (s - t).mean(),
    }
    power: Slips = {
        "": lambda d: d.square(),
        "this is the absolute difference; square it": lambda d: d.abs(),
        "the difference is not squared, so it cancels": lambda d: d,
    }
    scale: Slips = {
        "": lambda rows, K: rows.mean() / (2 * K),
        "the factor ½ is missing": lambda rows, K: rows.mean() / K,
        "K times too large: divide by the number of classes": lambda rows, K: rows.mean() / 2,
        "both ½ and the number of classes K in the divisor are missing": lambda rows, K: rows.mean(),
        "B times too large: take the mean over the batch": lambda rows, K: rows.sum() / (2 * K),
        "you divide by K²; divide by K": lambda rows, K: rows.mean() / (2 * K * K),
        "you take a square root; the limit is the square": lambda rows, K: (rows.sqrt() / (2 * K)).mean(),
    }
    slips = [
        (said, lambda s, t, how=parts: how[2](how[1](how[0](s, t)).sum(-1), s.shape[-1]))
        for said, parts in _combined(centred, power, scale)
    ]
    right = lambda s, t: centre(s - t).square().mean() / 2  # noqa: E731
    _compare_losses(name, attempt, [_logits(B, K)[:2] for B, K, _ in CASES], right, slips)
    student, teacher, _ = _logits(4, 5)
    loss = attempt(student.requires_grad_(), teacher)
    needs_gradient(name, loss, student, "The student is what learns: leave its logits attached.")


@check("repair_the_blog_formula")
def repair_the_blog_formula(attempt) -> str | None:
    """alpha · CE(labels) + (1 − alpha) · T² KL(teacher ‖ student)."""
    name = "repair_the_blog_formula"
    ce = F.cross_entropy
    labels: Slips = {
        "": lambda s, t, y, T: ce(s, y),
        "the labels' term is softened by T; labels are matched at T = 1": lambda s, t, y, T: ce(s / T, y),
        "the labels' term is a sum over the batch; take the mean": lambda s, t, y, T: len(y) * ce(s, y),
        "F.cross_entropy got probabilities; it wants the logits": lambda s, t, y, T: ce(s.softmax(-1), y),
        "the teacher's guesses stand where the labels should": lambda s, t, y, T: ce(s, t.argmax(-1)),
    }
    weights: Slips = {
        "": lambda ce, kd, a: a * ce + (1 - a) * kd,
        "alpha and 1 − alpha have changed places": lambda ce, kd, a: (1 - a) * ce + a * kd,
        "the terms are not weighted by alpha and 1 − alpha": lambda ce, kd, a: ce + kd,
        "the terms weigh the same whatever alpha says": lambda ce, kd, a: (ce + kd) / 2,
        "both terms are weighted by alpha": lambda ce, kd, a: a * (ce + kd),
        "the soft targets are not weighted by 1 − alpha": lambda ce, kd, a: a * ce + kd,
        "the labels are not weighted by alpha": lambda ce, kd, a: ce + (1 - a) * kd,
        "the soft targets are missing: this learns from labels alone": lambda ce, kd, a: a * ce,
        "the labels are missing": lambda ce, kd, a: (1 - a) * kd,
    }
    told = "this is the blog formula itself: no student in log p_t(y|x), so that term has no gradient"
    blog = lambda s, t, y, a: a * ce(s, y) + (1 - a) * ce(t, y)  # noqa: E731
    slips = [
        (told, lambda s, t, y, T, a: blog(s, t, y, a)),
        (told + " (and it is summed over the batch)", lambda s, t, y, T, a: len(y) * blog(s, t, y, a)),
        (told + " (and the teacher is softened)", lambda s, t, y, T, a: blog(s, t / T, y, a)),
        (told + " (and both are softened)", lambda s, t, y, T, a: blog(s / T, t / T, y, a)),
    ] + [
        (said, lambda s, t, y, T, a, p=p: p[1](p[0](s, t, y, T), _kd(*p[2:], s, t, T), a))
        for said, p in _combined(labels, weights, *KD, most=2)
    ]
    right = lambda s, t, y, T, a: a * ce(s, y) + (1 - a) * soft_target_loss(s, t, T)  # noqa: E731
    inputs = [(*_logits(B, K), T, a) for (B, K, T), a in zip(CASES, (0.3, 0.6, 0.85), strict=True)]
    _compare_losses(name, attempt, inputs, right, slips)
    y = _logits(4, 5)[2]
    at = lambda loss: lambda s, t, T: loss(s, t, y, T, 0.3)  # noqa: E731
    return _check_gradients(name, at(attempt), at(right), 3.0)
