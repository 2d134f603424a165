"""The losses that are KL divergences, soft_target_loss and value_relation_loss: their properties for any logits or relations,
and agreement with the KL written out, torch and differences."""

import inspect
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from tinylib.errors import UserError
from tinylib.losses import (
    attention_loss,
    attention_probability_loss,
    embedding_loss,
    hidden_loss,
    prediction_loss,
    soft_target_loss,
    value_relation_loss,
)
from tinylib.widgets import temperature_explorer

SIZES = {"B": st.integers(1, 6), "K": st.integers(2, 9), "seed": st.integers(0, 10_000)}
TEMPERATURES = st.floats(0.3, 30)
SHIFTS = st.floats(-50, 50)

each_size = settings(max_examples=60, deadline=None)


def logits(B, K, seed, scale=3.0):
    """Give student's and teacher's logits in float64."""
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, B, K, generator=g, dtype=torch.float64)


def brute_force(student, teacher, T):
    """Give T²·KL(teacher ‖ student) from its definition, term by term, without torch."""
    total = 0.0
    for row_s, row_t in zip(student.tolist(), teacher.tolist(), strict=True):
        e_s, e_t = [math.exp(z / T) for z in row_s], [math.exp(z / T) for z in row_t]
        for a, b in zip(e_s, e_t, strict=True):
            p_s, p_t = a / sum(e_s), b / sum(e_t)
            total += p_t * math.log(p_t / p_s)
    return T**2 * total / len(student)


def gradient(student, teacher, T):
    """Give the gradient for the student's logits by autograd."""
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(soft_target_loss(leaf, teacher, T), leaf)[0]


# -- the value -------------------------------------------------------------------------------------------------


@each_size
@given(**SIZES, T=TEMPERATURES)
def test_it_is_zero_at_equality_and_positive_elsewhere(B, K, seed, T):
    student, teacher = logits(B, K, seed)
    assert soft_target_loss(teacher, teacher, T).abs() < 1e-11
    assert gradient(teacher, teacher, T).abs().max() < 1e-12
    assert soft_target_loss(student, teacher, T) > 0


@each_size
@given(**SIZES, T=TEMPERATURES)
def test_it_is_the_kl_divergence_written_out(B, K, seed, T):
    student, teacher = logits(B, K, seed)
    expected = brute_force(student, teacher, T)
    assert soft_target_loss(student, teacher, T).item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@each_size
@given(**SIZES, T=TEMPERATURES)
def test_it_is_torchs_batchmean_kl_times_the_square_of_the_temperature(B, K, seed, T):
    student, teacher = logits(B, K, seed)
    oracle = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(student / T, -1), F.softmax(teacher / T, -1))
    torch.testing.assert_close(soft_target_loss(student, teacher, T), T**2 * oracle, rtol=1e-9, atol=1e-11)


@each_size
@given(**SIZES, T=TEMPERATURES, ours=SHIFTS, theirs=SHIFTS)
def test_a_shift_of_all_logits_of_an_example_changes_nothing(B, K, seed, T, ours, theirs):
    student, teacher = logits(B, K, seed)
    shifted = soft_target_loss(student + ours, teacher + theirs, T)
    torch.testing.assert_close(shifted, soft_target_loss(student, teacher, T), rtol=1e-8, atol=1e-9)


@each_size
@given(**SIZES, T=TEMPERATURES)
def test_it_is_the_mean_over_the_batch_and_the_order_of_classes_does_not_matter(B, K, seed, T):
    student, teacher = logits(B, K, seed)
    whole = soft_target_loss(student, teacher, T)
    each = torch.stack([soft_target_loss(student[b : b + 1], teacher[b : b + 1], T) for b in range(B)])
    torch.testing.assert_close(each.mean(), whole)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(soft_target_loss(student[:, order], teacher[:, order], T), whole)


def test_the_temperature_scales_like_the_logits():
    student, teacher = logits(4, 5, 0)
    torch.testing.assert_close(
        soft_target_loss(3 * student, 3 * teacher, 3.0), 9 * soft_target_loss(student, teacher, 1.0)
    )


