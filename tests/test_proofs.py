"""Proofs by numbers: what proves a derivative finds a wrong one, and the lessons' derivations are each proved, with any seed."""

import math
import re
import sys

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT
from lessons import lessons, read, tags

from tinylib import plots, proofs
from tinylib.errors import UserError

LESSONS = {path.stem[:2]: path for path in lessons()}

# A derivation is numbered in a heading, `### Derivation 2: title`, or in bold where it begins, `**Derivation 2: title.**`
MARK = re.compile(r"(?m)^(?P<section>## )|(?:^#{3,4} |\*\*)Derivation (?P<number>\d+):")
AT_LEAST = {"01": 8, "02": 7, "03": 7, "05": 7, "06": 8}  # so that none is lost

# The lessons whose proofs need no training: these are run once more, with other seeds.
CHEAP = ("01", "02", "05", "06")
LEFT_OUT = {
    ("05", 5): "the saliency of a weight of the teacher, which takes minutes to make",
    ("05", 7): "files of the pruned teacher",
    ("06", 3): "the teacher's word table",
    ("06", 5): "scores of the teacher",
    ("06", 8): "states and scores of the teacher",
}
SEED = re.compile(r"manual_seed\(([^()]+)\)")


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


# -- the lessons ---------------------------------------------------------------


def proof_cells(number: str) -> list[tuple[int, object]]:
    """List a lesson's cells tagged setup, needed or proof, each with the number of the derivation above it (0: none yet)."""
    found, at = [], 0
    for cell in read(LESSONS[number]).cells:
        if cell.cell_type == "markdown":
            at = max([at, *(int(mark["number"]) for mark in MARK.finditer(cell.source) if mark["number"])])
        elif {"setup", "needed", "proof"} & set(tags(cell)):
            found.append((at, cell))
    return found


def faults(cells: list) -> list[str]:
    """Say which derivations are misnumbered, and which have no proof before the next one or before their section's end."""
    found, last, open_ = [], 0, None
    for cell in cells:
        if cell.cell_type == "code":
            open_ = None if "proof" in tags(cell) else open_
            continue
        for mark in MARK.finditer(cell.source):
            if open_ is not None:
                found.append(f"derivation {open_} has no proof cell before {mark[0]!r}")
                open_ = None
            if mark["number"]:
                if int(mark["number"]) != last + 1:
                    found.append(f"derivation {mark['number']} follows derivation {last}")
                last = open_ = int(mark["number"])
    return found + ([f"derivation {open_} has no proof cell"] if open_ is not None else [])


@pytest.mark.parametrize("number", LESSONS)
def test_the_derivations_are_numbered_and_each_is_proved(number):
    cells = read(LESSONS[number]).cells
    assert not faults(cells)
    marks = [mark["number"] for cell in cells if cell.cell_type == "markdown" for mark in MARK.finditer(cell.source)]
    assert len([mark for mark in marks if mark]) >= AT_LEAST.get(number, 0)


def test_a_derivation_without_a_proof_or_out_of_order_is_found():
    from nbformat.v4 import new_code_cell as code
    from nbformat.v4 import new_markdown_cell as text

    proof = code("", metadata={"tags": ["proof"]})
    one, two = text("## 1. x\n\n**Derivation 1: a.** So."), text("Then:\n\n### Derivation 2: b\n\nSo.")
    assert not faults([text("# t"), one, code(""), proof, proof, two, proof])
    assert not faults([text("The **Derivation 7** of old is none, nor is Derivation 8: this.")])
    assert faults([one, two, proof]) == ["derivation 1 has no proof cell before '### Derivation 2:'"]
    assert faults([one, code(""), text("## 2. y"), proof]) == ["derivation 1 has no proof cell before '## '"]
    assert faults([one, proof, two]) == ["derivation 2 has no proof cell"]
    assert faults([two, proof]) == ["derivation 2 follows derivation 0"]


@pytest.mark.parametrize("number", CHEAP)
def test_the_proofs_hold_with_other_seeds(number, monkeypatch):
    monkeypatch.setattr(plots, "show", lambda fig, alt: plt.close(fig))  # drawn by the lesson's own run
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(LESSONS[number].parent)
    cells = proof_cells(number)
    proved = {at for at, cell in cells if "proof" in tags(cell)}
    left_out = {at for lesson, at in LEFT_OUT if lesson == number}
    assert left_out < proved, "LEFT_OUT names what is no derivation, or nothing is left"
    namespace, moved = {"__name__": "__main__"}, 0
    for at, cell in cells:
        if "proof" in tags(cell) and at in left_out:
            continue
        source, replaced = SEED.subn(r"manual_seed(\1 + 11)", cell.source)
        assert replaced == cell.source.count("manual_seed("), "a seed that this test cannot move: give it a name first"
        moved += replaced
        exec(compile(source, f"{LESSONS[number].name}, derivation {at}", "exec"), namespace)
    assert moved


def test_comparing_outputs_overlooks_rounding_and_nothing_larger():
    rules = re.findall("(?m)^regex: (.*)$\n^replace: (.*)$", (ROOT / "tests" / "nbval_sanitize.cfg").read_text(encoding="utf-8"))
    (rule,) = [regex for regex, replace in rules if replace == "SMALL"]
    for shown in ("2.8e-17", "4e-11", "9.9e-06", "0.0e+00", "0e+00", "3e-99"):
        assert re.sub(rule, "SMALL", f"off by {shown}, and so on") == "off by SMALL, and so on", shown
    for shown in ("1.0e-05", "3e-2", "2.8e+17", "12e-07", "12.5e-17", "1.0e+00", "0.00001", "x1e-17", "1e-17x", "nan", "1e-170.5"):
        assert re.sub(rule, "SMALL", f"off by {shown}, and so on") == f"off by {shown}, and so on", shown
