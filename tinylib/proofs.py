"""Derivatives proved by numbers: a formula beside autograd and central differences, in float64 (lesson 01 writes its own)."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tinylib.errors import UserError

EXACT = 1e-10  # how far a formula may be from autograd: both only round
NEAR = 1e-7  # how far it may be from central differences, which are off by about h² as well

Function = Callable[[Tensor], Tensor]


def central_differences(f: Function, x: Float[Tensor, "..."], h: float = 1e-5) -> Float[Tensor, "..."]:
    """Estimate the Jacobian of f at x: move one entry of x at a time by ±h, and divide the change of f by 2h.

    The shape is that of f(x) followed by that of x: where f gives one number it is the gradient, of x's own shape. The estimate
    is off by about h²/6 times the third derivative, and by the rounding of f divided by h; near h = 1e-5 the sum is smallest.

    Raises UserError where x or f(x) is not in float64, which these differences need, and where h is not above 0.
    """
    if not h > 0:
        raise UserError(f"h={h} must be above 0; 1e-5 serves most functions")
    with torch.no_grad():
        x = x.detach()
        columns, out = [], f(x)
        for what, tensor in (("x", x), ("f(x)", out)):
            if tensor.dtype != torch.float64:
                raise UserError(f"{what} is in {tensor.dtype}, but central differences need torch.float64; say x.double()")
        for i in range(x.numel()):
            step = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
            step[i] = h
            step = step.view(x.shape)
            columns.append((f(x + step) - f(x - step)) / (2 * h))
        stacked = torch.stack(columns, -1) if columns else out.new_zeros((*out.shape, 0))
        return stacked.reshape(out.shape + x.shape)


def gaps(closed: Float[Tensor, "..."], f: Function, x: Float[Tensor, "..."]) -> tuple[float, float]:
    """Return how far a formula's derivative of f at x is at most from autograd's, and from central differences.

    ``closed`` has the shape of f(x) followed by that of x. Raises UserError where it has another, and as ``central_differences``.
    """
    numeric = central_differences(f, x)
    if closed.shape != numeric.shape:
        raise UserError(f"closed has the shape {tuple(closed.shape)}; the derivative of f at x has {tuple(numeric.shape)}")
    automatic = torch.autograd.functional.jacobian(f, x.detach())
    closed = closed.detach()
    return _largest(closed - automatic), _largest(closed - numeric)


def three_ways(
    name: str, closed: Float[Tensor, "..."], f: Function, x: Float[Tensor, "..."], exact: float = EXACT, near: float = NEAR
) -> None:
    """Assert that a formula, autograd and central differences give one derivative of f at x, and print the largest differences.

    ``closed`` has the shape of f(x) followed by that of x: x's own, where f gives one number. It may differ by less than
    ``exact`` from autograd and by less than ``near`` from central differences. Raises AssertionError where it does not (NaN
    differs from everything), and UserError as ``gaps`` does.
    """
    automatic, numeric = gaps(closed, f, x)
    for other, found, limit in (("autograd", automatic, exact), ("central differences", numeric, near)):
        assert found < limit, f"{name}: formula and {other} differ by {found:.1e}, and {limit:.0e} is the limit"
    print(f"{name}: formula against autograd {automatic:.1e}, against central differences {numeric:.1e}")


def _largest(difference: Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0