def test_it_is_the_cross_entropy_when_the_teacher_is_certain():
    student, _ = logits(4, 5, 0)
    labels = torch.tensor([0, 3, 2, 4])
    certain = 1e4 * F.one_hot(labels, 5).double()
    torch.testing.assert_close(soft_target_loss(student, certain), F.cross_entropy(student, labels))


def test_the_kl_is_not_symmetric():
    student, teacher = logits(4, 5, 0)
    assert soft_target_loss(student, teacher) != pytest.approx(soft_target_loss(teacher, student).item(), rel=0.01)


def test_the_default_temperature_is_1():
    student, teacher = logits(4, 5, 0)
    assert soft_target_loss(student, teacher) == soft_target_loss(student, teacher, 1.0)


# -- the gradient ----------------------------------------------------------------------------------------------


@each_size
@given(**SIZES, T=TEMPERATURES)
def test_the_gradient_is_t_times_the_difference_of_the_distributions_over_b(B, K, seed, T):
    student, teacher = logits(B, K, seed)
    closed = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)) / B
    torch.testing.assert_close(gradient(student, teacher, T), closed, rtol=1e-9, atol=1e-12)
    assert closed.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0, 20.0])
def test_autograd_agrees_with_finite_differences(T):
    student, teacher = logits(3, 4, 1)
    loss = lambda z: soft_target_loss(z, teacher, T)  # noqa: E731
    assert torch.autograd.gradcheck(loss, student.clone().requires_grad_(), atol=1e-7)


def test_the_gradient_keeps_its_size_as_the_temperature_grows():
    student, teacher = logits(8, 10, 2)
    sizes = {T: gradient(student, teacher, T).norm().item() for T in (10.0, 100.0, 1000.0)}
    assert sizes[1000.0] == pytest.approx(sizes[100.0], rel=0.05)
    without_square = {T: size / T**2 for T, size in sizes.items()}
    assert without_square[1000.0] == pytest.approx(without_square[100.0] / 100, rel=0.05)


@each_size
@given(**SIZES)
def test_at_high_temperature_it_matches_centred_logits_with_an_error_that_falls_as_1_over_t(B, K, seed):
    student, teacher = logits(B, K, seed, scale=1.0)
    difference = student - teacher
    difference = difference - difference.mean(-1, keepdim=True)
    value, slope = difference.square().mean() / 2, difference / (K * B)
    # c / T with one c for all T: the bound follows from the third cumulant of the logits
    c = 8 * (student.abs().max() + teacher.abs().max()).item() ** 3
    for T in (50.0, 500.0, 5000.0):
        assert (soft_target_loss(student, teacher, T) - value).abs() < c / T
        assert (gradient(student, teacher, T) - slope).abs().max() < c / T


def test_the_error_of_the_limit_has_slope_minus_1():
    student, teacher = logits(6, 10, 3)
    difference = student - teacher
    limit = (difference - difference.mean(-1, keepdim=True)) / (6 * 10)
    errors = [(gradient(student, teacher, T) - limit).abs().max().item() for T in (1e3, 1e4)]
    assert math.log10(errors[1] / errors[0]) == pytest.approx(-1, abs=0.02)


@pytest.mark.parametrize(("loss", "K"), [(soft_target_loss, 5), (prediction_loss, 5), (prediction_loss, 1)])
def test_the_teacher_gets_no_gradient_and_the_student_does(loss, K):
    student, teacher = (z.requires_grad_() for z in logits(4, K, 0))
    loss(student, teacher, 2.0).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# -- the edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_keeps_the_dtype_and_changes_no_input(dtype):
    student, teacher = (z.to(dtype) for z in logits(4, 5, 0))
    before = student.clone(), teacher.clone()
    assert soft_target_loss(student, teacher, 2.0).dtype == dtype
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("T", [0.1, 1.0, 10.0])
def test_huge_logits_give_a_finite_loss_and_gradient(T):
    far = torch.tensor([[800.0, 0.0, -800.0]])
    student, teacher = far.clone().requires_grad_(), far.flip(1)
    loss = soft_target_loss(student, teacher, T)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_two_classes_are_one_number():
    student, teacher = logits(6, 2, 4)
    T, p, q = 3.0, *(torch.sigmoid((z[:, 1] - z[:, 0]) / 3.0) for z in logits(6, 2, 4).flip(0))
    binary = F.binary_cross_entropy(q, p) - F.binary_cross_entropy(p, p)
    torch.testing.assert_close(soft_target_loss(student, teacher, T), T**2 * binary)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    student, teacher = logits(2, 3, 0)
    with pytest.raises(UserError, match=r"temperature=.* must be greater than 0 and finite; 1 leaves"):
        soft_target_loss(student, teacher, temperature)


