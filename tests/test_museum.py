"""Lesson 04's museum of distillation bugs: what each exhibit's loss is at equality, and how its gradient goes with T."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from lessons import FOLDER, code_cells, read

T = (1.0, 4.0, 8.0, 16.0)
WRONG_AT_EQUALITY = {
    "softmax for log_softmax", "softmax, then log_softmax", "teacher not softened", "labels in another order",
    "the blog's formula",
}  # fmt: skip
RIGHT_AT_EQUALITY = {"the right one", "T² forgotten", "reduction='mean'", "KL reversed", "log_softmax twice"}
# What the museum's cells need, then the cells themselves; found by what they define.
NEEDED = ("import textwrap", "load_digits(return_X_y=True)", "digit_teacher = learn(", "no_threes = seen[", "lam = 0.5")
BEGINNER = "def gradient_size(T):"
MUSEUM = (
    "def batchmean(log_q, p):", "def exhibits(T, y):", "measured[name] = equal, shares", "noisy, x = nn.Sequential(", "pulls[T] =",
)  # fmt: skip


def source_of(anchor: str) -> str:
    cells = code_cells(read(FOLDER / "04_distillation_loss.ipynb"))
    (found,) = [cell.source for cell in cells if anchor in cell.source]
    return found


@pytest.fixture(scope="module")
def museum():
    """Run the museum's cells that measure; no picture is drawn and no review is read."""
    space = {}
    for anchor in NEEDED:
        source = source_of(anchor)
        exec(source.split("\n\n\ndef threes_found")[0] if anchor == NEEDED[3] else source, space)
    exec(source_of(BEGINNER).split("\n\n\n")[0], space)
    for anchor in MUSEUM:
        exec(source_of(anchor), space)
    return SimpleNamespace(**space)


def test_every_exhibit_is_measured_and_listed_in_the_museums_table(museum):
    assert set(museum.measured) == RIGHT_AT_EQUALITY | WRONG_AT_EQUALITY
    cells = read(FOLDER / "04_distillation_loss.ipynb").cells
    (table,) = [cell.source for cell in cells if "### A museum of mistakes" in cell.source]
    listed = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert listed == list(museum.measured)


def test_which_losses_are_zero_at_equality(museum):
    assert {name for name, (equal, _) in museum.measured.items() if abs(equal) < 1e-9} == RIGHT_AT_EQUALITY
    assert all(abs(museum.measured[name][0]) > 0.01 for name in WRONG_AT_EQUALITY)


def ratios(museum, name: str) -> list[float]:
    """Give an exhibit's gradient beside the right one's, at each temperature."""
    return [wrong / right for wrong, right in zip(museum.measured[name][1], museum.measured["the right one"][1], strict=True)]


def test_without_its_factor_the_gradient_is_t_squared_times_too_small(museum):
    assert ratios(museum, "T² forgotten") == pytest.approx([1 / t**2 for t in T], rel=1e-6)


def test_the_mean_over_classes_is_ten_times_too_small_at_every_temperature(museum):
    assert ratios(museum, "reduction='mean'") == pytest.approx([1 / 10] * 4, rel=1e-6)


def test_two_log_softmaxes_are_one(museum):
    assert ratios(museum, "log_softmax twice") == pytest.approx([1.0] * 4, rel=1e-6)


def test_the_right_gradient_keeps_its_size_when_it_is_hot(museum):
    sizes = museum.measured["the right one"][1]
    assert max(sizes[1:]) < 1.5 * min(sizes[1:])
    assert sizes[0] > 0.2 * sizes[1]


def test_a_teacher_that_is_not_softened_pulls_harder_the_hotter_the_student(museum):
    sizes = museum.measured["teacher not softened"][1]
    assert all(b / a == pytest.approx(u / t, rel=0.25) for (a, t), (b, u) in itertools.pairwise(zip(sizes[1:], T[1:], strict=True)))
    assert sizes[0] == pytest.approx(museum.measured["the right one"][1][0]), "at T = 1 there is no difference"


def test_the_blog_formulas_soft_term_has_no_gradient_at_all(museum):
    assert museum.measured["the blog's formula"][1] == [0.0] * 4
    line = museum.exhibits(4.0, museum.digit_labels[museum.unseen])["the blog's formula"]
    assert not line(museum.beginner.clone().requires_grad_(), museum.t_unseen).requires_grad


def test_the_right_line_has_the_gradient_of_section_4(museum):
    s, t = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for temperature in T:
        got = museum.gradient(museum.exhibits(temperature, museum.y)["the right one"], s, t)
        wanted = temperature * ((s / temperature).softmax(-1) - (t / temperature).softmax(-1)) / len(s)
        assert torch.allclose(got, wanted, rtol=0, atol=1e-12)


def test_a_teacher_in_training_mode_does_not_agree_with_itself(museum):
    assert set(museum.wavering) == set(T)
    losses = [loss for loss, _, _ in museum.wavering.values()]
    assert min(losses) > 0.01
    assert losses == sorted(losses), "the hotter, the larger"
    assert all(there > 0.01 for _, there, _ in museum.wavering.values()), "a student that agrees is pulled away"


def test_a_teacher_that_is_not_detached_looks_right_and_gets_a_gradient(museum):
    right = museum.measured["the right one"][1]
    for temperature, size in zip(T, right, strict=True):
        equal, for_student, for_teacher = museum.pulls[temperature]
        assert abs(equal) < 1e-9
        assert math.isclose(for_student, size, rel_tol=1e-6)
        assert for_teacher > 0.05
    assert museum.pulls[16.0][2] > 0.8 * museum.pulls[16.0][1]


def test_padding_has_a_loss_at_equality_and_takes_the_gradient(museum):
    space = vars(museum).copy()
    exec(source_of("def padding_counts(states, mask):").split("\n\n\nbatch = ")[0], space)
    found = []
    for length in (10, 20, 40):
        mask = torch.arange(length).expand(3, length) < torch.tensor([10, 7, 4])[:, None]
        states = torch.randn(3, length, 5, generator=torch.Generator().manual_seed(0))
        wrong, masked, on_padding, times = space["padding_counts"](states, mask)
        share = 1 - mask.float().mean().item()
        assert wrong == pytest.approx(share, abs=1e-5), "right at every word, and off by 1 at the padding"
        assert masked == 0
        assert times == pytest.approx(1 - share, rel=1e-3), "what is left for the words"
        assert on_padding == pytest.approx(share / (share + 0.01 * (1 - share)), rel=1e-3)
        found.append(times)
    assert found == sorted(found, reverse=True)
