"""What the checks share: the report, the registry, and comparing an answer with the right one and with known mistakes."""

import difflib
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHECKS: dict[str, Callable] = {}


@dataclass(frozen=True)
class Report:
    """The outcome of a check: whether the attempt passed, and what is wrong with it and why."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        return f"{'✅' if self.passed else '❌'} {self.message}"


class Wrong(Exception):
    """Raised inside a check with the sentence for the learner."""


def check(name: str):
    """Register a check under the exercise's name."""

    def register(function: Callable) -> Callable:
        CHECKS[name] = function
        return function

    return register


def run_check(name: str, attempt) -> Report:
    """Run one check; every failure of the attempt becomes a report."""
    if name not in CHECKS:
        near = difflib.get_close_matches(name, CHECKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the checks are {', '.join(CHECKS)}"
        return Report(False, f"There is no check called {name!r}; {hint}")
    try:
        with torch.random.fork_rng(devices=[]):  # a learner's code may seed or draw; nothing outside notices
            remark = CHECKS[name](attempt)
    except Wrong as wrong:
        return Report(False, str(wrong))
    except NotImplementedError:
        return Report(
            False, f"{name}: nothing is written yet. Replace the stub by your answer and run both cells again."
        )
    except Exception as error:  # noqa: BLE001 (whatever the learner's code raises is a mistake to explain)
        return Report(False, f"{name}: your code raised {type(error).__name__}: {_first_line(error)}{_where(error)}")
    return Report(True, f"{name}: correct. {remark}" if remark else f"{name}: correct.")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _where(error: BaseException) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "tinylib/checks" not in f.filename.replace("\\", "/")
    ]
    return f" (line {frames[0].lineno} of {frames[0].name}: {frames[0].line})" if frames and frames[0].line else ""


def generator(seed: int = 0) -> torch.Generator:
    """Return the source of a check's random inputs."""
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    """Return normal random numbers in float64, for checks whose answers are compared to many digits."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def call(attempt: Callable, *inputs, **named):
    """Call the attempt on copies and refuse an answer that changes its inputs."""
    if not callable(attempt):
        raise Wrong(
            f"Pass the function itself, not {type(attempt).__name__}: write checks.run(name, my_function) without ()."
        )
    before = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    answer = attempt(*inputs, **named)
    for x, old in zip(inputs, before, strict=True):
        if isinstance(x, Tensor) and not torch.equal(torch.nan_to_num(x.detach()), torch.nan_to_num(old)):
            raise Wrong(
                "Your function changes its input in place (an operation ending in _, or an assignment into a slice). Make a copy."
            )
    if answer is None:
        raise Wrong("Your function returns None: is a `return` missing?")
    return answer


def compare(
    name: str,
    got,
    wanted: Tensor,
    mistakes: dict[str, Tensor | Callable[[], Tensor]] | None = None,
    tolerance: float = 1e-4,
):
    """Raise Wrong unless ``got`` is ``wanted``; if it equals the result of a known mistake, say that mistake.

    ``mistakes`` maps the sentence for the learner to what that mistake gives (a tensor, or a function that makes it).
    """
    if not isinstance(got, Tensor):
        raise Wrong(
            f"{name} should be a tensor, but yours is a {type(got).__name__}; keep it in torch (no .item(), no numpy)."
        )
    if got.shape != wanted.shape:
        for sentence, value in (mistakes or {}).items():
            value = value() if callable(value) else value
            if value.shape == got.shape and close(got, value, tolerance):
                raise Wrong(sentence)
        raise Wrong(
            f"{name} should have shape {tuple(wanted.shape)}, but yours has {tuple(got.shape)}: which axis is summed or kept?"
        )
    if got.dtype != wanted.dtype:
        raise Wrong(f"{name} should be of {wanted.dtype}, but yours is {got.dtype}; do not cast on the way.")
    if close(got, wanted, tolerance):
        return
    for sentence, value in (mistakes or {}).items():
        value = value() if callable(value) else value
        if value.shape == got.shape and close(got, value, tolerance):
            raise Wrong(sentence)
    if not torch.isfinite(got.detach().float()).all():
        raise Wrong(
            f"{name} holds NaN or infinity: look for a division by zero, a log of zero or exp of a large number."
        )
    if close(-got, wanted, tolerance):
        raise Wrong(f"{name} has the wrong sign.")
    ratio = _constant_ratio(got, wanted)
    if ratio is not None:
        size = f"{ratio:.3g} times too large" if ratio > 1 else f"{1 / ratio:.3g} times too small"
        raise Wrong(f"{name} is {size} everywhere: a constant factor is missing or one too many.")
    worst = (got.detach() - wanted).abs().max().item()
    raise Wrong(
        f"{name} differs from the right answer by up to {worst:.3g}. Work the smallest case by hand and compare."
    )


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    """Return whether two tensors of one shape agree (NaN never does)."""
    if a.dtype == torch.bool or b.dtype == torch.bool:
        return a.dtype == b.dtype and torch.equal(a, b)
    return torch.allclose(
        a.detach().double(), b.detach().double(), rtol=tolerance, atol=tolerance * max(1e-3, _size(b))
    )


def _size(b: Tensor) -> float:
    finite = b.detach().double()[torch.isfinite(b.detach())]
    return finite.abs().max().item() if finite.numel() else 1.0


def _constant_ratio(got: Tensor, wanted: Tensor) -> float | None:
    usable = wanted.detach().abs() > 1e-6
    if not usable.any() or wanted.dtype == torch.bool:
        return None
    ratios = (got.detach()[usable] / wanted.detach()[usable]).double()
    middle = ratios.median().item()
    same = (ratios - middle).abs().max().item() < 1e-3 * abs(middle)
    return middle if same and middle > 0 and not math.isclose(middle, 1.0, rel_tol=1e-3) else None


def needs_gradient(name: str, result: Tensor, source: Tensor, why: str) -> None:
    """Raise Wrong unless ``result`` has a gradient with respect to ``source``."""
    if not result.requires_grad:
        raise Wrong(f"{name} has no gradient: the graph is cut by .detach(), .item(), .data or torch.no_grad(). {why}")
    (gradient,) = torch.autograd.grad(result.sum(), source, allow_unused=True, retain_graph=True)
    if gradient is None or not gradient.abs().sum() > 0:
        raise Wrong(f"{name} does not depend on what should learn: its gradient is zero. {why}")