def test_logits_of_different_shapes_are_refused():
    for student, teacher in (((2, 3), (2, 4)), ((4, 3), (4, 1)), ((3, 1), (3,)), ((4, 1), (4, 2)), ((4, 2), (1, 2))):
        for loss in (soft_target_loss, prediction_loss):
            with pytest.raises(UserError, match="_loss: student has shape .*of the same texts"):
                inspect.unwrap(loss)(torch.zeros(student), torch.zeros(teacher))  # as users call it, without the shapes' check


# -- value relations -------------------------------------------------------------------------------------------

SHAPES = {"B": st.integers(1, 3), "H": st.integers(1, 3), "T": st.integers(2, 6), "seed": st.integers(0, 10_000)}


def relations(B, H, T, seed):
    """Give student's and teacher's relations in float64, and which tokens are real: all of the first text."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,), generator=g)
    lengths[0] = T
    return *torch.randn(2, B, H, T, T, generator=g, dtype=torch.float64), torch.arange(T) < lengths[:, None]


def by_loops(student, teacher, mask):
    """Give the mean of torch's KL over heads and real queries, one row of real keys at a time."""
    kl, found = nn.KLDivLoss(reduction="sum"), []
    for b, n in enumerate(mask.sum(1).tolist()):
        for h in range(student.shape[1]):
            for i in range(n):
                found.append(kl(student[b, h, i, :n].log_softmax(-1), teacher[b, h, i, :n].softmax(-1)).item())
    return sum(found) / len(found)


def fill_padding(x, mask, value):
    """Give a copy with ``value`` wherever a padding token has a part."""
    return x.masked_fill(~(mask[:, :, None] & mask[:, None, :])[:, None], value)


@each_size
@given(**SHAPES)
def test_value_relations_cost_nothing_at_equality_and_something_elsewhere(B, H, T, seed):
    student, teacher, mask = relations(B, H, T, seed)
    leaf = teacher.clone().requires_grad_()
    loss = value_relation_loss(leaf, teacher, mask)
    assert loss.abs() < 1e-12
    assert torch.autograd.grad(loss, leaf)[0].abs().max() < 1e-12
    assert value_relation_loss(student, teacher, mask) > 0
    assert value_relation_loss(student + torch.randn(B, H, T, 1), student, mask).abs() < 1e-12, "no softmax sees a shift"


