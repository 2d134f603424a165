"""What the checks share: the report, the registry, and comparing an answer with the right one and with known mistakes."""

import difflib
import inspect
import math
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass

import torch
from torch import Tensor, nn

CHECKS: dict[str, Callable] = {}
WIDTH = 110  # characters of a line that JupyterLab shows whole in a window of 1200 pixels


@dataclass(frozen=True)
class Report:
    """The outcome of a check: whether the attempt passed, and what is wrong with it and why."""

    passed: bool
    message: str

    def __repr__(self) -> str:
        lines = f"{'✅' if self.passed else '❌'} {self.message}".splitlines()
        wrapped = (textwrap.fill(line, WIDTH, subsequent_indent="   ", break_long_words=False) for line in lines)
        return "\n".join(wrapped)


class Wrong(Exception):
    """Raised inside a check with the sentence for the learner."""


def check(name: str):
    """Register a check under the exercise's name."""

    def register(function: Callable) -> Callable:
        CHECKS[name] = function
        return function

    return register


def run_check(name, attempt) -> Report:
    """Run one check; every failure of the attempt becomes a report, the learner's own interrupt alone goes through."""
    if not isinstance(name, str):
        return Report(False, 'The name comes first, in quotation marks, then the function: checks.run("gelu", my_gelu).')
    if name not in CHECKS:
        near = difflib.get_close_matches(name, CHECKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the checks are {', '.join(CHECKS)}"
        return Report(False, f"There is no check called {name!r}; {hint}")
    try:
        # a learner's code may seed or draw from PyTorch, and nothing outside notices; a cell before may have switched
        # gradients off
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            remark = CHECKS[name](attempt)
    except Wrong as wrong:
        return Report(False, str(wrong))
    except NotImplementedError:
        return Report(
            False, f"{name}: nothing is written yet. Replace the stub by your answer and run both cells again."
        )
    except KeyboardInterrupt:
        raise
    except SystemExit as error:
        return Report(
            False,
            f"{name}: your code ends the program: exit(), quit() and sys.exit() stop all of Python, not one function. Hand the "
            f"answer back with `return`.{_where(error)}",
        )
    except BaseException as error:  # noqa: BLE001 (whatever the learner's code raises is a mistake to explain)
        return Report(False, f"{name}: your code raised {type(error).__name__}: {_first_line(error)}{_where(error)}")
    return Report(True, f"{name}: correct. {remark}" if remark else f"{name}: correct.")


def _first_line(error: BaseException) -> str:
    try:
        return (str(error).strip().splitlines() or ["no message"])[0]
    except Exception:  # noqa: BLE001 (an exception class of the learner's own may fail to print)
        return "no message"


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


def call(attempt: Callable, *inputs):
    """Call the attempt and refuse an answer that changes its inputs, what lies in a list, tuple or dict included."""
    if not callable(attempt):
        raise Wrong(
            f"Pass the function itself, not {type(attempt).__name__}: write checks.run(name, my_function) without ()."
        )
    before = [_contents(x) for x in inputs]
    answer = attempt(*inputs)
    for i, (x, old) in enumerate(zip(inputs, before, strict=True)):
        _refuse_change(_argument(attempt, i), old, _contents(x))
    if answer is None:
        raise Wrong("Your function returns None: is a `return` missing?")
    return answer


def _parts(x) -> dict[str, object] | None:
    """Return what an input is made of, by how one writes its place: ``[0]``, ``['up']``, ``.scores``; None for one thing."""
    if isinstance(x, dict):
        return {f"[{key!r}]": value for key, value in x.items()}
    if isinstance(x, list | tuple):
        return {f"[{i}]": value for i, value in enumerate(x)}
    if isinstance(x, nn.Module):
        return {f".{name}": value for name, value in (*x.named_parameters(), *x.named_buffers())}
    if is_dataclass(x) and not isinstance(x, type):
        return {f".{field.name}": getattr(x, field.name) for field in fields(x)}
    return None


def _contents(x, place: str = "") -> dict[str, tuple]:
    """Return an input and each thing in it by its place, from outside to inside, with what must stay: numbers, or the places."""
    parts = _parts(x)
    if parts is None:
        return {place: (x, x.detach().clone() if isinstance(x, Tensor) else x)}
    found = {place: (x, list(parts))}
    for name, part in parts.items():
        found |= _contents(part, place + name)
    return found


def _same(a, b) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())  # a NaN that was there before is no change
    return a is b or (type(a) is type(b) and a == b)


