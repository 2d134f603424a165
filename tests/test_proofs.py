"""Proofs by numbers: what proves a derivative finds a wrong one, and the lessons' derivations are each proved, with any seed."""

import math

import pytest
import torch

from tinylib import proofs
from tinylib.errors import UserError


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (0,)])
def test_central_differences_of_one_number_are_the_gradient(shape):
    x = numbers(*shape)
    found = proofs.central_differences(lambda x: (x.sin() * x).sum(), x)
    assert found.shape == x.shape
    assert torch.allclose(found, x.cos() * x + x.sin(), rtol=0, atol=1e-9)


def test_central_differences_of_a_tensor_are_its_jacobian():
    x, W = numbers(2, 3), numbers(3, 4, seed=1)

    def f(x):
        return (x @ W).tanh()

    found = proofs.central_differences(f, x)
    assert found.shape == (2, 4, 2, 3)
    assert torch.allclose(found, torch.autograd.functional.jacobian(f, x), rtol=0, atol=1e-9)


def test_central_differences_take_any_layout_and_leave_x_and_the_graph_alone():
    x = numbers(3, 2).T.requires_grad_()
    before = x.detach().clone()
    found = proofs.central_differences(lambda x: x.square().sum(), x)
    assert torch.allclose(found, 2 * before, rtol=0, atol=1e-8)
    assert torch.equal(x, before)
    assert not found.requires_grad


def test_the_error_falls_as_the_square_of_the_step():
    x = numbers(5)
    errors = [(proofs.central_differences(lambda x: x.exp().sum(), x, h) - x.exp()).abs().max().item() for h in (1e-1, 1e-2)]
    assert 0.009 < errors[1] / errors[0] < 0.011


@pytest.mark.parametrize(
    ("f", "x", "h", "said"),
    [
        (torch.sum, torch.ones(3), 1e-5, "x is in torch.float32, but central differences need torch.float64; say x.double()"),
        (lambda x: x.float().sum(), numbers(3), 1e-5, "f(x) is in torch.float32"),
        (torch.sum, numbers(3), 0.0, "h=0.0 must be above 0; 1e-5 serves most functions"),
        (torch.sum, numbers(3), math.nan, "h=nan must be above 0"),
    ],
)
def test_what_cannot_be_estimated_is_refused(f, x, h, said):
    with pytest.raises(UserError) as error:
        proofs.central_differences(f, x, h)
    assert said in str(error.value)


def test_a_right_formula_passes_and_the_largest_differences_are_printed(capsys):
    x = numbers(4)
    p = x.softmax(0)
    assert proofs.three_ways("softmax", torch.diag(p) - torch.outer(p, p), lambda x: x.softmax(0), x) is None
    said = capsys.readouterr().out
    assert said.startswith("softmax: formula against autograd ")
    exact, near = proofs.gaps(torch.diag(p) - torch.outer(p, p), lambda x: x.softmax(0), x)
    assert exact < 1e-15
    assert 0 < near < 1e-9
    assert said.endswith(f" {exact:.1e}, against central differences {near:.1e}\n")


def test_a_formula_that_is_a_little_wrong_is_found():
    x = numbers(4)
    wrong = x.cos()
    wrong[2] += 1e-9
    with pytest.raises(AssertionError, match=r"sine: formula and autograd differ by 1\.0e-09, and 1e-10 is the limit"):
        proofs.three_ways("sine", wrong, lambda x: x.sin().sum(), x)
    proofs.three_ways("sine", wrong, lambda x: x.sin().sum(), x, exact=1e-8)
    with pytest.raises(AssertionError, match="central differences"):
        proofs.three_ways("sine", wrong, lambda x: x.sin().sum(), x, exact=1e-8, near=1e-10)


def test_autograd_that_goes_another_way_than_the_numbers_is_found():
    def f(x):
        return (x * x.detach()).sum()  # autograd sees x once, the numbers twice

    x = numbers(3)
    with pytest.raises(AssertionError, match="formula and autograd differ"):
        proofs.three_ways("square", 2 * x, f, x)
    with pytest.raises(AssertionError, match="formula and central differences differ"):
        proofs.three_ways("square", x, f, x)


def test_what_is_no_number_agrees_with_nothing():
    x = numbers(3)
    with pytest.raises(AssertionError, match="differ by nan"):
        proofs.three_ways("nan", x.cos() * math.nan, lambda x: x.sin().sum(), x)


def test_a_formula_of_another_shape_is_refused():
    x = numbers(3)
    with pytest.raises(UserError, match=r"closed has the shape \(\); the derivative of f at x has \(3,\)"):
        proofs.three_ways("sine", x.cos().sum(), lambda x: x.sin().sum(), x)