@each_size
@given(**SHAPES)
def test_value_relations_cost_the_mean_kl_that_loops_give(B, H, T, seed):
    student, teacher, mask = relations(B, H, T, seed)
    got = value_relation_loss(student, teacher, mask)
    assert got.item() == pytest.approx(by_loops(student, teacher, mask), rel=1e-9, abs=1e-12)
    whole = value_relation_loss(student, teacher)
    assert whole.item() == pytest.approx(by_loops(student, teacher, torch.ones_like(mask)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("junk", [0.0, 7.0, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_padding_changes_neither_value_relation_loss_nor_gradient(junk, dtype):
    student, teacher, mask = relations(3, 2, 5, 1)
    wanted = value_relation_loss(student.requires_grad_(), teacher, mask.to(dtype))
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    dirty = fill_padding(student.detach(), mask, junk).requires_grad_()
    got = value_relation_loss(dirty, fill_padding(teacher, mask, -junk), mask.to(dtype))
    (gradient,) = torch.autograd.grad(got, dirty)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    assert torch.equal(fill_padding(gradient, mask, 0.0), gradient), "a gradient reaches the padding"
    wide = [F.pad(x.detach(), (0, 3, 0, 3), value=junk) for x in (student, teacher)]
    torch.testing.assert_close(value_relation_loss(*wide, F.pad(mask, (0, 3))), wanted.detach())


def test_the_gradient_of_value_relations_is_the_difference_of_the_softmaxes():
    student, teacher, _ = relations(2, 3, 4, 0)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(value_relation_loss(student, teacher), student)
    torch.testing.assert_close(gradient, (student.softmax(-1) - teacher.softmax(-1)).detach() / (2 * 3 * 4))
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda x: value_relation_loss(x, teacher, mask), student)


def test_the_teachers_value_relations_get_no_gradient():
    student, teacher, mask = relations(2, 3, 4, 0)
    value_relation_loss(student.requires_grad_(), teacher.requires_grad_(), mask).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_value_relations_of_padding_alone_cost_nothing():
    student, teacher, mask = relations(2, 3, 4, 0)
    assert value_relation_loss(student, teacher, torch.zeros_like(mask)).item() == 0.0


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (soft_target_loss, (16, 6)),
        (hidden_loss, (4, 6, 5)),
        (embedding_loss, (4, 6, 5)),
        (attention_loss, (4, 3, 6, 6)),
        (attention_probability_loss, (4, 3, 6, 6)),
        (value_relation_loss, (4, 3, 6, 6)),
    ],
)
def test_what_models_computed_in_bfloat16_is_compared_in_float32(loss, shape):
    generator = torch.Generator().manual_seed(0)
    teacher = (4 * torch.randn(shape, generator=generator)).bfloat16()
    student = (teacher + teacher.roll(1, 0) / 16).bfloat16()
    got, exact = loss(student, teacher), loss(student.double(), teacher.double())
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact.item(), rel=1e-4)
    assert loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("loss", [value_relation_loss, attention_probability_loss])
def test_wrong_shapes_of_value_relations_are_refused_with_a_sentence(loss):
    student, teacher, mask = relations(2, 3, 4, 0)
    with pytest.raises(UserError, match=f"{loss.__name__}.*as many heads"):
        inspect.unwrap(loss)(student, teacher[:, :2], mask)  # as users call it, without the shapes' check
    with pytest.raises(UserError, match=rf"{loss.__name__}: mask has shape \(2, 3\).*\(2, 4\)"):
        loss(student, teacher, mask[:, :3])


@pytest.mark.parametrize("junk", [7.0, -1e30, math.inf, -math.inf, math.nan])
def test_padding_changes_neither_attention_probability_loss_nor_gradient(junk):
    student, teacher, mask = relations(3, 2, 5, 0)
    keys = ~mask[:, None, None, :]
    by_hand = [x.masked_fill(keys, -math.inf).softmax(-1) for x in (student, teacher)]
    student.requires_grad_()
    clean = attention_probability_loss(student, teacher, mask)
    assert torch.equal(clean, attention_loss(*by_hand, mask))
    (wanted,) = torch.autograd.grad(clean, student)
    dirty = fill_padding(student.detach(), mask, junk).requires_grad_()
    loss = attention_probability_loss(dirty, fill_padding(teacher, mask, junk), mask)
    assert torch.equal(loss, clean)
    (gradient,) = torch.autograd.grad(loss, dirty)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


# -- the lesson's widget ---------------------------------------------------------------------------------------


def test_the_temperature_explorer_answers_the_slider():
    teacher, student = torch.tensor([6.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    slider, drawing = temperature_explorer(teacher, student, ["a", "<b>", "c"]).children
    slider.value = 1.0
    cold = drawing.value
    slider.value = 100.0
    assert "entropy is 1.10 of 1.10 nats" in drawing.value
    assert "entropy is 1.10" not in cold
    assert "<b>" not in drawing.value, "a class's name is text, not HTML"
    T = slider.value
    hot = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)).norm().item()
    assert f"{hot:.3f} with it" in drawing.value


def test_the_temperature_explorer_wants_a_name_a_class():
    with pytest.raises(UserError, match="3 logits but 2 names; name each class once"):
        temperature_explorer(torch.zeros(3), torch.zeros(3), ["a", "b"])