def _argument(attempt: Callable, i: int) -> str:
    """Return what the learner calls argument i."""
    try:
        found = list(inspect.signature(attempt).parameters.values())
    except (TypeError, ValueError):  # a function written in C need not have a signature
        return f"argument {i + 1}"
    given = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((p.name for p in found if p.kind == p.VAR_POSITIONAL), "inputs")
    return given[i] if i < len(given) else f"{rest}[{i - len(given)}]"


def _refuse_change(name: str, before: dict[str, tuple], after: dict[str, tuple]) -> None:
    """Raise Wrong, naming the argument and the place in it, unless an input is as it was."""
    for at, (thing, was) in before.items():
        now, kept = after[at]  # it is there: a container that lost it stands before it and was refused
        if _same(was, kept):
            continue
        said = f"Your function changes its input `{name}` in place"
        if now is thing and isinstance(thing, Tensor):
            where = f": afterwards `{name}{at}` holds other numbers" if at else ""
            by = "an operation ending in _, +=, or an assignment into a slice"
            raise Wrong(f"{said}{where} ({by}). Make a copy: {name}{at}.clone().")
        what = _other_places(f"{name}{at}", thing, was, kept) if now is thing else f"something else stands at `{name}{at}`"
        raise Wrong(
            f"{said}: afterwards {what}. Change a copy, which list(…), dict(…) or copy.deepcopy(…) makes; new = {name} "
            "is only a second name for the same thing."
        )


def _other_places(name: str, container, was: list[str], now: list[str]) -> str:
    if isinstance(container, list):
        return f"the list `{name}` is {'shorter' if len(now) < len(was) else 'longer'}"
    gone, new = ([at for at in a if at not in b] for a, b in ((was, now), (now, was)))
    if gone or new:
        return f"`{name}{gone[0]}` is gone" if gone else f"`{name}{new[0]}` is new"
    return f"the keys of `{name}` stand in another order"


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
        remedy = "keep it in torch (no .item(), no numpy)"
        if isinstance(got, tuple | list) and got and isinstance(got[0], Tensor):
            one = "return it alone (a comma at the end of the line makes a tuple)"
            remedy = one if len(got) == 1 else "make one of the several: torch.stack or torch.cat"
        raise Wrong(f"{name} should be a tensor, but yours is a {type(got).__name__}; {remedy}.")
    if got.shape != wanted.shape:
        for sentence, value in (mistakes or {}).items():
            value = value() if callable(value) else value
            if value.shape == got.shape and close(got, value, tolerance):
                raise Wrong(sentence)
        raise Wrong(
            f"{name} should have shape {tuple(wanted.shape)}, but yours has {tuple(got.shape)}: which axis is summed or kept?"
        )
    if got.dtype != wanted.dtype:
        raise Wrong(f"{name} should be of {wanted.dtype}, but yours is {got.dtype}; do not cast on the way, "
                    "and let a sum begin with 0, not with a tensor of its own.")  # fmt: skip
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
    if not got.any():
        raise Wrong(f"{name} is 0 everywhere: is the stub still there?")
    if close(-got, wanted, tolerance):
        raise Wrong(f"{name} has the wrong sign.")
    ratio = _constant_ratio(got, wanted)
    if ratio is not None:
        size = f"{ratio:.3g} times too large" if ratio > 1 else f"{1 / ratio:.3g} times too small"
        if wanted.numel() == 1:  # of a single number any error is a factor
            raise Wrong(f"{name} is {size}: a constant factor is missing or one too many, or a part of it is wrong.")
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
